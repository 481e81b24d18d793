"""Stand-in for the original's `vae_helpers`: its formulas as plain, eager PyTorch.

A fork that keeps its own for a loss has an output layer whose methods take the published
arguments alone, from noise to targets.
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


def gaussian_analytical_kl(mu1, mu2, logsigma1, logsigma2):
    """Elementwise KL of N(mu1, exp(logsigma1)), the posterior, from the prior."""
    variances = 0.5 * (logsigma1.exp() ** 2 + (mu1 - mu2) ** 2) / logsigma2.exp() ** 2
    return -0.5 + logsigma2 - logsigma1 + variances


def draw_gaussian_diag_samples(mu, logsigma):
    """One normal draw from the default generator, of mu's shape."""
    eps = torch.empty(mu.shape, dtype=mu.dtype, device=mu.device).normal_()
    return logsigma.exp() * eps + mu


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
    conv = nn.Conv2d(in_dim, out_dim, kernel_size, stride, padding, groups=groups)
    if zero_bias:
        conv.bias.data.zero_()
    if zero_weights:
        conv.weight.data.zero_()
    return conv


def get_3x3(in_dim, out_dim, zero_bias=True, zero_weights=False, groups=1, scaled=False):
    return get_conv(in_dim, out_dim, 3, 1, 1, zero_bias, zero_weights, groups, scaled)


def get_1x1(in_dim, out_dim, zero_bias=True, zero_weights=False, groups=1, scaled=False):
    return get_conv(in_dim, out_dim, 1, 1, 0, zero_bias, zero_weights, groups, scaled)


class HModule(nn.Module):
    """Sets self.H, then calls self.build()."""

    def __init__(self, H):
        super().__init__()
        self.H = H
        self.build()


def log_prob_from_logits(x):
    return F.log_softmax(x, dim=-1)


def const_max(t, constant):
    return torch.max(t, torch.full_like(t, constant))


def const_min(t, constant):
    return torch.min(t, torch.full_like(t, constant))


def discretized_mix_logistic_loss(x, l, low_bit=False):
    """(N,) nats per dimension of x (N, H, W, 3) under the mixtures l (N, H, W, 10K)."""
    n, height, width, _ = x.shape
    k = l.shape[-1] // 10
    half_bin, half_levels = (1 / 31, 15.5) if low_bit else (1 / 255, 127.5)
    logits, rest = l[..., :k], l[..., k:].reshape(n, height, width, 3, 3 * k)
    means = rest[..., :k]
    log_scales = const_max(rest[..., k : 2 * k], -7.0)
    c = torch.tanh(rest[..., 2 * k :])
    x = x.unsqueeze(-1).expand(n, height, width, 3, k)
    red, green = x[..., 0, :], x[..., 1, :]
    means = torch.stack(
        [
            means[..., 0, :],
            means[..., 1, :] + c[..., 0, :] * red,
            means[..., 2, :] + c[..., 1, :] * red + c[..., 2, :] * green,
        ],
        dim=-2,
    )
    inv_scale = torch.exp(-log_scales)
    upper = inv_scale * (x - means + half_bin)
    lower = inv_scale * (x - means - half_bin)
    middle = inv_scale * (x - means)
    mass = torch.sigmoid(upper) - torch.sigmoid(lower)
    inner = torch.where(
        mass > 1e-5,
        torch.log(const_max(mass, 1e-12)),
        middle - log_scales - 2 * F.softplus(middle) - np.log(half_levels),
    )
    log_probs = torch.where(
        x < -0.999,
        upper - F.softplus(upper),
        torch.where(x > 0.999, -F.softplus(lower), inner),
    )
    log_probs = log_probs.sum(dim=3) + log_prob_from_logits(logits)
    return -log_probs.logsumexp(dim=-1).sum(dim=(1, 2)) / (height * width * 3)


def sample_from_discretized_mix_logistic(l, nr_mix):
    """(N, H, W, 3) in [-1, 1]; draws uniforms of (N, H, W, K), then of (N, H, W, 3)."""
    n, height, width, _ = l.shape
    logits, rest = l[..., :nr_mix], l[..., nr_mix:].reshape(n, height, width, 3, 3 * nr_mix)
    eps = torch.empty(logits.shape, device=l.device).uniform_(1e-5, 1 - 1e-5)
    chosen = torch.argmax(logits - torch.log(-torch.log(eps)), dim=-1)
    one_hot = F.one_hot(chosen, nr_mix).to(l.dtype).unsqueeze(3)  # (N, H, W, 1, K)
    means = (rest[..., :nr_mix] * one_hot).sum(dim=-1)
    log_scales = const_max((rest[..., nr_mix : 2 * nr_mix] * one_hot).sum(dim=-1), -7.0)
    c = (torch.tanh(rest[..., 2 * nr_mix :]) * one_hot).sum(dim=-1)
    u = torch.empty(means.shape, device=l.device).uniform_(1e-5, 1 - 1e-5)
    x = means + torch.exp(log_scales) * (torch.log(u) - torch.log(1 - u))

    def clip(t):
        return const_min(const_max(t, -1.0), 1.0)

    red = clip(x[..., 0])
    green = clip(x[..., 1] + c[..., 0] * red)
    blue = clip(x[..., 2] + c[..., 1] * red + c[..., 2] * green)
    return torch.stack([red, green, blue], dim=-1)


class DmolNet(nn.Module):
    def __init__(self, H):
        super().__init__()
        self.H = H
        self.width = H.width
        self.out_conv = get_1x1(H.width, H.num_mixtures * 10)

    def nll(self, px_z, x):
        low_bit = self.H.dataset == "ffhq_256"
        return discretized_mix_logistic_loss(x=x, l=self.forward(px_z), low_bit=low_bit)

    def forward(self, px_z):
        return self.out_conv(px_z).permute(0, 2, 3, 1)

    def sample(self, px_z):
        x = sample_from_discretized_mix_logistic(self.forward(px_z), self.H.num_mixtures)
        levels = np.clip((x.detach().cpu().numpy() + 1) * 127.5, 0, 255)
        return levels.astype(np.uint8)
