"""The network's parts in less time or memory, each with the figures of its plain form.

Convolutions keep their input in place of its GELU, in the precision asked for and channels-last;
blocks keep their inputs alone (activation checkpointing). `vae` calls what stands here; with a hook
in it, another class, or a transform of torch.func, a part is computed the plain way.

Shapes: N batch, C channels, R resolution, Z latent channels.
"""

import contextlib
import contextvars
import itertools

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from noise import from_this_place, is_drawn_before

# ---- who runs this -------------------------------------------------------------------------


def is_transformed():
    """Whether torch.func works here, which takes no autograd.Function of the older kind."""
    return torch._C._are_functorch_transforms_active()


def is_traced():
    """Whether a transform of torch.func or a compiler reads this, which wants the plain form.

    A compiler chooses by itself what to keep for the backward pass.
    """
    return torch.compiler.is_compiling() or is_transformed()


# ---- precision, layout ---------------------------------------------------------------------


def compute_dtype(x):
    """What convolutions of x compute in: autocast's dtype where it is on, else x's own."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def without_autocast(device):
    """The context of what is computed in its weights' own precision, autocast or not."""
    if torch.amp.is_autocast_available(device):  # on `meta` it is not
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def allow_tf32(on):
    """Lets CUDA compute products of float32 in TF32, or forbids it, in the whole process."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = on


def forward_precision(kind, device):
    """The context of a forward pass in --precision: autocast to bf16, or none.

    The backward pass takes place outside it. TF32 is allow_tf32's.
    """
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=kind == "bf16")


class _Casts:
    """Copies of weights in another dtype while a training step lasts, by the weights' id."""

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
    return t.to(torch.promote_types(t.dtype, torch.float32))


def channels_last(t):
    """t (N, C, R, R), its channels side by side in memory: as convolutions here expect it."""
    return t.contiguous(memory_format=torch.channels_last)


def add_to_stream(x, h):
    """x + h in x's dtype, written over h, a new tensor of gelu_conv's or gelu_convs'.

    On the CPU the pages of another tensor cost more than the sum. Where h is a view (of a small
    matrix product), writing over it costs autograd more.
    """
    h = h.to(x.dtype)
    return x + h if is_traced() or h._is_view() else h.add_(x)


# ---- GELU with convolutions ----------------------------------------------------------------


def _gelu(x):
    # On the CPU the contiguous view takes half the time of the strided one.
    return F.gelu(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def gelu(x):
    """Exact GELU of x (N, C, R, R), channels-last, in the dtype that convolutions compute in."""
    x = x.to(compute_dtype(x))
    if x.is_contiguous(memory_format=torch.channels_last):
        return _gelu(x)
    return channels_last(F.gelu(x))  # x itself is kept for the backward pass, not a copy


def _folded(t, padding):
    """t (N, C, R, R) as images of 16 x 16 where a 1x1 convolution is to see it.

    It is none the wiser, and on the CPU the gradient of its weights takes two thirds of the time.
    """
    if padding or t.shape[2] * t.shape[3] % 256:
        return t
    return t.permute(0, 2, 3, 1).reshape(-1, 16, 16, t.shape[1]).permute(0, 3, 1, 2)


# Elements of input and output, together, up to which the CPU is quicker with a matrix product: for
# most of them in the half of the time, for few it's the start of oneDNN's convolution that is
# saved. Forward and backward, one core, float32, convolution → product in us: 32 images of 64 → 16
# channels, 1 x 1 pixel 189 → 59, 4 x 4 175 → 86, 8 x 8 324 → 181; 8 images of 32 x 32 (655,360
# elements) 891 → 641; but 16 of them 1270 → 1454. Of one image the convolution takes another way,
# that starts at once: of 8 x 8 pixels 38 → 59.
SMALL_PRODUCT = 700_000


def _conv(x, weight, bias=None, padding=0):
    """F.conv2d, but of two equal forms of a 1x1 convolution the cheaper; x is channels-last."""
    n, c, height, width = x.shape
    if (
        padding
        or weight.shape[2] > 1
        or n == 1
        or n * height * width * (c + len(weight)) > SMALL_PRODUCT
        or x.device.type != "cpu"
    ):
        return F.conv2d(x, weight, bias, padding=padding)
    return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)


def _gelu_convs(x, padding, *weights_and_biases, conv=_conv):
    a = gelu(x)
    w = [t.to(a.dtype) for t in weights_and_biases]
    return tuple(conv(a, *wb, padding=padding) for wb in zip(w[::2], w[1::2], strict=True))


