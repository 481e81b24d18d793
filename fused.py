"""The network's parts in less time or memory, each with the figures of its plain form.

Convolutions keep their input in place of its GELU, in the precision asked for and channels-last; of
small tensors they start fewer operators. `vae` calls what stands here; with a hook in it, another
class, or a transform of torch.func, a part is computed the plain way.

Shapes: N batch, C channels, R resolution, Z latent channels.
"""

import contextlib
import contextvars

import torch
from torch import nn
from torch.nn import functional as F

from precision import cast_for, compute_dtype, without_autocast

# ---- who runs this -------------------------------------------------------------------------


def is_transformed():
    """Whether torch.func works here, which takes no autograd.Function of the older kind."""
    return torch._C._are_functorch_transforms_active()


def is_traced():
    """Whether a transform of torch.func, a compiler or jit.trace reads this: for the plain form.

    A compiler chooses by itself what to keep for the backward pass.
    """
    return torch.compiler.is_compiling() or is_transformed() or torch._C._is_tracing()


# ---- layout --------------------------------------------------------------------------------


# Elements of a lone image up to which the CPU, that then takes no convolution of oneDNN's, is
# quicker with one channel after another, where no gradient is wanted: 48 → 12 channels of 32 x 32
# pixels 13 us in place of 23, 3 x 3 of 12 channels 46 in place of 72.
LONE = 2**17


def _is_lone(t):
    """Whether t is of one image, and to be computed as LONE says."""
    return (
        not torch.is_grad_enabled()
        and t.shape[0] == 1
        and t.numel() <= LONE
        and t.is_cpu
        and not torch.is_autocast_enabled("cpu")
        and not is_traced()
    )


def channels_last(t):
    """t (N, C, R, R), its channels side by side in memory: as convolutions here expect it.

    Where LONE says so, they expect it contiguous; a transform of torch.func knows no strides.
    """
    if is_transformed():
        return t
    return t.contiguous() if _is_lone(t) else t.contiguous(memory_format=torch.channels_last)


def add_to_stream(x, h):
    """x + h in x's dtype, written over h, a new tensor of gelu_conv's or gelu_convs'.

    On the CPU the pages of another tensor cost more than the sum. Where h is a view (of a small
    matrix product), writing over it costs autograd more.
    """
    if h.dtype != x.dtype:
        h = h.to(x.dtype)
    apart = is_traced() or h.shape != x.shape or h._is_view() and torch.is_grad_enabled()
    return x + h if apart else h.add_(x)


# Elements of a tensor below which a computation costs its start alone: the one of fewer operators
# is the cheaper one.
TINY = 2**14


def _is_cheap_uncut(x):
    """Whether blocks of x take the fewest operators; the posterior's has twice the channels."""
    return (x.numel() < TINY or 2 * x.numel() <= LONE and _is_lone(x)) and (
        compute_dtype(x) == x.dtype
    )


# ---- GELU with convolutions ----------------------------------------------------------------


# Elements below which GELU is quicker as PyTorch computes it than as oneDNN does, which computes
# that of contiguous tensors: of 768 elements 1 us in place of 8, of 24,576 15 of 17,
# of 49,152 28 of 26.
SMALL_GELU = 2**15


