"""The network: a bottom-up encoder and a top-down decoder of stochastic layers.

Very Deep VAEs (arXiv 2011.10650), section 3 and figure 3.

Shapes: N batch, C = width(R), Z = H.zdim, R resolution. Tensors are (N, C, R, R); images,
inputs and targets are (N, R, R, 3). `xs` is the decoder's state, {R: (N, C, R, R)}, and
`activations` are the encoder's, likewise. Log standard deviations end in v, means in m;
q is the posterior and p the prior.
"""

import itertools
import math
import re

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hps import UserError
from vae_helpers import (
    DmolNet,
    HModule,
    draw_gaussian_diag_samples,
    gaussian_analytical_kl,
    gelu,
    gelu_conv,
    gelu_convs,
    get_1x1,
    get_3x3,
    in_float32,
    is_plain,
)

# ---- block strings -------------------------------------------------------------------------


def _tokens(s):
    """The tokens of a block string: (token, resolution, kind, number), kind one of x, m, d, None.

    Raises:
        UserError: quoting the token that is none of RxK, RmS, RdK and R.
    """
    for token in s.split(","):
        match = re.fullmatch(r"([1-9]\d*)(?:([xmd])([1-9]\d*))?", token.strip(), re.ASCII)
        if not match:
            raise UserError(
                f"block string token {token!r} is not RxK, RmS, RdK or R with whole numbers of at "
                f"least 1, such as 32x11, 8m4 or 32d2; it stands in {s!r}"
            )
        resolution, kind, number = match.groups()
        yield token.strip(), int(resolution), kind, number and int(number)


def parse_layer_string(s):
    """A block string as a list of (resolution, None | resolution mixed in | pooling rate).

    Raises:
        UserError: quoting the token that is none of RxK, RmS, RdK and R.
    """
    layers = []
    for _, resolution, kind, number in _tokens(s):
        if kind == "x":
            layers += [(resolution, None)] * number
        else:
            layers.append((resolution, number))
    return layers


class _Widths(dict):
    """Resolution → width, with a default for resolutions not named."""

    def __init__(self, default, named):
        super().__init__(named)
        self.default = default

    def __missing__(self, resolution):
        return self.default

    def __reduce__(self):
        return _Widths, (self.default, dict(self))


def get_width_settings(width, s):
    """Mapping resolution → width: those that s ("R:width,R:width", or None) names, else `width`.

    Raises:
        UserError: quoting the pair that is not R:width.
    """
    named = {}
    for pair in s.split(",") if s else ():
        match = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", pair.strip(), re.ASCII)
        if not match:
            raise UserError(
                f"custom_width_str {s!r}: {pair!r} is not R:width with whole numbers of at least "
                f"1, such as 512:32"
            )
        named[int(match[1])] = int(match[2])
    return _Widths(width, named)


def check_blocks(H):
    """Holds the block strings against the image size and each other, before anything is built.

    Raises:
        UserError: quoting the option, the token and the rule.
    """
    widths = get_width_settings(H.width, H.custom_width_str)
    for option in ("enc_blocks", "dec_blocks"):
        if not getattr(H, option):
            raise UserError(f"{option} is {getattr(H, option)!r}: a block string is needed")
    if widths[H.image_size] != H.width:
        raise UserError(
            f"custom_width_str {H.custom_width_str!r} gives image_size {H.image_size} the width "
            f"{widths[H.image_size]}: there it must be --width, {H.width}"
        )

    encoded, size = {H.image_size}, H.image_size
    for token, resolution, kind, number in _tokens(H.enc_blocks):
        where = f"enc_blocks token {token!r}"
        if kind == "m":
            raise UserError(f"{where}: RmS belongs in dec_blocks; the encoder takes RxK and RdK")
        if resolution != size:
            raise UserError(f"{where}: the resolution there is {size} (image_size {H.image_size})")
        if kind == "d":
            if size % number:
                raise UserError(f"{where}: {size} pixels can't be pooled by {number}")
            size //= number
        if widths[resolution] > widths[size]:
            raise UserError(
                f"{where}: width {widths[resolution]} at {resolution} does not fit width "
                f"{widths[size]} at {size}; widths grow as resolutions shrink"
            )
        encoded.add(size)
    decoded = set()
    biased = {r for r, _ in parse_layer_string(H.dec_blocks) if r <= H.no_bias_above}
    for token, resolution, kind, number in _tokens(H.dec_blocks):
        where = f"dec_blocks token {token!r}"
        if kind == "d":
            raise UserError(f"{where}: RdK belongs in enc_blocks; the decoder takes RxK and RmS")
        if resolution not in encoded:
            raise UserError(f"{where}: the encoder has no activations at {resolution}")
        if kind == "m":
            if number not in decoded | biased:
                raise UserError(f"{where}: no state of resolution {number} exists before it")
            if resolution % number:
                raise UserError(f"{where}: {resolution} is no multiple of {number}")
            if widths[number] < widths[resolution]:
                raise UserError(
                    f"{where}: width {widths[number]} at {number} is below width "
                    f"{widths[resolution]} at {resolution}; widths grow as resolutions shrink"
                )
        decoded.add(resolution)
    if H.image_size not in decoded:
        raise UserError(f"dec_blocks {H.dec_blocks!r} never reach image_size {H.image_size}")
    if size not in decoded:
        raise UserError(f"enc_blocks {H.enc_blocks!r} end at {size}, which no decoder block reads")


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
    if not (on and torch.is_grad_enabled()):
        return function(*tensors)
    return checkpoint(function, *tensors, use_reentrant=False)


