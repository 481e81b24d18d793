"""Stand-in for the original's `vae`: the network with the published methods and arguments alone.

As in the original, what a decoder takes its last steps by are functions that hold the module they
were made in: a deepcopied model uses the gain, bias and z_proj of the one it was copied from.
"""

import itertools
import re
from collections import defaultdict

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from vae_helpers import (
    DmolNet,
    HModule,
    draw_gaussian_diag_samples,
    gaussian_analytical_kl,
    get_1x1,
    get_3x3,
)


def parse_layer_string(s):
    """A list of (resolution, None or the resolution mixed in or the pooling rate)."""
    layers = []
    for token in s.split(","):
        resolution, kind, number = re.fullmatch(r"(\d+)([xmd]?)(\d*)", token).groups()
        if kind == "x":
            layers += [(int(resolution), None)] * int(number)
        else:
            layers.append((int(resolution), int(number) if kind else None))
    return layers


def get_width_settings(width, s):
    """Resolution → width: as s ("R:width,R:width") names it, else `width`."""
    widths = defaultdict(lambda: width)
    for pair in s.split(",") if s else ():
        resolution, named = pair.split(":")
        widths[int(resolution)] = int(named)
    return widths


def pad_channels(t, width):
    """t (N, C, R, R) with zero channels at the end, `width` in all."""
    if t.shape[1] > width:
        raise ValueError(f"{t.shape[1]} channels do not fit a width of {width}")
    padded = torch.zeros(t.shape[0], width, *t.shape[2:], dtype=t.dtype, device=t.device)
    padded[:, : t.shape[1]] = t
    return padded


class Block(nn.Module):
    def __init__(
        self,
        in_width,
        middle_width,
        out_width,
        down_rate=None,
        residual=False,
        use_3x3=True,
        zero_last=False,
    ):
        super().__init__()
        self.down_rate = down_rate
        self.residual = residual
        self.c1 = get_1x1(in_width, middle_width)
        self.c2 = (get_3x3 if use_3x3 else get_1x1)(middle_width, middle_width)
        self.c3 = (get_3x3 if use_3x3 else get_1x1)(middle_width, middle_width)
        self.c4 = get_1x1(middle_width, out_width, zero_weights=zero_last)

    def forward(self, x):
        h = x
        for conv in (self.c1, self.c2, self.c3, self.c4):
            h = conv(F.gelu(h))
        if self.residual:
            h = x + h
        if self.down_rate is not None:
            h = F.avg_pool2d(h, kernel_size=self.down_rate, stride=self.down_rate)
        return h


class Encoder(HModule):
    def build(self):
        H = self.H
        self.in_conv = get_3x3(H.image_channels, H.width)
        self.widths = get_width_settings(H.width, H.custom_width_str)
        self.enc_blocks = nn.ModuleList()
        for resolution, down_rate in parse_layer_string(H.enc_blocks):
            width = self.widths[resolution]
            middle = int(width * H.bottleneck_multiple)
            block = Block(width, middle, width, down_rate, residual=True, use_3x3=resolution > 2)
            self.enc_blocks.append(block)
        for block in self.enc_blocks:
            block.c4.weight.data *= np.sqrt(1 / len(self.enc_blocks))

    def forward(self, x):
        x = self.in_conv(x.permute(0, 3, 1, 2).contiguous())
        activations = {x.shape[2]: x}
        for block in self.enc_blocks:
            x = block(x)
            x = pad_channels(x, self.widths[x.shape[2]])
            activations[x.shape[2]] = x
        return activations


