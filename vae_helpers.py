"""The mathematics under the network: Gaussians, convolutions, the output layer.

Shapes: N batch, C channels, R resolution, Z latent channels, K logistics in the mixture.
Networks compute in NCHW; images and mixture parameters are NHWC.
"""

import torch
from torch import nn
from torch.nn import functional as F

from fused import conv_1x1, is_traced
from image_sets import channels_of, target_bits
from likelihood import (
    discretized_mix_logistic_loss,
    mean_of_discretized_mix_logistic,
    n_parameters,
    sample_from_discretized_mix_logistic,
)
from noise import fill_noise
from precision import without_autocast

# ---- Gaussians -----------------------------------------------------------------------------


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


def gaussian_analytical_kl(mu1, mu2, logsigma1, logsigma2):
    """Elementwise KL(N(mu1, e^logsigma1) || N(mu2, e^logsigma2)) in nats: posterior 1, prior 2."""
    keep = torch.is_grad_enabled() and not is_traced()
    return (_GaussianKL.apply if keep else _gaussian_kl)(mu1, mu2, logsigma1, logsigma2)


def draw_gaussian_diag_samples(mu, logsigma):
    """One sample of N(mu, e^logsigma), by reparameterization."""
    eps = fill_noise(mu.shape, mu, torch.Tensor.normal_)
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


class HModule(nn.Module):
    """A module made from hyperparameters: sets self.H, then calls self.build()."""

    def __init__(self, H):
        super().__init__()
        self.H = H
        self.build()


# ---- the output layer ----------------------------------------------------------------------


def log_prob_from_logits(x):
    """Log-softmax over the last axis."""
    return F.log_softmax(x, dim=-1)


def const_max(t, constant):
    """Elementwise maximum of a tensor and a number."""
    return t.clamp(min=constant)


def const_min(t, constant):
    """Elementwise minimum of a tensor and a number."""
    return t.clamp(max=constant)


class DmolNet(nn.Module):
    """The output layer: a 1x1 convolution to the mixture's parameters, its loss and its samples."""

    def __init__(self, H):
        super().__init__()
        self.H = H
        self.width = H.width
        self.out_conv = get_1x1(H.width, H.num_mixtures * n_parameters(channels_of(H)))

    def forward(self, px_z):
        """px_z (N, C, R, R) → mixture parameters (N, R, R, 10K), of grey images (N, R, R, 3K)."""
        with without_autocast(px_z.device.type):  # for the likelihood
            return conv_1x1(px_z, self.out_conv).permute(0, 2, 3, 1)

    def nll(self, px_z, x):
        """Distortion (N,) of targets x (N, R, R, c) in [-1, 1], nats per dimension."""
        if x.shape[-1] != channels_of(self.H):
            raise ValueError(
                f"targets have {x.shape[-1]} channels; image_channels is {channels_of(self.H)}"
            )
        low_bit = target_bits(self.H.dataset) == 5
        return discretized_mix_logistic_loss(x=x, l=self.forward(px_z), low_bit=low_bit)

    @torch.no_grad()
    def sample(self, px_z, mean=False, as_float=False):
        """One image per row of px_z: numpy uint8 (N, R, R, 3), of grey ones (N, R, R, 1).

        With mean, the mixture's mean in place of a sample, without noise; with as_float, numpy
        float32 in [-1, 1] in place of the 256 levels.
        """
        l, nr_mix = self.forward(px_z), self.H.num_mixtures
        if mean:
            x = mean_of_discretized_mix_logistic(l, nr_mix)
        else:
            x = sample_from_discretized_mix_logistic(l, nr_mix)
        if as_float:
            return x.float().cpu().numpy()
        # Truncated, not rounded: the published samples are.
        return ((x + 1) * 127.5).clamp(0, 255).to(torch.uint8).cpu().numpy()