def _gelu(x):
    # On the CPU the contiguous view of a large tensor takes half the time of the strided one.
    return F.gelu(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def gelu(x):
    """Exact GELU of x (N, C, R, R), as channels_last has it, in the dtype of convolutions."""
    return _gelu_in(compute_dtype(x), x)


def _gelu_in(dtype, x):
    if x.dtype != dtype:
        x = x.to(dtype)
    if is_transformed():
        return F.gelu(x)
    if x.is_contiguous(memory_format=torch.channels_last):
        return F.gelu(x) if x.numel() < SMALL_GELU else _gelu(x)
    if x.size(0) == 1 and x.numel() < SMALL_GELU and x.device.type == "cpu":
        return _gelu(x)  # the strided view
    return channels_last(F.gelu(x))  # x itself is kept for the backward pass, not a copy


def _gelu_of_lone(x, over):
    """gelu(x) of a lone image, x (1, C, R, R) contiguous, written over it if `over`.

    Of views that are not contiguous PyTorch computes it itself, see SMALL_GELU.
    """
    if x.numel() >= SMALL_GELU:
        return F.gelu(x)
    if x.shape[2] == 1:  # of a pixel only those of a larger batch are such views
        return F.gelu(x.expand(2, -1, -1, -1))[:1]
    if not over:
        return F.gelu(x.mT).mT
    torch._C._nn.gelu_(x.mT)  # F.gelu's own; it has no public name
    return x


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
# elements) 891 → 641; but 16 of them 1270 → 1454.
SMALL_PRODUCT = 700_000
# Elements of one image above which PyTorch asks oneDNN for its convolution, where it has more than
# one thread: a rule of its own. Below it starts at once, of 64 → 16 channels of 8 x 8 pixels in 7
# us, and no product is quicker. Above, forward, two threads, in us: of 32 x 32 pixels 95 → 43,
# contiguous 167 → 41.
ONEDNN_ABOVE = 20_480


def _starts_onednn(x):
    """Whether a convolution of x on the CPU is oneDNN's, whose start a matrix product saves."""
    return x.size(0) > 1 or x.numel() > ONEDNN_ABOVE and torch.get_num_threads() > 1


def _conv(x, weight, bias=None, padding=0):
    """F.conv2d, but of equal forms of a 1x1 convolution the cheapest; x is as channels_last's."""
    if padding or weight.size(2) > 1 or x.is_cpu and not _starts_onednn(x):
        return F.conv2d(x, weight, bias, 1, padding)
    flat = weight.flatten(1)  # (out, in): so its gradient gets the weight's own strides
    if x.is_cpu and x.numel() * (1 + weight.size(0) / x.size(1)) <= SMALL_PRODUCT:
        if bias is not None and _is_lone(x):
            h = torch.addmm(bias[:, None], flat, x.flatten(2)[0])  # (out, R * R)
            return h.view(1, -1, *x.shape[2:])
        return F.linear(x.permute(0, 2, 3, 1), flat, bias).permute(0, 3, 1, 2)
    return F.conv2d(x, flat[:, :, None, None], bias)


def _gelu_convs(x, padding, *weights_and_biases, conv=_conv):
    a = gelu(x)
    if weights_and_biases[0].dtype != a.dtype:
        weights_and_biases = [t.to(a.dtype) for t in weights_and_biases]
    weights, biases = weights_and_biases[::2], weights_and_biases[1::2]
    return tuple([conv(a, w, b, padding=padding) for w, b in zip(weights, biases, strict=True)])


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
            if grad_weight[0] is not None and weight.shape[2:] == (1, 1):
                # Of the four strides that a channels-last convolution's gradient has, two are not
                # the weight's: DistributedDataParallel, for one, wants them.
                grad_weight[0] = grad_weight[0].flatten(1)[:, :, None, None]
            grad_weights += grad_weight
        if x_needed:
            x = x.permute(0, 2, 3, 1)  # (N, R, R, C), as in gelu
            grad_a = grad_a.permute(0, 2, 3, 1).reshape(x.shape)
            grad_a = torch.ops.aten.gelu_backward(grad_a, x).permute(0, 3, 1, 2)
        return grad_a, None, *grad_weights


# Elements an image, of all, and of a lone one, up to which a backward pass in Python costs too much
# for its memory: 0.15 to 0.25 ms a convolution. Of 8 images of cifar10, 6,144 elements each at 4x4
# pixels, it saves 2 MB an image; one image of photos32, 65,536, trains in 0.94 of the time.
SMALL, SMALL_BATCH, SMALL_LONE = 6_000, 2**15, 2**16


def _lean(x):
    """Whether convolutions of gelu(x) keep x alone."""
    n, batch = x.numel(), x.size(0)
    return (
        n > (max(SMALL_BATCH, SMALL * batch) if batch != 1 else SMALL_LONE)
        and torch.is_grad_enabled()  # without gradients nothing is kept
        and not is_traced()
    )


def gelu_convs(x, *weights_and_biases):
    """One output per pair of weight and bias: their convolutions of gelu(x), same resolution.

    x (N, C, R, R) is channels-last, as are the outputs. The kernels are 1x1 or 3x3, all alike.
    """
    padding = weights_and_biases[0].size(2) // 2
    return (_GeluConvs.apply if _lean(x) else _gelu_convs)(x, padding, *weights_and_biases)


def is_plain(module, kind):
    """Whether a call of `module` is its class's forward alone, which a fused one may replace.

    A hook, or a module put in its place, wants to be called. Hooks on all modules are a profiler's:
    it is to see what runs without it.
    """
    if type(module) is not kind:
        return False
    own = vars(module)
    return not (
        "forward" in own
        or own["_forward_pre_hooks"]
        or own["_forward_hooks"]
        or own["_backward_pre_hooks"]
        or own["_backward_hooks"]
    )


_SAME = {(k, k): (k // 2, k // 2) for k in (1, 3)}  # the padding that keeps the resolution


def plain_conv(conv):
    """(weight, bias) of a conv of which gelu_convs computes what a call would, else None."""
    if not is_plain(conv, nn.Conv2d):
        return None
    own = vars(conv)  # by attribute access it takes as long as a small convolution
    weight, bias = own["_parameters"].get("weight"), own["_parameters"].get("bias")
    plain = (
        weight is not None
        and bias is not None
        and own["groups"] == 1
        and own["stride"] == own["dilation"] == (1, 1)
        and own["padding_mode"] == "zeros"
        and own["padding"] == _SAME.get(own["kernel_size"])
    )
    return (weight, bias) if plain else None


def gelu_conv(x, conv):
    """conv(gelu(x)), a new tensor, as in gelu_convs, for a conv of get_3x3 or get_1x1."""
    plain = plain_conv(conv)
    if plain is None:
        return conv(gelu(x)).clone()  # a hook may keep what it saw
    (weight, bias), dtype = plain, compute_dtype(x)
    if weight.dtype != dtype:
        weight, bias = cast_for(x, weight), cast_for(x, bias)
    if _lean(x):
        return gelu_convs(x, weight, bias)[0]
    if weight.dtype != dtype:
        weight, bias = weight.to(dtype), bias.to(dtype)
    return _conv(_gelu_in(dtype, x), weight, bias, conv.padding[0])


def _gelu_conv_of_lone(x, conv, over):
    """gelu_conv of a lone image, GELU written over x if `over`, with as little between as can be.

    An evaluation of one of `digits` takes 0.82 of the time.
    """
    plain = plain_conv(conv)
    if plain is None or plain[0].dtype != x.dtype:
        return gelu_conv(x, conv)
    a = _gelu_of_lone(x, over)
    if a.numel() > ONEDNN_ABOVE:
        return _conv(a, *plain, conv.padding[0])
    return F.conv2d(a, *plain, 1, conv.padding)


def in_turn(x, *convs, residual=False):
    """x through convs one after another, each as gelu_conv; with residual, x plus that."""
    lone = _is_lone(x)
    h = x = x.contiguous() if lone else channels_last(x)
    for conv in convs:  # one's output is nobody else's: a hook has seen another tensor
        h = _gelu_conv_of_lone(h, conv, over=h is not x) if lone else gelu_conv(h, conv)
    return add_to_stream(x, h) if residual else h


def conv_1x1(x, conv):
    """conv(x) of a conv of get_1x1, x (N, C, R, R), by the cheaper of two equal forms."""
    x = channels_last(x)
    plain = plain_conv(conv)
    return _conv(x, *plain, conv.padding[0]) if plain else conv(x)


# ---- upsampling ----------------------------------------------------------------------------


def upsample(t, factor):
    """t (N, C, R, R) with each pixel repeated factor times in both directions."""
    if not torch.compiler.is_compiling():
        return F.interpolate(t, scale_factor=factor)
    # Of interpolate a compiler looks each pixel up, and sums its gradient one number at a time.
    n, c, h, w = t.shape
    t = t.permute(0, 2, 3, 1)[:, :, None, :, None].expand(-1, -1, factor, -1, factor, -1)
    return t.reshape(n, h * factor, w * factor, c).permute(0, 3, 1, 2)


# ---- the posterior with the prior ----------------------------------------------------------

_activated = contextvars.ContextVar("(activations, their GELU) in work", default=(None, None))


def shared_gelu(acts):
    """gelu(acts), or None where no block asks for it."""
    return None if _is_cheap_uncut(acts) else gelu(acts)


def sharing_gelu(acts, activated):
    """In the context, gelu(acts) is `activated`, if not None: blocks of a resolution share one.

    A compiler reads no context variables, and finds by itself what is computed twice.
    """
    if torch.compiler.is_compiling():
        return contextlib.nullcontext()
    return _sharing_gelu(acts, activated)


@contextlib.contextmanager
def _sharing_gelu(acts, activated):
    token = _activated.set((acts, activated))
    try:
        yield
    finally:
        _activated.reset(token)


def _gelu_of(acts):
    of, activated = (None, None) if torch.compiler.is_compiling() else _activated.get()
    return activated if of is acts and activated is not None else gelu(acts)


def _is_plain_block(block, kind):
    """Whether a Block, of class `kind`, may be computed by its weights, uncalled."""
    convs = [getattr(block, name, None) for name in ("c1", "c2", "c3", "c4")]
    return is_plain(block, kind) and all(map(plain_conv, convs)) and convs[0].padding == (0, 0)


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
    if _is_cheap_uncut(x) or not (_is_plain_block(enc, kind) and _is_plain_block(prior, kind)):
        q = enc(torch.cat([x, channels_last(acts)], dim=1)).to(x.dtype).contiguous()
        return q, *_prior(prior, x, None, n_latent)
    # The posterior's c1 of concat[x, acts] is the sum of its halves: that of x shares the GELU with
    # the prior's c1, that of acts with all blocks of this resolution.
    w, b, enc_w, enc_b = (cast_for(x, t) for c in (prior.c1, enc.c1) for t in (c.weight, c.bias))
    w_x, w_acts = enc_w.split([x.shape[1], acts.shape[1]], dim=1)
    h, q = gelu_convs(x, w, b, w_x, enc_b)  # (N, middle, R, R)
    activated = _gelu_of(acts)
    q = add_to_stream(q, _conv(activated, w_acts.to(activated.dtype)))  # (N, middle, R, R)
    q = enc.bottleneck(q)  # (N, middle, R, R)
    with without_autocast(q.device.type):  # few channels; in bf16 they would cost the KL its bits
        q = gelu_conv(q.to(x.dtype), enc.c4)  # (N, 2 Z, R, R)
    return q.contiguous(), *_prior(prior, x, h, n_latent)


def prior_alone(prior, x, n_latent, kind):
    """(p, merged) of posterior_and_prior, without a posterior."""
    x = channels_last(x)
    h = None if _is_cheap_uncut(x) or not _is_plain_block(prior, kind) else gelu_conv(x, prior.c1)
    return _prior(prior, x, h, n_latent)


def _prior(prior, x, h, n_latent):
    """(p, merged) from prior.c1's output h (N, middle, R, R), or None where prior is called."""
    if h is None:
        p, residual = prior(x).split([n_latent, x.shape[1]], dim=1)
        merged = x + residual
    else:
        sizes = [n_latent, x.shape[1]]
        h = prior.bottleneck(h)  # (N, middle, R, R)
        w, b = cast_for(h, prior.c4.weight), cast_for(h, prior.c4.bias)
        (w_p, w_x), (b_p, b_x) = w.split(sizes), b.split(sizes)
        p, residual = gelu_convs(h, w_p, b_p, w_x, b_x)
        merged = add_to_stream(x, residual)
    return p.to(x.dtype).contiguous(), merged