class _GeluConvs(torch.autograd.Function):
    """Convolutions of gelu(x), which keep x for the backward pass and compute gelu(x) anew."""

    @staticmethod
    def forward(ctx, x, padding, *weights_and_biases):
        x = x.to(compute_dtype(x))
        ctx.padding = padding
        ctx.save_for_backward(x, *weights_and_biases[::2])
        # Views of a matrix product must not leave a Function.
        return _gelu_convs(x, padding, *weights_and_biases, conv=F.conv2d)

    @staticmethod
    def backward(ctx, *grads):
        x, *weights = ctx.saved_tensors
        a, grad_a, grad_weights = _folded(_gelu(x), ctx.padding), None, []
        x_needed, _, *weights_needed = ctx.needs_input_grad
        for i, (grad, weight) in enumerate(zip(grads, weights, strict=True)):
            grad_input, *grad_weight = torch.ops.aten.convolution_backward(
                _folded(grad.to(x.dtype), ctx.padding), a, weight.to(x.dtype),
                [len(weight)], [1, 1], [ctx.padding] * 2, [1, 1], False, [0, 0], 1,
                [x_needed, *weights_needed[2 * i : 2 * i + 2]],
            )  # fmt: skip
            grad_a = grad_input if grad_a is None else grad_a.add_(grad_input)
            grad_weights += grad_weight
        if x_needed:
            x = x.permute(0, 2, 3, 1)  # (N, R, R, C), as in gelu
            grad_a = grad_a.permute(0, 2, 3, 1).reshape(x.shape)
            grad_a = torch.ops.aten.gelu_backward(grad_a, x).permute(0, 3, 1, 2)
        return grad_a, None, *grad_weights


# Elements an image below which a backward pass in Python costs more time than its memory is worth.
SMALL = 2**14


def gelu_convs(x, *weights_and_biases):
    """One output per pair of weight and bias: their convolutions of gelu(x), same resolution.

    x (N, C, R, R) is channels-last, as are the outputs. The kernels are 1x1 or 3x3, all alike.
    """
    padding = weights_and_biases[0].shape[2] // 2
    # Without gradients nothing is kept.
    lean = (
        torch.is_grad_enabled() and not is_traced() and len(x) > 0 and x.shape[1:].numel() >= SMALL
    )
    return (_GeluConvs.apply if lean else _gelu_convs)(x, padding, *weights_and_biases)


def is_plain(module, kind):
    """Whether a call of `module` is its class's forward alone, which a fused one may replace.

    A hook, or a module put in its place, wants to be called.
    """
    hooks = (
        module._forward_pre_hooks,
        module._forward_hooks,
        module._backward_pre_hooks,
        module._backward_hooks,
    )
    return type(module) is kind and "forward" not in vars(module) and not any(hooks)


