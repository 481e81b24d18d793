"""The precision in which passes compute: that of autocast, TF32, weights cast before.

Weights, gradients and moments stay float32.
"""

import contextlib

import torch


def compute_dtype(x):
    """What convolutions of x compute in: autocast's dtype where it is on, else x's own."""
    if x.is_meta:
        return x.dtype
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def without_autocast(device):
    """The context of what is computed in its weights' own precision, autocast or not."""
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return _NO_CONTEXT  # on `meta` there is none


_NO_CONTEXT = contextlib.nullcontext()


def allow_tf32(on):
    """Lets CUDA compute products of float32 in TF32, or forbids it, in the whole process."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = on


def forward_precision(kind, device):
    """The context of a forward pass in --precision: autocast to bf16, or none.

    The backward pass takes place outside it. TF32 is allow_tf32's.
    """
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=kind == "bf16")


class _Casts:
    """Copies of weights in another dtype, by their id, while a step or an evaluation lasts."""

    dtype, copies = None, {}


class _Held(torch.autograd.Function):
    """A copy of a weight in another dtype, made before; its gradient goes to the weight."""

    @staticmethod
    def forward(ctx, weight, copy):
        ctx.dtype = weight.dtype
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx, grad):
        return grad.to(ctx.dtype), None


@contextlib.contextmanager
def cast_together(weights, copies):
    """In the body, convolutions in the dtype of `copies` find the weights cast: all at once.

    Backward passes too, whichever thread they run in; so the weights may not change in it. One
    kernel does what else takes some for each convolution.
    """
    with torch.no_grad():
        torch._foreach_copy_(copies, weights)
    _Casts.dtype = copies[0].dtype
    _Casts.copies = {id(w): copy for w, copy in zip(weights, copies, strict=True)}
    try:
        yield
    finally:
        _Casts.dtype, _Casts.copies = None, {}


def cast_for(x, weight):
    """A weight as convolutions of x want it, if it was cast before; else itself."""
    if _Casts.dtype is None or compute_dtype(x) != _Casts.dtype or id(weight) not in _Casts.copies:
        return weight
    return _Held.apply(weight, _Casts.copies[id(weight)])


def at_least_float32(t):
    return t if t.dtype == torch.float32 else t.to(torch.promote_types(t.dtype, torch.float32))
