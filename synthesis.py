"""What a model makes of images or latents: functions from arrays to arrays.

sample.py writes it to files, explore.py shows it. Images are uint8 (n, S, S, channels); latents are
a list of tensors (n, Z, R, R), one a layer from the top. `indices` are one number an image, which
with `seed` owns its noise: image 7 is the same, to rounding, in any batch. `labels` are int64 (n,),
-1 for none.
"""

import torch

from batches import preprocess
from embeddings import mean_latents, resolutions_of
from errors import UserError
from labels import given
from noise import DECODING, ENCODING, SAMPLING, image_generators

# ---- layers, temperatures ------------------------------------------------------------------


def temperature_of_layers(model, t):
    """One temperature per layer from a number or {resolution: number} (others: 1).

    Raises:
        UserError: for a resolution without latents.
    """
    layers, found = resolutions_of(model), model.decoder.resolutions
    if not isinstance(t, dict):
        return [t] * len(layers)
    for resolution in t:
        if resolution not in found:
            raise UserError(
                f"--temperature names resolution {resolution}: this model has latents at "
                f"{', '.join(map(str, found))}"
            )
    return [t.get(resolution, 1.0) for resolution in layers]


def steps_of_forming(model):
    """How many layers there are up to the end of each run of layers of one resolution."""
    bases = resolutions_of(model)
    return [i + 1 for i, base in enumerate(bases) if bases[i + 1 : i + 2] != [base]]


# ---- images ↔ latents ----------------------------------------------------------------------


def latents_of(model, images, indices, seed=0, get_gaussians=False, labels=None):
    """Per layer {z, kl, ...} of images, drawn from their posterior."""
    x, _ = preprocess(images, model.H)
    generators = image_generators(indices, seed, ENCODING)
    return model.forward_get_latents(x, generators, get_gaussians, **given(labels))


def decode_latents(model, latents, indices, t=1.0, seed=0, mean=False, labels=None):
    """Images of the latents of the first layers; those that lack, or are None, are sampled.

    Args:
        t: temperature of what is sampled: a number, or one per layer.
        mean: pixels are the mean of the mixture, not a sample.
    """
    generators = image_generators(indices, seed, DECODING)
    return model.forward_samples_set_latents(
        len(indices), latents, t, generators, mean, **given(labels)
    )


def draw_samples(model, indices, t=1.0, seed=0, mean=False, labels=None, generators=None):
    """Samples of the prior at temperature t: a number, or one per layer.

    generators: those of the images, where the caller has them already (ahead.Ahead).
    """
    generators = generators or image_generators(indices, seed, SAMPLING)
    return model.forward_uncond_samples(len(indices), t, generators, mean, **given(labels))


def reconstruct(
    model, images, indices, k, t=0.1, seed=0, mean=False, labels=None, from_labels=None
):
    """What the latents of the first k layers keep of images; the rest is sampled at t.

    from_labels: what the images are encoded under, as they are decoded under labels.
    """
    stats = latents_of(model, images, indices, seed, labels=from_labels)
    latents = [s["z"] for s in stats[:k]]
    return decode_latents(model, latents, indices, t, seed, mean, labels=labels)


# ---- between two images --------------------------------------------------------------------


def latents_of_two(model, images, seed=0, labels=None):
    """z of two images, a tensor (2, Z, R, R) a layer, both with the noise of image 0."""
    return [s["z"] for s in latents_of(model, images, (0, 0), seed, labels=labels)]


def interpolate(model, ends, weights, k, t=0.1, seed=0, mean=False, labels=None):
    """Images on the line between two, one a weight: 0 is the first of them, 1 the second.

    All share the noise of image 0: only the latents' content changes.

    Args:
        ends: of latents_of_two.
        weights: a tensor (n,).
        k: layers that are kept; the rest is sampled at t.
    """
    w = weights.view(-1, 1, 1, 1)
    latents = [torch.lerp(z[:1], z[1:], w) for z in ends[:k]]  # (n, Z, R, R)
    return decode_latents(model, latents, [0] * len(w), t, seed, mean, labels=labels)


# ---- how images form -----------------------------------------------------------------------


def forming(model, k, indices, t, rest=0.1, latents=None, seed=0, mean=False, labels=None):
    """Images of which the first k layers are decided and the others drawn at temperature `rest`.

    Args:
        t: one temperature per layer, of samples.
        latents: of images, at least k layers; None: samples, whose first k layers are the same
            for every k.
    """
    if latents is not None:
        return decode_latents(model, latents[:k], indices, rest, seed, mean, labels=labels)
    ts = [*t[:k], *[rest] * (len(t) - k)]
    return draw_samples(model, indices, ts, seed, mean, labels)


# ---- two images in one ---------------------------------------------------------------------


def mix(model, a, b, k, as_stored=False, mean=False, seed=0, labels=None):
    """Images with the coarse latents of some and the fine ones of others, by posterior means.

    Args:
        a, b: images, uint8 (n, S, S, channels) each.
        k: how many layers, from the top, are a's: 0 is b itself, all are a.
        as_stored: b's fine latents are those of b alone; else b's posterior given a's coarse
            state.
        mean, seed: of the pixels, as decode_latents.
    """
    (x_a, _), (x_b, _) = preprocess(a, model.H), preprocess(b, model.H)
    coarse = [s["z"] for s in mean_latents(model, x_a, k, labels=labels)] if k else []
    stats = mean_latents(model, x_b, given=() if as_stored else coarse, labels=labels)
    latents = [*coarse, *(s["z"] for s in stats[k:])]
    return decode_latents(model, latents, range(len(a)), 1.0, seed, mean, labels)
