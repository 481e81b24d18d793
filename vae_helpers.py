"""The mathematics under the network: Gaussians, convolutions, the discretized mixture of logistics.

Shapes: N batch, C channels, R resolution, Z latent channels, K logistics in the mixture.
Networks compute in NCHW; images and mixture parameters are NHWC.
"""

import contextlib
import math

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from hps import target_bits


def nats_to_bits(nats):
    """Bits per dimension from nats per dimension."""
    return nats / math.log(2)


# ---- noise ---------------------------------------------------------------------------------


def fill_noise(shape, like, fill, generators=None):
    """A contiguous tensor of the given shape, filled by fill(tensor, generator=...).

    The numbers come from the default generator of `like`'s device, or, where `generators` holds
    one CPU generator per row, row i from generators[i]: such noise belongs to its image, whatever
    the batch or the device.
    """
    if generators is None:
        return fill(torch.empty(shape, dtype=like.dtype, device=like.device))
    assert len(generators) == shape[0]
    rows = [fill(torch.empty(shape[1:], dtype=like.dtype), generator=g) for g in generators]
    return torch.stack(rows).to(like.device)


def _uniform(t, generator=None):
    return t.uniform_(1e-5, 1 - 1e-5, generator=generator)  # its logarithms are finite


# ---- Gaussians -----------------------------------------------------------------------------


class _GaussianKL(torch.autograd.Function):
    """The KL of two Gaussians, which keeps its four inputs for the backward pass, not ten terms."""

    @staticmethod
    def forward(ctx, mu1, mu2, logsigma1, logsigma2):
        ctx.save_for_backward(mu1, mu2, logsigma1, logsigma2)
        variances = 0.5 * (logsigma1.exp() ** 2 + (mu1 - mu2) ** 2) / logsigma2.exp() ** 2
        return -0.5 + logsigma2 - logsigma1 + variances

    @staticmethod
    def backward(ctx, grad):
        mu1, mu2, logsigma1, logsigma2 = ctx.saved_tensors
        variance1, variance2, difference = logsigma1.exp() ** 2, logsigma2.exp() ** 2, mu1 - mu2
        grad_mu1 = grad * difference / variance2
        grad_logsigma1 = grad * (variance1 / variance2 - 1)
        grad_logsigma2 = grad * (1 - (variance1 + difference**2) / variance2)
        return grad_mu1, -grad_mu1, grad_logsigma1, grad_logsigma2


def gaussian_analytical_kl(mu1, mu2, logsigma1, logsigma2):
    """Elementwise KL(N(mu1, e^logsigma1) || N(mu2, e^logsigma2)) in nats: posterior 1, prior 2."""
    return _GaussianKL.apply(mu1, mu2, logsigma1, logsigma2)


def draw_gaussian_diag_samples(mu, logsigma, generators=None):
    """One sample of N(mu, e^logsigma), by reparameterization; `generators` as in fill_noise."""
    eps = fill_noise(mu.shape, mu, torch.Tensor.normal_, generators)
    return logsigma.exp() * eps + mu


# ---- convolutions --------------------------------------------------------------------------


def get_conv(
    in_dim,
    out_dim,
    kernel_size,
    stride,
    padding,
    zero_bias=True,
    zero_weights=False,
    groups=1,
    scaled=False,
):
    """nn.Conv2d with its default initialisation, then bias and, if asked, weights set to 0.

    scaled has no effect, as in the original.
    """
    conv = nn.Conv2d(in_dim, out_dim, kernel_size, stride, padding, groups=groups)
    if zero_bias:
        nn.init.zeros_(conv.bias)
    if zero_weights:
        nn.init.zeros_(conv.weight)
    return conv


def get_3x3(in_dim, out_dim, zero_bias=True, zero_weights=False, groups=1, scaled=False):
    """get_conv of kernel 3 that keeps the resolution."""
    return get_conv(in_dim, out_dim, 3, 1, 1, zero_bias, zero_weights, groups, scaled)


