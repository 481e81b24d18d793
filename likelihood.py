"""The discretized mixture of logistics (PixelCNN++, Salimans et al. 2017, section 2.1).

Shapes: N batch, K logistics in the mixture, P pixels; images and parameters are (N, H, W, ...), of
three channels and 10K parameters a pixel, or of one and 3K.
"""

import math

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fused import is_traced
from noise import fill_noise
from precision import at_least_float32


def n_parameters(channels):
    """Parameters of each of the K logistics of a pixel: 10 for three channels, 3 for one.

    A logit; a mean and a log scale a channel; the coefficients that tie each channel to those
    before it.
    """
    return 1 + 2 * channels + channels * (channels - 1) // 2


def _mixture_parameters(l, nr_mix):
    """Splits l into logits (..., K) and means, log scales, coefficients.

    Of three channels, l (..., 10K), the last three are (..., 3, K): in `coefficients`, row 0 ties
    green to red, rows 1 and 2 tie blue to red and green. Of one, l (..., 3K), means and log scales
    are (..., 1, K), coefficients (..., 1, 0).
    """
    logits, rest = l[..., :nr_mix], l[..., nr_mix:]
    sizes = {n_parameters(channels) * nr_mix: channels for channels in (1, 3)}
    if l.shape[-1] not in sizes:
        raise ValueError(f"{l.shape[-1]} parameters a pixel are none of {nr_mix} logistics")
    channels = sizes[l.shape[-1]]
    of_channel = rest.shape[-1] // channels  # 3K or 2K
    rest = rest.reshape(*l.shape[:-1], channels, of_channel)
    means, log_scales, coefficients = rest.tensor_split((nr_mix, 2 * nr_mix), dim=-1)
    # e^-7 is about 1/9 of a bin of 8 bits: sharper is no likelier, and overflows.
    return logits, means, log_scales.clamp(min=-7.0), coefficients.tanh()


def _tied(values, coefficients, levels=None):
    """Each channel's values plus what the levels of the channels before tell of it.

    Args:
        values: a list of one tensor a channel.
        coefficients: a list of the rows of _mixture_parameters'.
        levels: a list of one tensor a channel; None: those found here, clipped to [-1, 1].
    """
    tied, row = [], 0
    for channel, value in enumerate(values):
        for before in (tied if levels is None else levels)[:channel]:
            value = value + coefficients[row] * before
            row += 1
        tied.append(value.clamp(-1, 1) if levels is None else value)
    return tied