# ---- encoder -------------------------------------------------------------------------------


def pad_channels(t, width):
    """t (N, C, R, R) with zero channels appended up to `width`.

    Raises:
        ValueError: if it has more channels than that.
    """
    missing = width - t.shape[1]
    if missing < 0:
        raise ValueError(f"{t.shape[1]} channels do not fit a width of {width}")
    return F.pad(t, (0, 0, 0, 0, 0, missing)) if missing else t


def channels_last(t):
    """t (N, C, R, R), its channels side by side in memory: as convolutions here expect it."""
    return t.contiguous(memory_format=torch.channels_last)


def add_to_stream(x, h):
    """x + h in x's dtype, written over h, a new tensor of gelu_conv's or gelu_convs'.

    On the CPU the pages of another tensor cost more than the sum.
    """
    return h.to(x.dtype).add_(x)


class Block(nn.Module):
    """Four convolutions, each preceded by GELU: 1x1, 3x3, 3x3, 1x1, through a bottleneck."""

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
        get_middle = get_3x3 if use_3x3 else get_1x1
        self.c1 = get_1x1(in_width, middle_width)
        self.c2 = get_middle(middle_width, middle_width)
        self.c3 = get_middle(middle_width, middle_width)
        self.c4 = get_1x1(middle_width, out_width, zero_weights=zero_last)

    def forward(self, x):
        x = channels_last(x)
        h = self.bottleneck(gelu_conv(x, self.c1))  # (N, middle, R, R)
        h = gelu_conv(h, self.c4)  # (N, out, R, R)
        if self.residual:
            h = add_to_stream(x, h)
        if self.down_rate is not None:
            h = F.avg_pool2d(h, self.down_rate)  # (N, out, R / down_rate, R / down_rate)
        return h

    def bottleneck(self, h):
        """c1's output → c4's input, both (N, middle, R, R) before their GELU."""
        return gelu_conv(gelu_conv(h, self.c2), self.c3)


def _middle_width(H, width):
    return int(width * H.bottleneck_multiple)


@torch.no_grad()
def _scale_by_depth(conv, n_blocks):
    """n_blocks residual terms of variance 1/n_blocks each: the sum keeps its variance."""
    conv.weight.mul_(math.sqrt(1 / n_blocks))