def get_1x1(in_dim, out_dim, zero_bias=True, zero_weights=False, groups=1, scaled=False):
    """get_conv of kernel 1."""
    return get_conv(in_dim, out_dim, 1, 1, 0, zero_bias, zero_weights, groups, scaled)


def compute_dtype(x):
    """What convolutions of x compute in: autocast's dtype where it is on, else x's own."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def in_float32(device):
    """The context of what stays in its inputs' own precision under autocast."""
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


def _gelu(x):
    # On the CPU the contiguous view takes half the time of the strided one.
    return F.gelu(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def gelu(x):
    """Exact GELU of a channels-last x (N, C, R, R), in the dtype that convolutions compute in."""
    return _gelu(x.to(compute_dtype(x)))


def _folded(t, padding):
    """t (N, C, R, R) as images of 16 x 16 where a 1x1 convolution is to see it.

    It is none the wiser, and on the CPU the gradient of its weights takes two thirds of the time.
    """
    if padding or t.shape[2] * t.shape[3] % 256:
        return t
    return t.permute(0, 2, 3, 1).reshape(-1, 16, 16, t.shape[1]).permute(0, 3, 1, 2)


def _gelu_convs(x, padding, *weights_and_biases):
    a = gelu(x)
    w = [t.to(a.dtype) for t in weights_and_biases]
    return tuple(F.conv2d(a, *wb, padding=padding) for wb in zip(w[::2], w[1::2], strict=True))


class _GeluConvs(torch.autograd.Function):
    """Convolutions of gelu(x), which keep x for the backward pass and compute gelu(x) anew."""

    @staticmethod
    def forward(ctx, x, padding, *weights_and_biases):
        x = x.to(compute_dtype(x))
        ctx.padding = padding
        ctx.save_for_backward(x, *weights_and_biases[::2])
        return _gelu_convs(x, padding, *weights_and_biases)

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
    # Without gradients nothing is kept; a compiler chooses by itself what to keep.
    lean = torch.is_grad_enabled() and not torch.compiler.is_compiling() and x[0].numel() >= SMALL
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
    return type(module) is kind and not any(hooks)


def gelu_conv(x, conv):
    """conv(gelu(x)), a new tensor, as in gelu_convs, for a conv of get_3x3 or get_1x1."""
    if not is_plain(conv, nn.Conv2d):
        return conv(gelu(x)).clone()  # a hook may keep what it saw
    return gelu_convs(x, conv.weight, conv.bias)[0]


class HModule(nn.Module):
    """A module made from hyperparameters: sets self.H, then calls self.build()."""

    def __init__(self, H):
        super().__init__()
        self.H = H
        self.build()


# ---- discretized mixture of logistics (PixelCNN++, Salimans et al. 2017, section 2.1) ---------


def log_prob_from_logits(x):
    """Log-softmax over the last axis."""
    return F.log_softmax(x, dim=-1)


def const_max(t, constant):
    """Elementwise maximum of a tensor and a number."""
    return t.clamp(min=constant)


def const_min(t, constant):
    """Elementwise minimum of a tensor and a number."""
    return t.clamp(max=constant)


def _mixture_parameters(l, nr_mix):
    """Splits l (N, H, W, 10K) into logits (N, H, W, K) and means, log scales, coefficients.

    The last three are (N, H, W, 3, K). In `coefficients`, row 0 ties green to red, rows 1 and 2
    tie blue to red and green.
    """
    logits, rest = l[..., :nr_mix], l[..., nr_mix:]
    rest = rest.reshape(*l.shape[:-1], 3, 3 * nr_mix)
    means, log_scales, coefficients = rest.split(nr_mix, dim=-1)
    # e^-7 is about 1/9 of a bin of 8 bits: sharper is no likelier, and overflows.
    return logits, means, const_max(log_scales, -7.0), coefficients.tanh()


def _pixel_log_likelihood(x, l, low_bit):
    """Log-likelihood (P,) of pixels x (P, 3) under their mixtures l (P, 10K), in nats."""
    half_bin, log_half_levels = (1 / 31, math.log(15.5)) if low_bit else (1 / 255, math.log(127.5))
    # Beyond this the sums below would overflow, and inf - inf is no number.
    l = l.clamp(-1e25, 1e25)
    logits, means, log_scales, coefficients = _mixture_parameters(l, l.shape[-1] // 10)
    x = x.unsqueeze(-1)  # (P, 3, 1)
    red, green = x[:, 0], x[:, 1]  # (P, 1)
    means = torch.stack(
        (
            means[:, 0],
            means[:, 1] + coefficients[:, 0] * red,
            means[:, 2] + coefficients[:, 1] * red + coefficients[:, 2] * green,
        ),
        dim=1,
    )  # (P, 3, K)
    inv_scale = torch.exp(-log_scales)
    upper = inv_scale * (x - means + half_bin)
    lower = inv_scale * (x - means - half_bin)
    middle = inv_scale * (x - means)
    bin_mass = upper.sigmoid() - lower.sigmoid()
    # The gradient of a selection is finite only where both of its branches are: hence the clamp.
    log_mass = torch.where(
        bin_mass > 1e-5,
        bin_mass.clamp(min=1e-12).log(),
        middle - log_scales - 2 * F.softplus(middle) - log_half_levels,  # density times bin width
    )
    log_probs = torch.where(
        x < -0.999,
        upper - F.softplus(upper),  # level 0 takes all mass below it
        torch.where(x > 0.999, -F.softplus(lower), log_mass),  # level 255 all above
    )
    log_probs = log_probs.sum(dim=1) + log_prob_from_logits(logits)  # (P, K)
    return log_probs.logsumexp(dim=-1)


class _PixelLogLikelihood(torch.autograd.Function):
    """_pixel_log_likelihood and its gradient in one pass, a part of the pixels at a time.

    Some thirty tensors of 3K a pixel are then alive for that part only.
    """

    @staticmethod
    def forward(ctx, x, l, low_bit):
        inputs = x, l
        ctx.needed = [i for i in (0, 1) if ctx.needs_input_grad[i]]
        grads, values = [torch.empty_like(inputs[i]) for i in ctx.needed], []
        size = -(-len(x) // PARTS)
        for start in range(0, len(x), size):
            rows = slice(start, start + size)
            part = [t[rows].detach() for t in inputs]
            with torch.set_grad_enabled(bool(ctx.needed)):
                wanted = [part[i].requires_grad_() for i in ctx.needed]
                value = _pixel_log_likelihood(*part, low_bit)  # (size,)
                if wanted:
                    found = torch.autograd.grad(value.sum(), wanted)
                    for grad, part_grad in zip(grads, found, strict=True):
                        grad[rows] = part_grad
            values.append(value.detach())
        ctx.save_for_backward(*grads)
        return torch.cat(values)  # (P,)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grads = dict(zip(ctx.needed, ctx.saved_tensors, strict=True))
        return *(grad[:, None] * grads[i] if i in grads else None for i in (0, 1)), None


# In as many parts, the mixture's loss needs less than 3 times the memory of its inputs.
PARTS = 20


def discretized_mix_logistic_loss(x, l, low_bit=False):
    """Negative log-likelihood of images under the mixture.

    At 5 bits the targets sit at 8k/127.5 - 1 while the bins assume 2k/31 - 1, so the
    probabilities of the 32 levels do not sum to 1 (1.028 per sub-pixel for narrow components,
    below 1 for wide ones). The published 0.4232 nats of FFHQ-256 depends on it.

    Args:
        x: targets (N, H, W, 3) in [-1, 1].
        l: mixture parameters (N, H, W, 10K).
        low_bit: bins of 5 bits instead of 8.

    Returns:
        (N,), nats per dimension.
    """
    if not torch.is_grad_enabled():
        x, l = x.detach(), l.detach()  # no gradient beside the value
    pixels = x.reshape(-1, 3), l.reshape(-1, l.shape[-1])  # (N H W, 3) and (N H W, 10K)
    log_likelihood = _PixelLogLikelihood.apply(*pixels, low_bit).view(len(x), -1).sum(dim=1)
    return -log_likelihood / x[0].numel()


def sample_from_discretized_mix_logistic(l, nr_mix, generators=None):
    """One image per row of l (N, H, W, 10K): (N, H, W, 3) in [-1, 1]; generators as in fill_noise.

    Draws uniforms of (N, H, W, K), which choose the component by Gumbel-max, then of
    (N, H, W, 3).
    """
    logits, means, log_scales, coefficients = _mixture_parameters(l, nr_mix)
    u = fill_noise(logits.shape, l, _uniform, generators)  # (N, H, W, K)
    component = (logits - torch.log(-torch.log(u))).argmax(dim=-1)  # (N, H, W)
    index = component[..., None, None].expand(*component.shape, 3, 1)
    mean, log_scale, c = (
        t.gather(-1, index).squeeze(-1) for t in (means, log_scales, coefficients)
    )  # each (N, H, W, 3)
    u = fill_noise(mean.shape, l, _uniform, generators)  # (N, H, W, 3)
    x = mean + log_scale.exp() * (torch.log(u) - torch.log(1 - u))
    red = x[..., 0].clamp(-1, 1)
    green = (x[..., 1] + c[..., 0] * red).clamp(-1, 1)
    blue = (x[..., 2] + c[..., 1] * red + c[..., 2] * green).clamp(-1, 1)
    return torch.stack((red, green, blue), dim=-1)


def mean_of_discretized_mix_logistic(l, nr_mix):
    """The mean of the mixture of each pixel of l (N, H, W, 10K): (N, H, W, 3) in [-1, 1].

    That of the components' own means, clipped level by level as samples are.
    """
    logits, means, _, c = _mixture_parameters(l, nr_mix)
    red = means[..., 0, :].clamp(-1, 1)
    green = (means[..., 1, :] + c[..., 0, :] * red).clamp(-1, 1)
    blue = (means[..., 2, :] + c[..., 1, :] * red + c[..., 2, :] * green).clamp(-1, 1)
    components = torch.stack((red, green, blue), dim=-2)  # (N, H, W, 3, K)
    return (components * logits.softmax(dim=-1).unsqueeze(-2)).sum(dim=-1)


class DmolNet(nn.Module):
    """The output layer: a 1x1 convolution to the mixture's parameters, its loss and its samples."""

    def __init__(self, H):
        super().__init__()
        self.H = H
        self.width = H.width
        self.out_conv = get_1x1(H.width, H.num_mixtures * 10)

    def forward(self, px_z):
        """px_z (N, C, R, R) → mixture parameters (N, R, R, 10K)."""
        with in_float32(px_z.device.type):  # the likelihood's inputs are float32
            return self.out_conv(px_z).permute(0, 2, 3, 1)

    def nll(self, px_z, x):
        """Distortion (N,) of targets x (N, R, R, 3) in [-1, 1], nats per dimension."""
        low_bit = target_bits(self.H.dataset) == 5
        return discretized_mix_logistic_loss(x=x, l=self.forward(px_z), low_bit=low_bit)

    @torch.no_grad()
    def sample(self, px_z, generators=None, mean=False, as_float=False):
        """One image per row of px_z: numpy uint8 (N, R, R, 3); generators as in fill_noise.

        With mean, the mixture's mean in place of a sample, without noise; with as_float, numpy
        float32 in [-1, 1] in place of the 256 levels.
        """
        l, nr_mix = self.forward(px_z), self.H.num_mixtures
        if mean:
            x = mean_of_discretized_mix_logistic(l, nr_mix)
        else:
            x = sample_from_discretized_mix_logistic(l, nr_mix, generators)
        if as_float:
            return x.float().cpu().numpy()
        # Truncated, not rounded: the published samples are.
        return ((x + 1) * 127.5).clamp(0, 255).to(torch.uint8).cpu().numpy()