def _pixel_log_likelihood(x, l, low_bit):
    """Log-likelihood (P,) of pixels x (P, c) of c channels under their mixtures l, in nats.

    l is (P, 10K) for three channels, (P, 3K) for one.
    """
    half_bin, log_half_levels = (1 / 31, math.log(15.5)) if low_bit else (1 / 255, math.log(127.5))
    # Beyond this the sums below would overflow, and inf - inf is no number.
    l = l.clamp(-1e25, 1e25)
    nr_mix = l.shape[-1] // n_parameters(x.shape[-1])
    logits, means, log_scales, coefficients = _mixture_parameters(l, nr_mix)
    x = x.unsqueeze(-1)  # (P, c, 1)
    means = torch.stack(_tied(means.unbind(1), coefficients.unbind(1), x.unbind(1)), dim=1)
    inv_scale = torch.exp(-log_scales)  # as the means, (P, c, K)
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
    log_probs = log_probs.sum(dim=1) + F.log_softmax(logits, dim=-1)  # (P, K)
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
        size = max(1, -(-len(x) // _n_parts(*inputs)))
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
        return torch.cat(values) if values else l.new_zeros(0)  # (P,)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grads = dict(zip(ctx.needed, ctx.saved_tensors, strict=True))
        return *(grad[:, None] * grads[i] if i in grads else None for i in (0, 1)), None


# Bytes of the inputs of a part. One whole needs some 6 times its inputs beside them, and ten parts
# or more only the gradient: with four, less than 3 times as much. On the CPU a part starts some
# 100 operators, for 0.5 to 0.9 ms of one core; with those of 1 MiB, which stay in its cache, 16
# images of photos32 took 39 ms in place of 45 in 20 parts (81 in 80, 49 in one), 32 of digits 3.4
# in place of 12.4.
PART_BYTES = {"cpu": 2**20}
# On a GPU starting an operator takes as long as it computes at some 10 MB (5 us at 2 TB/s, three
# tensors of a third of that each read or written): at three times that, starts are no matter.
PART_BYTES_ELSEWHERE = 2**25
# Bytes of the inputs up to which autograd may keep all that it wants, some six times as much, for
# a fifth less time: 4 KB, an image of digits, 0.93 ms in place of 1.21; 66 KB 1.81 of 2.24.
KEPT_BYTES = 2**16


def _n_parts(*inputs):
    """In how many parts the likelihood of pixels is computed."""
    n_bytes = sum(t.nbytes for t in inputs)
    return max(1, -(-n_bytes // PART_BYTES.get(inputs[0].device.type, PART_BYTES_ELSEWHERE)))


def _is_whole(*inputs):
    """Whether the likelihood of pixels is computed as any function, with autograd's gradient."""
    if is_traced():
        return True
    if torch.is_grad_enabled():
        return sum(t.nbytes for t in inputs) <= KEPT_BYTES
    return _n_parts(*inputs) == 1


def discretized_mix_logistic_loss(x, l, low_bit=False):
    """Negative log-likelihood of images under the mixture.

    At 5 bits the targets sit at 8k/127.5 - 1 while the bins assume 2k/31 - 1, so the
    probabilities of the 32 levels do not sum to 1 (1.028 per sub-pixel for narrow components,
    below 1 for wide ones). The published 0.4232 nats of FFHQ-256 depends on it.

    Args:
        x: targets (N, H, W, 3), or (N, H, W, 1), in [-1, 1].
        l: mixture parameters (N, H, W, 10K), or (N, H, W, 3K).
        low_bit: bins of 5 bits instead of 8.

    Returns:
        (N,), nats per dimension.

    Raises:
        ValueError: for channels and parameters that do not fit.
    """
    if x.shape[-1] not in (1, 3) or l.shape[-1] % n_parameters(x.shape[-1]):
        raise ValueError(
            f"targets of {x.shape[-1]} channels, mixtures of {l.shape[-1]} parameters: a pixel has "
            f"10K for three channels, 3K for one"
        )
    x, l = at_least_float32(x), at_least_float32(l)
    pixels = x.reshape(-1, x.shape[-1]), l.reshape(-1, l.shape[-1])  # (N H W, 3), (N H W, 10K)
    if not torch.is_grad_enabled():
        pixels = [t.detach() for t in pixels]  # no gradient beside the value
    function = _pixel_log_likelihood if _is_whole(*pixels) else _PixelLogLikelihood.apply
    log_likelihood = function(*pixels, low_bit).view(x.shape[:-1])  # (N, H, W)
    return -log_likelihood.flatten(1).sum(dim=1) / x.shape[1:].numel()


def _uniform(t, generator=None):
    return t.uniform_(1e-5, 1 - 1e-5, generator=generator)  # its logarithms are finite


def sample_from_discretized_mix_logistic(l, nr_mix):
    """One image per row of l (N, H, W, 10K): (N, H, W, 3) in [-1, 1]; of (N, H, W, 3K) grey ones.

    Draws uniforms of (N, H, W, K), which choose the component by Gumbel-max, then of the image's
    shape.
    """
    logits, means, log_scales, coefficients = _mixture_parameters(at_least_float32(l), nr_mix)
    u = fill_noise(logits.shape, logits, _uniform)  # (N, H, W, K)
    component = (logits - torch.log(-torch.log(u))).argmax(dim=-1)  # (N, H, W)
    index = component[..., None, None].expand(*means.shape[:-1], 1)
    mean, log_scale = (t.gather(-1, index).squeeze(-1) for t in (means, log_scales))
    # Each is (N, H, W, 3).
    c = coefficients.gather(-1, index).unbind(-2) if coefficients.shape[-1] else ()
    u = fill_noise(mean.shape, mean, _uniform)  # (N, H, W, 3)
    x = mean + log_scale.exp() * (torch.log(u) - torch.log(1 - u))
    return torch.stack(_tied(x.unbind(-1), [row.squeeze(-1) for row in c]), dim=-1)


def mean_of_discretized_mix_logistic(l, nr_mix):
    """The mean of the mixture of each pixel of l (N, H, W, 10K): (N, H, W, 3) in [-1, 1].

    That of the components' own means, clipped level by level as samples are; (N, H, W, 1) of grey
    images' (N, H, W, 3K).
    """
    logits, means, _, c = _mixture_parameters(at_least_float32(l), nr_mix)
    components = torch.stack(_tied(means.unbind(-2), c.unbind(-2)), dim=-2)  # (N, H, W, 3, K)
    return (components * logits.softmax(dim=-1).unsqueeze(-2)).sum(dim=-1)