class Encoder(HModule):
    """Bottom-up: images (N, R, R, 3) → {R: last activation at R, (N, C, R, R)}."""

    def build(self):
        H = self.H
        self.widths = get_width_settings(H.width, H.custom_width_str)
        self.in_conv = get_3x3(H.image_channels, H.width)
        layers = parse_layer_string(H.enc_blocks)
        self.enc_blocks = nn.ModuleList()
        for resolution, down_rate in layers:
            width = self.widths[resolution]
            block = Block(
                width,
                _middle_width(H, width),
                width,
                down_rate=down_rate,
                residual=True,
                use_3x3=resolution > 2,
            )
            self.enc_blocks.append(block)
        for block in self.enc_blocks:
            _scale_by_depth(block.c4, len(layers))
        self.segments, self.checkpointing = segments(layers), False
        self.cuda_graphs = False

    def forward(self, x):
        if self.cuda_graphs:  # what they computed in the pass before may be overwritten
            torch.compiler.cudagraph_mark_step_begin()
        # Three channels cost little; in bf16 they cost more bits than any other convolution's.
        with in_float32(x.device.type):
            x = self.in_conv(x.permute(0, 3, 1, 2))  # (N, H.width, R, R)
        activations = {x.shape[2]: x}
        for segment in self.segments:
            blocks = nn.Sequential(*self.enc_blocks[segment])
            x = checkpointed(self.checkpointing, blocks, x)
            x = pad_channels(x, self.widths[x.shape[2]])  # (N, C, R, R) of the new R
            activations[x.shape[2]] = x
        return activations


# ---- decoder -------------------------------------------------------------------------------


def at_least_float32(t):
    return t.to(torch.promote_types(t.dtype, torch.float32))


