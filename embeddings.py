"""Images as vectors that do not change: the posterior means, layer by layer, in one row an image.

The pass is that of the posterior, in which every z is its posterior's mean given the means above.
Deeper means depend on the z above them, so with sampled z two passes give two sets of means.

Shapes: N images, Z latent channels, R a layer's resolution, D = the sum of Z R R over layers.
"""

import functools
import math
import numbers

import numpy as np
import torch

from errors import UserError
from fused import gelu, sharing_gelu
from image_sets import channels_of
from noise import without_noise

# ---- which layers --------------------------------------------------------------------------


def resolutions_of(vae):
    """The resolution of each layer, from the top."""
    return [block.base for block in vae.decoder.dec_blocks]


def shapes_of_layers(vae):
    """(Z, R, R) of each layer's latents, from the top."""
    return [(block.zdim, block.base, block.base) for block in vae.decoder.dec_blocks]


def widths_of(vae):
    """D of the first layer alone, of the first two, ..."""
    sizes, total = [], 0
    for shape in shapes_of_layers(vae):
        total += math.prod(shape)
        sizes.append(total)
    return sizes


def layers_to_keep(vae, layers=None, resolution=None, sign=""):
    """How many layers these are: the first `layers`, those up to a resolution, or (neither) all.

    sign: what stands before the arguments' names in messages.

    Raises:
        UserError: for both, for more layers than there are, or a resolution without latents.
    """
    bases = resolutions_of(vae)
    if layers is not None and resolution is not None:
        raise UserError(
            f"{sign}layers {layers} and {sign}resolution {resolution} both tell where to stop: "
            f"leave one of them out"
        )
    whole = isinstance(layers, numbers.Integral)
    if layers is not None and not (whole and 1 <= layers <= len(bases)):
        raise UserError(f"{sign}layers {layers}: this model has {len(bases)} layers")
    if resolution is not None and resolution not in bases:
        found = ", ".join(map(str, sorted({*bases})))
        raise UserError(f"{sign}resolution {resolution}: this model has latents at {found}")
    if resolution is not None:
        return max(i + 1 for i, base in enumerate(bases) if base <= resolution)
    return len(bases) if layers is None else int(layers)


# ---- images → means ------------------------------------------------------------------------


def _refuse_own_samplers(decoder):
    """Raises UserError, naming it, for a `sample` of a block or a sampler that is not vae.py's."""
    for block in decoder.dec_blocks:
        function = getattr(block.sample, "__func__", block.sample)
        sampler = getattr(function, "__globals__", {}).get("draw_gaussian_diag_samples")
        for wanted, found in (
            ("vae.DecBlock.sample", function),
            ("vae_helpers.draw_gaussian_diag_samples", sampler),
        ):
            name = f"{getattr(found, '__module__', None)}.{getattr(found, '__qualname__', found)}"
            if name != wanted:
                raise UserError(
                    f"{name} stands in the place of {wanted}, and the means of what it draws are "
                    f"not known: put {wanted} back for an embedding, or use forward_get_latents"
                )


@torch.no_grad()
def mean_latents(vae, x, n_layers=None, given=(), get_gaussians=False, labels=None):
    """Per layer {z, kl, ...}, as VAE.forward_get_latents, each z its posterior's mean.

    Args:
        x: input (N, S, S, channels).
        n_layers: how many layers, from the top; None: all. Those behind are not computed.
        given: z (N, Z, R, R) of the first layers, in place of x's own: their dict is {z} alone,
            and what follows is x's posterior given that state.

    Raises:
        UserError: for a network whose samples are not drawn by vae.py.
    """
    decoder = vae.decoder
    _refuse_own_samplers(decoder)
    activations, xs, stats = vae.encoder(x), decoder._start(len(x), labels), []
    activated = functools.cache(lambda r: gelu(activations[r]))  # (N, C, R, R)
    more = {"get_gaussians": True} if get_gaussians else {}  # an overridden block takes three
    with without_noise() as noise:
        for i, block in enumerate(decoder.dec_blocks[:n_layers]):
            if i < len(given):
                xs = block.forward_uncond(xs, None, lvs=given[i])
                stats.append({"z": given[i]})
                continue
            with sharing_gelu(activations[block.base], activated(block.base)):
                xs, of_block = block(xs, activations, True, **more)
            stats.append(of_block)
    if noise.draws != len(stats) - min(len(given), len(stats)):  # as of a fork's vae_helpers.py
        raise UserError(
            "vae_helpers.draw_gaussian_diag_samples draws numbers of its own, and the means of "
            "what it draws are not known: use this project's vae_helpers.py for an embedding"
        )
    return stats


def embed(vae, x, layers=None, resolution=None, labels=None):
    """Images as vectors: (N, D) float32, equal for equal batches, whatever was drawn before.

    The layers stand in their order from the top, each flattened from (Z, R, R).

    Args:
        x: what batches.preprocess makes of images, float (N, S, S, channels).
        layers: how many, from the top; resolution: up to the last layer at one <= that. All
            without either.

    Raises:
        UserError: for images that are not preprocessed, layers that do not exist, or as
            mean_latents.
    """
    size = vae.H.image_size
    if not torch.is_tensor(x) or not x.is_floating_point():
        kind = x.dtype if hasattr(x, "dtype") else type(x).__name__
        raise UserError(
            f"embed got {kind}: it takes the input that preprocess makes of uint8 images, "
            f"x, _ = preprocess(images, model.H)"
        )
    if x.ndim != 4 or x.shape[1:] != (size, size, channels_of(vae.H)):
        raise UserError(
            f"embed got {tuple(x.shape)}: the model takes (N, {size}, {size}, "
            f"{channels_of(vae.H)}), as preprocess makes it"
        )
    k = layers_to_keep(vae, layers, resolution)
    stats = mean_latents(vae, x, k, labels=labels)
    return torch.cat([s["z"].flatten(1).float() for s in stats], dim=1)  # (N, D)


# ---- vectors → latents ---------------------------------------------------------------------


def unflatten(vae, rows):
    """What forward_samples_set_latents takes of embed's rows: z (N, Z, R, R) float32 a layer.

    rows: (N, D), numpy or a tensor of any float type; D tells how many layers they are of.

    Raises:
        UserError: for another type, or a D of no number of layers.
    """
    shapes, widths = shapes_of_layers(vae), widths_of(vae)
    if isinstance(rows, np.ndarray) and rows.dtype.kind == "f":  # of any byte order and strides
        rows = np.ascontiguousarray(rows, np.float32)
    rows = torch.as_tensor(rows)
    if rows.ndim != 2 or not rows.is_floating_point():
        raise UserError(
            f"embeddings are {str(rows.dtype).removeprefix('torch.')} {tuple(rows.shape)}: "
            f"unflatten takes floats (N, D), a row an image"
        )
    if rows.shape[1] not in widths:
        raise UserError(
            f"embeddings of {rows.shape[1]} numbers are of no number of this model's layers: the "
            f"first 1, 2, ... of {len(widths)} layers make {', '.join(map(str, widths))}"
        )
    rows = rows.to(vae.decoder.gain.device, torch.float32)
    shapes = shapes[: widths.index(rows.shape[1]) + 1]
    parts = rows.split([math.prod(shape) for shape in shapes], dim=1)
    return [part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True)]
