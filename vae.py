"""The network: a bottom-up encoder and a top-down decoder of stochastic layers.

Very Deep VAEs (arXiv 2011.10650), section 3 and figure 3.

Shapes: N batch, C = width(R), Z = H.zdim, R resolution. Tensors are (N, C, R, R); images,
inputs and targets are (N, R, R, 3), of grey ones (N, R, R, 1). `xs` is the decoder's state,
{R: (N, C, R, R)}, and `activations` are the encoder's, likewise. Log standard deviations end in v,
means in m; q is the posterior and p the prior. `labels` are int64 (N,), -1 for none, as None is.
"""

import math
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from block_strings import (
    check_blocks,
    decoder_layers,
    get_width_settings,
    parse_layer_string,
)
from bounds import distortion_and_rates, importance_weighted_elbo
from compiling import run_block, run_in_turn
from embeddings import embed, mean_latents, unflatten
from fused import (
    add_to_stream,
    channels_last,
    conv_1x1,
    in_turn,
    plain_conv,
    posterior_and_prior,
    prior_alone,
    shared_gelu,
    sharing_gelu,
    upsample,
)
from image_sets import channels_of
from labels import given, label_rows, label_tables, labels_of
from noise import is_of_images, noise_of_images
from precision import without_autocast
from recomputing import checkpointed, segments
from temperatures import log_temperature, temperature_of
from vae_helpers import (
    DmolNet,
    HModule,
    draw_gaussian_diag_samples,
    gaussian_analytical_kl,
    get_1x1,
    get_3x3,
)

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
        convs = self.c1, self.c2, self.c3, self.c4
        h = in_turn(x, *convs, residual=self.residual)  # (N, out, R, R)
        if self.down_rate is not None:
            h = F.avg_pool2d(h, self.down_rate)  # (N, out, R / down_rate, R / down_rate)
        return h

    def bottleneck(self, h):
        """c1's output → c4's input, both (N, middle, R, R) before their GELU."""
        return in_turn(h, self.c2, self.c3)


_OWN_BLOCK = Block  # whose calls fused.py may replace, whatever a program puts under the name


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
        self.in_conv = get_3x3(channels_of(H), H.width)
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

    def forward(self, x):
        # Few channels cost little; in bf16 they cost more bits than any other convolution's.
        with without_autocast(x.device.type):
            # Grey images in the strides of NCHW: the weight's gradient has the weight's then.
            x = x[..., 0][:, None] if x.shape[-1] == 1 else x.permute(0, 3, 1, 2)  # (N, c, R, R)
            x = x.to(next(self.in_conv.parameters()).dtype)
            x = self.in_conv(channels_last(x))  # (N, H.width, R, R)
        activations, all_blocks = {}, list(self.enc_blocks)  # slices of a ModuleList copy it
        for segment in self.segments:
            blocks = all_blocks[segment]
            pools = getattr(blocks[0], "down_rate", None) is not None
            # Programs take views of the last before pooling, and gradients by all that follows it.
            activations[x.shape[2]] = last = x.contiguous() if pools else x
            x = last if torch.is_grad_enabled() else x
            x = checkpointed(self.checkpointing, partial(run_in_turn, blocks), x)
            x = pad_channels(x, self.widths[x.shape[2]])  # (N, C, R, R) of the new R
        activations[x.shape[2]] = x.contiguous()
        return activations