class DecBlock(nn.Module):
    """One stochastic layer at one resolution: posterior, prior and their merge into the state."""

    def __init__(self, H, res, mixin, n_blocks):
        super().__init__()
        self.H = H
        self.base = res
        self.mixin = mixin
        self.widths = get_width_settings(H.width, H.custom_width_str)
        self.zdim = H.zdim
        width = self.widths[res]
        middle, use_3x3 = _middle_width(H, width), res > 2
        self.enc = Block(2 * width, middle, 2 * H.zdim, use_3x3=use_3x3)
        self.prior = Block(width, middle, 2 * H.zdim + width, use_3x3=use_3x3, zero_last=True)
        self.z_proj = get_1x1(H.zdim, width)
        _scale_by_depth(self.z_proj, n_blocks)
        self.resnet = Block(width, middle, width, residual=True, use_3x3=use_3x3)
        _scale_by_depth(self.resnet.c4, n_blocks)

    def z_fn(self, z):
        """z (N, Z, R, R) → its share of the state (N, C, R, R)."""
        with in_float32(z.device.type):  # few channels; its sum is float32
            return self.z_proj(z)

    def _state(self, xs, like):
        """The state here, (N, C, R, R), N that of `like`: constants in xs may have a batch of 1."""
        x = xs.get(self.base)
        if x is None:
            x = like.new_zeros(1, self.widths[self.base], self.base, self.base)
        x = x.expand(len(like), -1, -1, -1)  # (N, C, R, R)
        if self.mixin is not None:
            mixed = xs[self.mixin][:, : x.shape[1]]  # (N, C, S, S)
            x = x + F.interpolate(mixed, scale_factor=self.base // self.mixin)
        return channels_last(x)

    def _is_plain(self):
        """Whether the posterior and the prior may be computed by their weights, uncalled."""
        return all(
            is_plain(block, Block) and all(is_plain(c, nn.Conv2d) for c in block.children())
            for block in (self.enc, self.prior)
        )

    def _prior(self, x, h):
        """From the state and prior.c1's output: pm, pv and the state with the prior's residual.

        h is None where the prior is to be called.
        """
        n_latent = 2 * self.zdim
        if h is None:
            p, residual = self.prior(x).split([n_latent, x.shape[1]], dim=1)
            merged = x + residual
        else:
            w, b = self.prior.c4.weight, self.prior.c4.bias
            h = self.prior.bottleneck(h)  # (N, middle, R, R)
            p, residual = gelu_convs(h, w[:n_latent], b[:n_latent], w[n_latent:], b[n_latent:])
            merged = add_to_stream(x, residual)
        pm, pv = at_least_float32(p).contiguous().chunk(2, dim=1)  # each (N, Z, R, R)
        return pm, pv, merged

    def _give(self, xs, x, z):
        """Adds z's share to x, _prior's own tensor, and makes that the state at this resolution."""
        xs[self.base] = self.resnet(x.add_(self.z_fn(channels_last(z))))
        return xs

    def forward(
        self,
        xs,
        activations,
        get_latents=False,
        generators=None,
        get_gaussians=False,
        activated=None,
    ):
        """The posterior pass: (xs, {kl}), with get_latents (xs, {z, kl}), each (N, Z, R, R).

        xs, whose tensors may have a batch of 1, gets a new tensor at this resolution; none is
        written in place. kl is in nats; z is detached. `generators` as in fill_noise. With
        get_gaussians the dict also holds qm, qv, pm and pv: means and log standard deviations.
        `activated` is gelu(activations[base]), where the caller has it.
        """
        acts = channels_last(activations[self.base])  # (N, C, R, R)
        x = self._state(xs, acts)  # (N, C, R, R)
        if self._is_plain():
            # The posterior's c1 of concat[x, acts] is the sum of its halves: that of x shares the
            # GELU with the prior's c1, that of acts with all blocks of this resolution.
            w_x, w_acts = self.enc.c1.weight.split([x.shape[1], acts.shape[1]], dim=1)
            p, q = gelu_convs(x, self.prior.c1.weight, self.prior.c1.bias, w_x, self.enc.c1.bias)
            q = q + F.conv2d(gelu(acts) if activated is None else activated, w_acts)
            q = self.enc.bottleneck(q)  # (N, middle, R, R)
            with in_float32(q.device.type):
                q = gelu_conv(at_least_float32(q), self.enc.c4)  # (N, 2 Z, R, R)
        else:
            p, q = None, at_least_float32(self.enc(torch.cat([x, acts], dim=1)))  # (N, 2 Z, R, R)
        pm, pv, merged = self._prior(x, p)
        qm, qv = q.contiguous().chunk(2, dim=1)  # each (N, Z, R, R)
        z = draw_gaussian_diag_samples(qm, qv, generators)  # (N, Z, R, R)
        kl = gaussian_analytical_kl(qm, pm, qv, pv)  # (N, Z, R, R)
        xs = self._give(xs, merged, z)
        stats = {"z": z.detach(), "kl": kl} if get_latents else {"kl": kl}
        return xs, stats | {"qm": qm, "qv": qv, "pm": pm, "pv": pv} if get_gaussians else stats

    def forward_uncond(self, xs, t=None, lvs=None, generators=None):
        """The prior pass: xs with z = lvs (N, Z, R, R), or z ~ p at temperature t (None: 1).

        A temperature multiplies the prior's standard deviation.
        """
        x = self._state(xs, max(xs.values(), key=len))  # (N, C, R, R)
        h = gelu_conv(x, self.prior.c1) if self._is_plain() else None  # (N, middle, R, R)
        pm, pv, merged = self._prior(x, h)
        if lvs is None:
            if t is not None:
                pv = pv + (math.log(t) if t else -math.inf)
            lvs = draw_gaussian_diag_samples(pm, pv, generators)
        return self._give(xs, merged, lvs)


class Decoder(HModule):
    """Top-down: the stochastic layers in order, from the learned constants to px_z."""

    def build(self):
        H = self.H
        self.widths = get_width_settings(H.width, H.custom_width_str)
        layers = parse_layer_string(H.dec_blocks)
        self.dec_blocks = nn.ModuleList(
            DecBlock(H, resolution, mixin, n_blocks=len(layers)) for resolution, mixin in layers
        )
        self.resolutions = sorted({resolution for resolution, _ in layers})
        self.bias_xs = nn.ParameterList(
            nn.Parameter(torch.zeros(1, self.widths[r], r, r))
            for r in self.resolutions
            if r <= H.no_bias_above
        )
        self.segments, self.checkpointing = segments(layers), False
        self.out_net = DmolNet(H)
        self.gain = nn.Parameter(torch.ones(1, H.width, 1, 1))
        self.bias = nn.Parameter(torch.zeros(1, H.width, 1, 1))

    def final_fn(self, x):
        """The state at image_size → px_z, both (N, H.width, R, R)."""
        return torch.addcmul(self.bias, x, self.gain)

    def _start(self, n):
        """The first state: the learned constants, and zeros where the first block has none."""
        xs = {t.shape[2]: channels_last(t).expand(n, -1, -1, -1) for t in self.bias_xs}
        first = self.dec_blocks[0].base
        if first not in xs:
            xs[first] = self.gain.new_zeros(n, self.widths[first], first, first)
        return xs

    def forward(self, activations, get_latents=False, generators=None, get_gaussians=False):
        """The posterior pass: (px_z, one dict a block), the dicts and options as DecBlock's."""
        xs = self._start(next(iter(activations.values())).shape[0])
        stats, activated = [], {r: gelu(channels_last(activations[r])) for r in self.resolutions}
        for segment in self.segments:
            blocks = self.dec_blocks[segment]
            acts = activations[blocks[0].base], activated[blocks[0].base]  # each (N, C, R, R)

            def run(acts, activated, *states, blocks=blocks, resolutions=tuple(xs)):
                xs, stats = dict(zip(resolutions, states, strict=True)), []
                for block in blocks:
                    xs, block_stats = block(
                        xs, {block.base: acts}, get_latents, generators, get_gaussians, activated
                    )
                    stats.append(block_stats)
                return xs, stats

            # Only the default generators' noise is replayed.
            on = self.checkpointing and generators is None
            xs, segment_stats = checkpointed(on, run, *acts, *xs.values())
            stats += segment_stats
        return self.final_fn(xs[self.H.image_size]), stats

    def forward_uncond(self, n, t=None, y=None, generators=None):
        """The prior pass: px_z of n samples; t a number, or one per block. y is not used."""
        return self.forward_manual_latents(n, (), t, generators)

    def forward_manual_latents(self, n, latents, t=None, generators=None):
        """The prior pass with the given z of the first blocks; the rest is sampled.

        Args:
            n: batch size.
            latents: any iterable of (N, Z, R, R), shorter than the blocks or as long; a None
                among them is sampled.
            t: temperature of what is sampled; a number, or one per block.

        Raises:
            ValueError: for more latents, or another number of temperatures, than blocks.
        """
        latents, n_blocks = list(latents), len(self.dec_blocks)
        if len(latents) > n_blocks:
            raise ValueError(f"{len(latents)} latents given; the decoder has {n_blocks} blocks")
        try:
            temperatures = list(t)
        except TypeError:
            temperatures = [t] * n_blocks
        if len(temperatures) != n_blocks:
            raise ValueError(
                f"{len(temperatures)} temperatures given; the decoder has {n_blocks} blocks: "
                f"give one number, or one per block"
            )
        xs = self._start(n)
        for block, block_t, z in itertools.zip_longest(self.dec_blocks, temperatures, latents):
            xs = block.forward_uncond(xs, block_t, lvs=z, generators=generators)
        return self.final_fn(xs[self.H.image_size])


# ---- the whole -----------------------------------------------------------------------------


class VAE(HModule):
    """Encoder and decoder.

    Reads from H: dataset, image_size, image_channels, width, zdim, custom_width_str,
    bottleneck_multiple, no_bias_above, num_mixtures, enc_blocks, dec_blocks.

    Raises:
        UserError: for block strings that do not fit the image size or each other.
    """

    def build(self):
        check_blocks(self.H)
        self.encoder = Encoder(self.H)
        self.decoder = Decoder(self.H)

    def checkpoint_activations(self):
        """From now on keeps blocks' inputs alone for the backward pass and computes the rest anew.

        A third more time for a fraction of the memory; noise is replayed, gradients are the same.
        """
        self.encoder.checkpointing = self.decoder.checkpointing = True

    def compile_blocks(self, cuda_graphs=False):
        """From now on runs the residual blocks by torch.compile, one compilation per shape.

        With cuda_graphs, each on CUDA as a graph of its kernels; on the CPU that changes nothing.
        """
        self.encoder.cuda_graphs = cuda_graphs
        mode = "reduce-overhead" if cuda_graphs else None
        for block in self.modules():
            if isinstance(block, Block) and block.residual:
                # A network has more shapes than the eight that PyTorch compiles by default.
                block.compile(dynamic=False, recompile_limit=64, mode=mode)

    def distortion_and_rate(self, x, x_target, generators=None, per_layer=False):
        """The two terms of the negative ELBO per image, each (N,), in nats per dimension.

        Args:
            x: input (N, R, R, 3).
            x_target: target (N, R, R, 3) in [-1, 1].
            generators: as in fill_noise.
            per_layer: the rate of each layer by itself, (layers, N), in place of their sum.
        """
        px_z, stats = self.decoder(self.encoder(x), generators=generators)
        distortion = self.decoder.out_net.nll(px_z, x_target)
        rates = [s["kl"].sum(dim=(1, 2, 3)) for s in stats]
        if per_layer:
            return distortion, torch.stack(rates) / x[0].numel()
        return distortion, sum(rates) / x[0].numel()

    def forward(self, x, x_target, per_image=False, generators=None):
        """{elbo, distortion, rate}: batch means, 0-dim, nats per dimension; per_image: (N,) each.

        `elbo` is, in spite of its name, the negative ELBO: what training minimizes.
        """
        distortion, rate = self.distortion_and_rate(x, x_target, generators)
        stats = {"elbo": distortion + rate, "distortion": distortion, "rate": rate}
        return stats if per_image else {key: t.mean() for key, t in stats.items()}

    def importance_weighted_elbo(self, x, x_target, n_samples, noise):
        """The importance-weighted bound of K samples (Burda et al. 2016, eq. 8), negated.

        log (1/K) sum_k w_k, w_k = p(x, z_k) / q(z_k | x), to which is added the mean over k of what
        the sampled log q/p of the latents exceeds their analytical KL by. That mean is 0 in
        expectation, with it K = 1 is the ELBO of that noise, and no K is above the mean ELBO of
        its samples. A sample of infinite distortion has weight 0. Memory is that of one sample.

        Args:
            x, x_target: as in distortion_and_rate.
            n_samples: K.
            noise: k from 0 to K - 1 → the `generators` of that sample.

        Returns:
            (N,), nats per dimension, float64; inf where all weights are 0, or a KL is infinite.
        """
        activations, n_dims = self.encoder(x), x[0].numel()
        log_sum, gap = -math.inf, 0
        for k in range(n_samples):
            px_z, stats = self.decoder(activations, True, noise(k), get_gaussians=True)
            distortion = self.decoder.out_net.nll(px_z, x_target).double() * n_dims  # (N,)
            log_ratio, kl = 0, 0  # log p(z) - log q(z | x), and its analytical expectation, negated
            for s in stats:
                z, qm, qv, pm, pv = (s[key].double() for key in ("z", "qm", "qv", "pm", "pv"))
                q, p = (z - qm) / qv.exp(), (z - pm) / pv.exp()
                log_ratio = log_ratio + (0.5 * (q**2 - p**2) + qv - pv).sum(dim=(1, 2, 3))
                kl = kl + s["kl"].double().sum(dim=(1, 2, 3))
            log_weight = log_ratio - distortion  # (N,)
            log_sum = torch.logaddexp(torch.as_tensor(log_sum).to(log_weight), log_weight)
            # An infinite KL makes the bound infinite, whatever the weight: no inf - inf.
            gap = gap + torch.where(kl == math.inf, kl, kl + log_ratio) / n_samples
        return (gap + math.log(n_samples) - log_sum) / n_dims

    def forward_get_latents(self, x, generators=None, get_gaussians=False):
        """One {z (N, Z, R, R) detached, kl (N, Z, R, R)} per block, from the posterior of x.

        With get_gaussians also qm, qv, pm, pv, as in DecBlock.forward.
        """
        return self.decoder(self.encoder(x), True, generators, get_gaussians)[1]

    @torch.no_grad()
    def forward_uncond_samples(self, n_batch, t=None, generators=None, mean=False, as_float=False):
        """Samples of the prior at temperature t: numpy uint8 (n_batch, R, R, 3).

        t is a number, or one per block; generators, mean and as_float as in DmolNet.sample.
        """
        return self.forward_samples_set_latents(n_batch, (), t, generators, mean, as_float)

    @torch.no_grad()
    def forward_samples_set_latents(
        self, n_batch, latents, t=None, generators=None, mean=False, as_float=False
    ):
        """Samples with given z of the first blocks, as in Decoder.forward_manual_latents."""
        px_z = self.decoder.forward_manual_latents(n_batch, latents, t, generators)
        return self.decoder.out_net.sample(px_z, generators, mean, as_float)