def is_plain_conv(conv):
    """Whether gelu_convs computes what a call of conv would."""
    return (
        is_plain(conv, nn.Conv2d)
        and conv.bias is not None
        and conv.groups == 1
        and conv.stride == conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
        and conv.padding == tuple(k // 2 for k in conv.kernel_size)
    )


def gelu_conv(x, conv):
    """conv(gelu(x)), a new tensor, as in gelu_convs, for a conv of get_3x3 or get_1x1."""
    if not is_plain_conv(conv):
        return conv(gelu(x)).clone()  # a hook may keep what it saw
    return gelu_convs(x, cast_for(x, conv.weight), cast_for(x, conv.bias))[0]


def conv_1x1(x, conv):
    """conv(x) of a conv of get_1x1, x (N, C, R, R), by the cheaper of two equal forms."""
    x = channels_last(x)
    return _conv(x, conv.weight, conv.bias) if is_plain_conv(conv) else conv(x)


# ---- the KL of two Gaussians ---------------------------------------------------------------


def _gaussian_kl(mu1, mu2, logsigma1, logsigma2):
    variances = 0.5 * (logsigma1.exp() ** 2 + (mu1 - mu2) ** 2) / logsigma2.exp() ** 2
    return -0.5 + logsigma2 - logsigma1 + variances


class _GaussianKL(torch.autograd.Function):
    """The KL of two Gaussians, which keeps its four inputs for the backward pass, not ten terms."""

    @staticmethod
    def forward(ctx, mu1, mu2, logsigma1, logsigma2):
        ctx.save_for_backward(mu1, mu2, logsigma1, logsigma2)
        return _gaussian_kl(mu1, mu2, logsigma1, logsigma2)

    @staticmethod
    def backward(ctx, grad):
        mu1, mu2, logsigma1, logsigma2 = ctx.saved_tensors
        variance1, variance2, difference = logsigma1.exp() ** 2, logsigma2.exp() ** 2, mu1 - mu2
        grad_mu1 = grad * difference / variance2
        grad_logsigma1 = grad * (variance1 / variance2 - 1)
        grad_logsigma2 = grad * (1 - (variance1 + difference**2) / variance2)
        return grad_mu1, -grad_mu1, grad_logsigma1, grad_logsigma2


def gaussian_kl(mu1, mu2, logsigma1, logsigma2):
    """vae_helpers.gaussian_analytical_kl, keeping four tensors for the backward pass, not ten."""
    function = _gaussian_kl if is_traced() else _GaussianKL.apply
    return function(mu1, mu2, logsigma1, logsigma2)


# ---- the posterior with the prior ----------------------------------------------------------

_activated = contextvars.ContextVar("(activations, their GELU) of the blocks in work", default=None)


@contextlib.contextmanager
def sharing_gelu(acts, activated):
    """In the body, gelu(acts) is `activated`: all blocks of a resolution share one."""
    token = _activated.set((acts, activated))
    try:
        yield
    finally:
        _activated.reset(token)


def _gelu_of(acts):
    shared = _activated.get()
    return shared[1] if shared is not None and shared[0] is acts else gelu(acts)


def _is_plain_block(block, kind):
    """Whether a Block, of class `kind`, may be computed by its weights, uncalled."""
    return is_plain(block, kind) and all(map(is_plain_conv, block.children()))


def posterior_and_prior(enc, prior, x, acts, n_latent, kind):
    """What enc(concat[x, acts]) and prior(x) give.

    Args:
        enc, prior: Blocks of 2 C → 2 Z channels, of C → 2 Z + C.
        x, acts: the state, the encoder's activations, each (N, C, R, R).
        n_latent: 2 Z.
        kind: the class of enc, prior: others are called.

    Returns:
        (q, p, merged): the statistics of the posterior, of the prior, each (N, 2 Z, R, R), in
        the state's dtype; the state with the prior's residual (N, C, R, R).
    """
    x = channels_last(x)
    if not (_is_plain_block(enc, kind) and _is_plain_block(prior, kind)):
        q = enc(torch.cat([x, channels_last(acts)], dim=1)).to(x.dtype).contiguous()
        return q, *_prior(prior, x, None, n_latent)
    # The posterior's c1 of concat[x, acts] is the sum of its halves: that of x shares the GELU with
    # the prior's c1, that of acts with all blocks of this resolution.
    w, b, enc_w, enc_b = (cast_for(x, t) for c in (prior.c1, enc.c1) for t in (c.weight, c.bias))
    w_x, w_acts = enc_w.split([x.shape[1], acts.shape[1]], dim=1)
    h, q = gelu_convs(x, w, b, w_x, enc_b)  # (N, middle, R, R)
    activated = _gelu_of(acts)
    q = enc.bottleneck(q + _conv(activated, w_acts.to(activated.dtype)))  # (N, middle, R, R)
    with without_autocast(q.device.type):  # few channels; in bf16 they would cost the KL its bits
        q = gelu_conv(q.to(x.dtype), enc.c4)  # (N, 2 Z, R, R)
    return q.contiguous(), *_prior(prior, x, h, n_latent)


def prior_alone(prior, x, n_latent, kind):
    """(p, merged) of posterior_and_prior, without a posterior."""
    x = channels_last(x)
    h = gelu_conv(x, prior.c1) if _is_plain_block(prior, kind) else None  # (N, middle, R, R)
    return _prior(prior, x, h, n_latent)


def _prior(prior, x, h, n_latent):
    """(p, merged) from prior.c1's output h (N, middle, R, R), or None where prior is called."""
    if h is None:
        p, residual = prior(x).split([n_latent, x.shape[1]], dim=1)
        merged = x + residual
    else:
        h = prior.bottleneck(h)  # (N, middle, R, R)
        w, b = cast_for(h, prior.c4.weight), cast_for(h, prior.c4.bias)
        p, residual = gelu_convs(h, w[:n_latent], b[:n_latent], w[n_latent:], b[n_latent:])
        merged = add_to_stream(x, residual)
    return p.to(x.dtype).contiguous(), merged


# ---- activation checkpointing --------------------------------------------------------------

# Blocks whose activations are computed anew together. More of them keep fewer inputs, and hold
# more at once in the backward pass.
SEGMENT = 3


def segments(layers):
    """Slices of up to SEGMENT consecutive blocks whose entries in parse_layer_string's are alike.

    So only a segment's last block can be the last at its resolution.
    """
    slices, start = [], 0
    for _, alike in itertools.groupby(layers):
        stop = start + len(list(alike))
        slices += [slice(i, min(i + SEGMENT, stop)) for i in range(start, stop, SEGMENT)]
        start = stop
    return slices


def checkpointed(on, function, *tensors):
    """function(*tensors); if `on`, keeping for the backward pass no more than the tensors."""
    if not on or not torch.is_grad_enabled():
        return function(*tensors)
    if is_drawn_before():  # no generator's state to keep and put back
        function = from_this_place(function)
        return checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False)
    return checkpoint(function, *tensors, use_reentrant=False)
