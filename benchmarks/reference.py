"""The network written the plain way, to measure the project's own against.

NCHW, eager, every convolution on its own, nothing shared: section 3 of arXiv 2011.10650 read line
by line. It computes the figures of `vae.VAE` with the same weights and the same noise
(tests/test_fused.py).

Shapes as in vae.py.
"""

import copy
import math

import torch
from torch import nn
from torch.nn import functional as F

from image_sets import target_bits
from likelihood import sample_from_discretized_mix_logistic
from vae_helpers import draw_gaussian_diag_samples, gaussian_analytical_kl, log_prob_from_logits


def plain_mixture_loss(x, l, low_bit):
    """vae_helpers.discretized_mix_logistic_loss as autograd records it, tensor by tensor."""
    half_bin, log_half_levels = (1 / 31, math.log(15.5)) if low_bit else (1 / 255, math.log(127.5))
    channels = x.shape[-1]
    K = l.shape[-1] // {1: 3, 3: 10}[channels]
    logits, rest = l[..., :K], l[..., K:].reshape(*l.shape[:-1], channels, -1)
    means, log_scales, c = rest[..., :K], rest[..., K : 2 * K], rest[..., 2 * K :].tanh()
    log_scales = log_scales.clamp(min=-7.0)  # means, log_scales (N, R, R, channels, K)
    x = x.unsqueeze(-1)  # (N, R, R, channels, 1)
    if channels == 3:
        red, green = x[..., 0, :], x[..., 1, :]  # each (N, R, R, 1)
        means = torch.stack(
            (
                means[..., 0, :],
                means[..., 1, :] + c[..., 0, :] * red,
                means[..., 2, :] + c[..., 1, :] * red + c[..., 2, :] * green,
            ),
            dim=-2,
        )
    inv_scale = torch.exp(-log_scales)
    upper = inv_scale * (x - means + half_bin)
    lower = inv_scale * (x - means - half_bin)
    middle = inv_scale * (x - means)
    bin_mass = upper.sigmoid() - lower.sigmoid()
    log_mass = torch.where(
        bin_mass > 1e-5,
        bin_mass.clamp(min=1e-12).log(),
        middle - log_scales - 2 * F.softplus(middle) - log_half_levels,
    )
    log_probs = torch.where(
        x < -0.999,
        upper - F.softplus(upper),
        torch.where(x > 0.999, -F.softplus(lower), log_mass),
    )
    log_probs = log_probs.sum(dim=-2) + log_prob_from_logits(logits)  # (N, R, R, K)
    return -log_probs.logsumexp(dim=-1).sum(dim=(1, 2)) / x[0].numel()  # (N,)


def _conv(conv, x):
    return F.conv2d(x, conv.weight, conv.bias, padding=conv.padding)


def _block(block, x):
    h = _conv(block.c1, F.gelu(x))  # (N, middle, R, R)
    h = _conv(block.c2, F.gelu(h))
    h = _conv(block.c3, F.gelu(h))
    h = _conv(block.c4, F.gelu(h))  # (N, out, R, R)
    h = x + h if block.residual else h
    return h if block.down_rate is None else F.avg_pool2d(h, block.down_rate)


class PlainVAE(nn.Module):
    """The plain rendition of a vae.VAE: a copy of its weights, its forward and its samples."""

    def __init__(self, vae):
        super().__init__()
        self.vae = copy.deepcopy(vae).to(memory_format=torch.contiguous_format)

    def _encode(self, x):
        encoder = self.vae.encoder
        x = _conv(encoder.in_conv, x.permute(0, 3, 1, 2).contiguous())  # (N, H.width, R, R)
        activations = {x.shape[2]: x}
        for block in encoder.enc_blocks:
            x = _block(block, x)
            missing = encoder.widths[x.shape[2]] - x.shape[1]
            x = F.pad(x, (0, 0, 0, 0, 0, missing)) if missing else x  # (N, C, R, R)
            activations[x.shape[2]] = x
        return activations

    def _decode(self, n, activations=None, labels=None):
        """px_z (N, H.width, R, R) and a kl (N, Z, R, R) per block: none without activations."""
        decoder, kls = self.vae.decoder, []
        xs = {t.shape[2]: t.expand(n, -1, -1, -1) for t in decoder.bias_xs}
        for table in getattr(decoder, "label_xs", ()):
            known = torch.full((n,), -1) if labels is None else labels
            known = known.to(table.device)
            rows = F.embedding(known.clamp(min=0), table.flatten(1)).view(n, *table.shape[1:])
            xs[table.shape[2]] = xs[table.shape[2]] + rows * (known >= 0).view(-1, 1, 1, 1)
        for block in decoder.dec_blocks:
            res, width = block.base, block.widths[block.base]
            x = xs[res] if res in xs else decoder.gain.new_zeros(n, width, res, res)
            if block.mixin is not None:
                mixed = xs[block.mixin][:, :width]  # (N, C, S, S)
                x = x + F.interpolate(mixed, scale_factor=res // block.mixin)
            p = _block(block.prior, x)  # (N, 2 Z + C, R, R)
            pm, pv, residual = p.split([block.zdim, block.zdim, width], dim=1)
            if activations is None:
                z = draw_gaussian_diag_samples(pm, pv)  # (N, Z, R, R)
            else:
                q = _block(block.enc, torch.cat([x, activations[res]], dim=1))
                qm, qv = q.chunk(2, dim=1)  # each (N, Z, R, R)
                z = draw_gaussian_diag_samples(qm, qv)
                kls.append(gaussian_analytical_kl(qm, pm, qv, pv))
            x = x + residual + _conv(block.z_proj, z)
            xs[res] = _block(block.resnet, x)
        return xs[self.vae.H.image_size] * decoder.gain + decoder.bias, kls

    def _mixture(self, px_z):
        return _conv(self.vae.decoder.out_net.out_conv, px_z).permute(0, 2, 3, 1)  # (N, R, R, 10K)

    def forward(self, x, x_target, labels=None):
        px_z, kls = self._decode(len(x), self._encode(x), labels)
        low_bit = target_bits(self.vae.H.dataset) == 5
        distortion = plain_mixture_loss(x_target, self._mixture(px_z), low_bit)  # (N,)
        rate = sum(kl.sum(dim=(1, 2, 3)) for kl in kls) / x[0].numel()  # (N,)
        return {
            "elbo": (distortion + rate).mean(),
            "distortion": distortion.mean(),
            "rate": rate.mean(),
        }

    @torch.no_grad()
    def forward_uncond_samples(self, n_batch):
        px_z, _ = self._decode(n_batch)
        x = sample_from_discretized_mix_logistic(self._mixture(px_z), self.vae.H.num_mixtures)
        return ((x + 1) * 127.5).clamp(0, 255).to(torch.uint8).numpy(force=True)