# ---- decoder -------------------------------------------------------------------------------


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
        with without_autocast(z.device.type):  # few channels; its sum is float32
            return conv_1x1(z, self.z_proj)

    _own_z_fn = z_fn  # a program's own, of a subclass or an instance, is told from it

    def _state(self, xs, like):
        """The state at this resolution (N, C, R, R), zeros where xs has none, N that of `like`."""
        x = xs.get(self.base)
        if x is None:
            x = like.new_zeros(1, self.widths[self.base], self.base, self.base)
        return x.expand(len(like), -1, -1, -1) if len(x) == 1 else x

    def _mix_in(self, x, xs):
        """x (N, C, R, R) plus the upsampled state of resolution `mixin`, where there is one."""
        if self.mixin is None:
            return x
        return x + upsample(xs[self.mixin][:, : x.shape[1]], self.base // self.mixin)

    def get_inputs(self, xs, activations):
        """(x, acts), each (N, C, R, R): the state, repeated to the batch of the activations."""
        acts = activations[self.base]
        return self._state(xs, acts), acts

    def sample(self, x, acts, gaussians=None):
        """The posterior pass from state and activations, each (N, C, R, R).

        A dict `gaussians` gets qm, qv, pm and pv: means and log standard deviations (N, Z, R, R).

        Returns:
            (z, x, kl): z (N, Z, R, R), the state with the prior's residual (N, C, R, R), and the
            KL from prior to posterior (N, Z, R, R) in nats.
        """
        q, p, x = posterior_and_prior(self.enc, self.prior, x, acts, 2 * self.zdim, _OWN_BLOCK)
        qm, qv = q.chunk(2, dim=1)  # each (N, Z, R, R)
        pm, pv = p.chunk(2, dim=1)  # each (N, Z, R, R)
        z = draw_gaussian_diag_samples(qm, qv)  # (N, Z, R, R)
        kl = gaussian_analytical_kl(qm, pm, qv, pv)  # (N, Z, R, R)
        if gaussians is not None:
            gaussians.update(qm=qm, qv=qv, pm=pm, pv=pv)
        return z, x, kl

    def sample_uncond(self, x, t=None, lvs=None):
        """The prior pass from the state (N, C, R, R): (z, the state with the prior's residual).

        z is lvs (N, Z, R, R), or drawn at temperature t, a factor of the prior's standard
        deviation: None (1), a number, or a tensor that broadcasts against z.
        """
        p, x = prior_alone(self.prior, x, 2 * self.zdim, _OWN_BLOCK)
        if lvs is not None:
            return lvs, x
        pm, pv = p.chunk(2, dim=1)  # each (N, Z, R, R)
        if t is not None:
            pv = pv + log_temperature(t, pv)
        return draw_gaussian_diag_samples(pm, pv), x

    def forward(self, xs, activations, get_latents=False, get_gaussians=False):
        """The posterior pass: (xs, {kl}), with get_latents (xs, {z, kl}), each (N, Z, R, R).

        xs, whose tensors may have a batch of 1, gets a new tensor at this resolution; none is
        written in place. kl is in nats; z is detached. With get_gaussians the dict also holds what
        `sample` puts there.
        """
        gaussians = {} if get_gaussians else None
        x, acts = self.get_inputs(xs, activations)  # each (N, C, R, R)
        x = self._mix_in(x, xs)  # (N, C, R, R)
        merged = run_block(DecBlock._merge, self, x, acts, gaussians, n_drawn=self.zdim)
        z, xs[self.base], kl = merged  # z, kl (N, Z, R, R)
        return xs, ({"z": z.detach()} if get_latents else {}) | {"kl": kl} | (gaussians or {})

    def _merge(self, x, acts, gaussians):
        more = {} if gaussians is None else {"gaussians": gaussians}  # an overridden one takes two
        z, x, kl = self.sample(x, acts, **more)  # z, kl (N, Z, R, R)
        x = self._plus(x, z)  # (N, C, R, R); under the old name, so that the old is let go
        return z, self.resnet(x), kl

    def _plus(self, x, z):
        """The state plus z's share (N, C, R, R), written over that where no program may keep it."""
        own = self.z_fn == self._own_z_fn and z.dtype == x.dtype and plain_conv(self.z_proj)
        return add_to_stream(x, self.z_fn(z)) if own else x + self.z_fn(z)

    def forward_uncond(self, xs, t=None, lvs=None):
        """The prior pass: xs, with z as in sample_uncond."""
        x = self._mix_in(self._state(xs, max(xs.values(), key=len)), xs)  # (N, C, R, R)
        if lvs is not None:  # such as NumPy's, or stored in half the bytes
            lvs = torch.as_tensor(lvs).to(next(self.parameters()))
        z, x = self.sample_uncond(x, t, lvs)  # (N, Z, R, R), (N, C, R, R)
        x = self._plus(x, z)  # (N, C, R, R)
        xs[self.base] = self.resnet(x)  # (N, C, R, R)
        return xs


class Decoder(HModule):
    """Top-down: the stochastic layers in order, from the learned constants to px_z."""

    def build(self):
        H = self.H
        self.widths = get_width_settings(H.width, H.custom_width_str)
        layers = decoder_layers(H.dec_blocks)
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
        if n_labels := labels_of(H):  # behind all others: positions in optimizer files stay
            self.label_xs = label_tables(self.bias_xs, n_labels)

    def final_fn(self, x):
        """The state at image_size → px_z, both (N, H.width, R, R)."""
        return torch.addcmul(self.bias, x, self.gain).contiguous()

    def _start(self, n, labels=None, any_number=False):
        """The first state: the learned constants, and zeros where the first block has none.

        Each image's label adds its row to those up to 8x8.
        """
        own = list(self.bias_xs)
        if torch.is_grad_enabled():
            own = [t.flatten(1).view(t.shape) for t in own]  # gradients get their strides
        xs = {t.shape[2]: channels_last(t).expand(n, -1, -1, -1) for t in own}
        for rows in label_rows(getattr(self, "label_xs", ()), labels, n, any_number):
            r = rows.shape[2]
            xs[r] = channels_last(xs[r] + rows)  # (N, C, R, R)
        first = self.dec_blocks[0].base
        if first not in xs:
            xs[first] = self.gain.new_zeros(n, self.widths[first], first, first)
        return xs

    def forward(self, activations, get_latents=False, get_gaussians=False, labels=None):
        """The posterior pass: (px_z, one dict a block), the dicts and options as DecBlock's."""
        xs, stats = self._start(len(next(iter(activations.values()))), labels), []
        more = {"get_gaussians": True} if get_gaussians else {}  # an overridden block takes three
        activated = {r: shared_gelu(activations[r]) for r in self.resolutions}  # or None each
        all_blocks = list(self.dec_blocks)
        for segment in self.segments:
            blocks = all_blocks[segment]
            base = blocks[0].base

            def run(acts, activated, *states, blocks=blocks, base=base, resolutions=tuple(xs)):
                xs, stats = dict(zip(resolutions, states, strict=True)), []
                with sharing_gelu(acts, activated):
                    for block in blocks:
                        given = activations | {base: acts}
                        xs, of_block = block(xs, given, get_latents, **more)
                        stats.append(of_block)
                return xs, stats

            on = self.checkpointing and not is_of_images()  # the default generator's is replayed
            xs, of_blocks = checkpointed(on, run, activations[base], activated[base], *xs.values())
            stats += of_blocks
        return self.final_fn(xs[self.H.image_size]), stats

    def forward_uncond(self, n, t=None, y=None, labels=None):
        """The prior pass: px_z of n samples, t as in forward_manual_latents. y is not used."""
        return self.forward_manual_latents(n, (), t, **given(labels))

    def forward_manual_latents(self, n, latents, t=None, labels=None):
        """The prior pass with the given z of the first blocks; the rest is sampled.

        Args:
            n: batch size; 1 serves any number of latents and labels.
            latents: any iterable of (N, Z, R, R), shorter than the blocks or as long; a None
                among them is sampled.
            t: temperature of what is sampled: as in DecBlock.sample_uncond, or whatever t[i] tells
                of block i, such as a list or a dict by block number.

        Raises:
            ValueError: for more latents than blocks, or a t that lacks a block.
        """
        latents, n_blocks = list(latents), len(self.dec_blocks)
        if len(latents) > n_blocks:
            raise ValueError(f"{len(latents)} latents given; the decoder has {n_blocks} blocks")
        xs = self._start(n, labels, any_number=n == 1)
        for i, block in enumerate(self.dec_blocks):
            z = latents[i] if i < len(latents) else None
            xs = block.forward_uncond(xs, temperature_of(t, i, n_blocks), lvs=z)
        return self.final_fn(xs[self.H.image_size])


# ---- the whole -----------------------------------------------------------------------------


class VAE(HModule):
    """Encoder and decoder.

    Reads from H: dataset, image_size, image_channels (absent: 3), width, zdim, custom_width_str,
    bottleneck_multiple, no_bias_above, num_mixtures, enc_blocks, dec_blocks, n_labels (absent: 0).

    `generators`, where a method takes them, is one CPU generator an image, which its noise then
    comes from (`noise.image_generators`); None: the default generator.

    Raises:
        UserError: for block strings that do not fit the image size or each other.
    """

    def build(self):
        check_blocks(self.H)
        self.encoder = Encoder(self.H)
        self.decoder = Decoder(self.H)

    def checkpoint_activations(self):
        """From now on keeps blocks' inputs alone for the backward pass, computes the rest anew."""
        self.encoder.checkpointing = self.decoder.checkpointing = True

    def distortion_and_rate(self, x, x_target, generators=None, per_layer=False, labels=None):
        """The two terms of the negative ELBO per image, each (N,), in nats per dimension.

        Args:
            x: input (N, R, R, 3).
            x_target: target (N, R, R, 3) in [-1, 1].
            per_layer: the rate of each layer by itself, (layers, N), in place of their sum.
        """
        with noise_of_images(generators):
            distortion, rates = distortion_and_rates(self, x, x_target, labels=labels)
        return distortion, rates if per_layer else rates.sum(dim=0)  # (N,), (layers, N) or (N,)

    def forward(self, x, x_target, per_image=False, generators=None, labels=None):
        """{elbo, distortion, rate}: batch means, 0-dim, nats per dimension; per_image: (N,) each.

        `elbo` is, in spite of its name, the negative ELBO: what training minimizes.
        """
        distortion, rate = self.distortion_and_rate(x, x_target, generators, **given(labels))
        stats = {"elbo": distortion + rate, "distortion": distortion, "rate": rate}
        return stats if per_image else {key: t.mean() for key, t in stats.items()}

    importance_weighted_elbo = importance_weighted_elbo  # of a room of its own, as these two
    embed, unflatten = embed, unflatten

    def forward_get_latents(self, x, generators=None, get_gaussians=False, labels=None, mean=False):
        """One {z (N, Z, R, R) detached, kl (N, Z, R, R)} per block, from the posterior of x.

        With get_gaussians also qm, qv, pm, pv, as in DecBlock.forward; with mean, every z is its
        posterior's mean given those above, and nothing is drawn.
        """
        if mean:
            return mean_latents(self, x, get_gaussians=get_gaussians, labels=labels)
        with noise_of_images(generators):
            return self.decoder(self.encoder(x), True, *[True] * get_gaussians, **given(labels))[1]

    def forward_uncond_samples(
        self, n_batch, t=None, generators=None, mean=False, as_float=False, labels=None
    ):
        """Samples of the prior at temperature t: numpy uint8 (n_batch, R, R, 3).

        t as in Decoder.forward_manual_latents; mean and as_float as in DmolNet.sample.
        """
        options = (generators, mean, as_float)
        return self.forward_samples_set_latents(n_batch, (), t, *options, **given(labels))

    @torch.no_grad()
    def forward_samples_set_latents(
        self, n_batch, latents, t=None, generators=None, mean=False, as_float=False, labels=None
    ):
        """Samples with given z of the first blocks, as in Decoder.forward_manual_latents."""
        with noise_of_images(generators):
            px_z = self.decoder.forward_manual_latents(n_batch, latents, t, **given(labels))
            # A fork's own output layer has the published arguments alone.
            options = {"mean": mean, "as_float": as_float}
            with without_autocast(px_z.device.type):
                return self.decoder.out_net.sample(px_z, **{k: v for k, v in options.items() if v})