class DecBlock(nn.Module):
    def __init__(self, H, res, mixin, n_blocks):
        super().__init__()
        self.H = H
        self.base = res
        self.mixin = mixin
        self.zdim = H.zdim
        self.widths = get_width_settings(H.width, H.custom_width_str)
        width = self.widths[res]
        middle = int(width * H.bottleneck_multiple)
        self.enc = Block(2 * width, middle, 2 * H.zdim, use_3x3=res > 2)
        self.prior = Block(width, middle, 2 * H.zdim + width, use_3x3=res > 2, zero_last=True)
        self.z_proj = get_1x1(H.zdim, width)
        self.z_proj.weight.data *= np.sqrt(1 / n_blocks)
        self.resnet = Block(width, middle, width, residual=True, use_3x3=res > 2)
        self.resnet.c4.weight.data *= np.sqrt(1 / n_blocks)
        self.z_fn = lambda z: self.z_proj(z)

    def sample(self, x, acts):
        """The posterior: z, x plus the prior's residual, the elementwise KL."""
        qm, qv = self.enc(torch.cat([x, acts], dim=1)).chunk(2, dim=1)
        prior = self.prior(x)
        pm, pv = prior[:, : self.zdim], prior[:, self.zdim : 2 * self.zdim]
        x = x + prior[:, 2 * self.zdim :]
        z = draw_gaussian_diag_samples(qm, qv)
        kl = gaussian_analytical_kl(qm, pm, qv, pv)
        return z, x, kl

    def sample_uncond(self, x, t=None, lvs=None):
        """The prior: z, drawn at temperature t or given, and x plus the prior's residual."""
        prior = self.prior(x)
        pm, pv = prior[:, : self.zdim], prior[:, self.zdim : 2 * self.zdim]
        x = x + prior[:, 2 * self.zdim :]
        if lvs is not None:
            return lvs, x
        if t is not None:
            pv = pv + torch.ones_like(pv) * np.log(t)
        return draw_gaussian_diag_samples(pm, pv), x

    def get_inputs(self, xs, activations):
        """The state at this resolution, of the batch of the activations, and these."""
        acts = activations[self.base]
        x = xs[self.base] if self.base in xs else torch.zeros_like(acts)
        if x.shape[0] != acts.shape[0]:
            x = x.repeat(acts.shape[0], 1, 1, 1)
        return x, acts

    def _mix_in(self, xs, x):
        if self.mixin is None:
            return x
        mixed = xs[self.mixin][:, : x.shape[1]]
        return x + F.interpolate(mixed, scale_factor=self.base // self.mixin)

    def forward(self, xs, activations, get_latents=False):
        x, acts = self.get_inputs(xs, activations)
        z, x, kl = self.sample(self._mix_in(xs, x), acts)
        xs[self.base] = self.resnet(x + self.z_fn(z))
        if get_latents:
            return xs, dict(z=z.detach(), kl=kl)
        return xs, dict(kl=kl)

    def forward_uncond(self, xs, t=None, lvs=None):
        if self.base in xs:
            x = xs[self.base]
        else:
            like = next(iter(xs.values()))
            x = like.new_zeros(len(like), self.widths[self.base], self.base, self.base)
        z, x = self.sample_uncond(self._mix_in(xs, x), t, lvs=lvs)
        xs[self.base] = self.resnet(x + self.z_fn(z))
        return xs


class Decoder(HModule):
    def build(self):
        H = self.H
        self.widths = get_width_settings(H.width, H.custom_width_str)
        # A block RdK is one at R: there is nothing to pool.
        layers = parse_layer_string(re.sub(r"d\d+", "", H.dec_blocks))
        self.dec_blocks = nn.ModuleList(DecBlock(H, r, mixin, len(layers)) for r, mixin in layers)
        self.resolutions = sorted({r for r, _ in layers})
        self.bias_xs = nn.ParameterList(
            nn.Parameter(torch.zeros(1, self.widths[r], r, r))
            for r in self.resolutions
            if r <= H.no_bias_above
        )
        self.out_net = DmolNet(H)
        self.gain = nn.Parameter(torch.ones(1, H.width, 1, 1))
        self.bias = nn.Parameter(torch.zeros(1, H.width, 1, 1))
        self.final_fn = lambda x: x * self.gain + self.bias

    def _constants(self, n):
        return {p.shape[2]: p.repeat(n, 1, 1, 1) for p in self.bias_xs}

    def _temperature(self, t, i):
        try:
            return t[i]
        except (TypeError, IndexError):
            if np.ndim(t):
                raise
            return t

    def forward(self, activations, get_latents=False):
        xs, stats = {p.shape[2]: p for p in self.bias_xs}, []
        for block in self.dec_blocks:
            xs, block_stats = block(xs, activations, get_latents=get_latents)
            stats.append(block_stats)
        return self.final_fn(xs[self.H.image_size]), stats

    def forward_uncond(self, n, t=None, y=None):
        xs = self._constants(n)
        for i, block in enumerate(self.dec_blocks):
            xs = block.forward_uncond(xs, self._temperature(t, i))
        return self.final_fn(xs[self.H.image_size])

    def forward_manual_latents(self, n, latents, t=None):
        xs = self._constants(n)
        for i, (block, lvs) in enumerate(itertools.zip_longest(self.dec_blocks, latents)):
            xs = block.forward_uncond(xs, self._temperature(t, i), lvs=lvs)
        return self.final_fn(xs[self.H.image_size])


class VAE(HModule):
    def build(self):
        self.encoder = Encoder(self.H)
        self.decoder = Decoder(self.H)

    def forward(self, x, x_target):
        px_z, stats = self.decoder(self.encoder(x))
        distortion = self.decoder.out_net.nll(px_z, x_target)
        rate = sum(s["kl"].sum(dim=(1, 2, 3)) for s in stats) / np.prod(x.shape[1:])
        elbo = (distortion + rate).mean()
        return dict(elbo=elbo, distortion=distortion.mean(), rate=rate.mean())

    def forward_get_latents(self, x):
        return self.decoder(self.encoder(x), get_latents=True)[1]

    def forward_uncond_samples(self, n_batch, t=None):
        return self.decoder.out_net.sample(self.decoder.forward_uncond(n_batch, t=t))

    def forward_samples_set_latents(self, n_batch, latents, t=None):
        px_z = self.decoder.forward_manual_latents(n_batch, latents, t=t)
        return self.decoder.out_net.sample(px_z)
