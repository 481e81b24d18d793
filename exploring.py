"""What the explorer's controls ask of a model: numbers, images in; images, latents, bits out.

Every function is of its arguments alone, so that nothing is kept of one visitor for another. Images
are uint8 (n, S, S, channels); latents a list of tensors (n, Z, R, R), one a layer from the top;
`label` is a number, -1 for none, or None for a model that has no labels.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch

from batches import of_channels, preprocess
from bounds import nats_to_bits
from decoding import decode, fit
from embeddings import layers_to_keep, mean_latents, resolutions_of
from errors import UserError
from image_sets import channels_of
from labels import known_labels, labels_of, names_of
from scores import scores_of
from starting import refuse_unlabelled
from synthesis import (
    decode_latents,
    draw_samples,
    forming,
    interpolate,
    latents_of,
    mix,
    steps_of_forming,
)
from watching import layers_of, noting, watched
from weights import weights_hash

REST = 0.1  # temperature of layers that are yet to come, as in sample.py


class Model:
    """A VAE with what the page says of it.

    Args:
        vae: as load_model gives it.
        n_batch: images that it computes at a time.
        background: colour that transparent pictures are laid on.
    """

    def __init__(self, vae, n_batch=16, background="white"):
        self.vae, self.n_batch, self.background = watched(vae), n_batch, background
        self.weights = weights_hash(vae)

    @property
    def bases(self):
        """The resolution of each layer."""
        return resolutions_of(self.vae)

    def choices_of_label(self, none):
        """{name: number} of its labels, `none` for -1 where it knows images without one."""
        H, choices = self.vae.H, {}
        if labels_of(H):
            try:
                refuse_unlabelled(H, none)
                choices[none] = -1
            except UserError:
                pass
            choices |= {name: i for i, name in enumerate(known_labels(H))}
        return choices

    @property
    def millions(self):
        """Its parameters."""
        return sum(p.numel() for p in self.vae.parameters()) / 1e6

    @property
    def in_words(self):
        """Preset, size, layers, parameters, device: a line."""
        H, bases = self.vae.H, self.bases
        counts = ", ".join(f"{bases.count(r)} at {r}x{r}" for r in sorted(set(bases)))
        return (
            f"{H.hparam_sets}: {H.image_size} x {H.image_size} pixels, {len(bases)} layers "
            f"({counts}), {self.millions:.3g} million parameters, on {H.device}"
        )

    def labels(self, label, n):
        """int64 (n,) of one label, or None where there is none to tell."""
        return None if label is None else torch.full((n,), label)


# ---- samples -------------------------------------------------------------------------------


@dataclass
class Chosen:
    """A sample of which the layers down to a resolution are kept, and how the rest is drawn."""

    index: int
    resolution: int
    seed: int


def samples(model, n, t, seed=0, label=None, mean=False, chosen=None):
    """(n images, their latents): samples at temperature t, one per layer.

    With `chosen`, the chosen one of those samples drawn n times anew below its kept layers, as
    `sample.py decode` would with its latents and that seed.
    """
    kept, parts = [], []
    if chosen:
        k = layers_to_keep(model.vae, resolution=chosen.resolution)
        labels = model.labels(label, 1)
        with noting() as kept:
            draw_samples(model.vae, [chosen.index], t, seed, mean, labels)
        kept = kept[:k]
    for first in range(0, n, model.n_batch):
        indices = range(first, min(first + model.n_batch, n))
        labels = model.labels(label, len(indices))
        with noting() as latents:
            if chosen:
                again = [z.expand(len(indices), -1, -1, -1) for z in kept]
                images = decode_latents(
                    model.vae, again, indices, t, chosen.seed, mean, labels=labels
                )
            else:
                images = draw_samples(model.vae, indices, t, seed, mean, labels)
        parts.append((images, latents))
    images, latents = zip(*parts, strict=True)
    return np.concatenate(images), [torch.cat(zs) for zs in zip(*latents, strict=True)]


def layers_of_samples(model, n, chosen=None):
    """How many layers `samples` passes through."""
    batches = math.ceil(n / model.n_batch)
    return layers_of(model.vae)[1] * (batches + bool(chosen))


# ---- a picture -----------------------------------------------------------------------------


def read_picture(model, data):
    """The middle square of a picture's file, uint8 (1, S, S, channels).

    Args:
        data: the file's bytes.

    Raises:
        UserError: for bytes that are no picture.
    """
    H = model.vae.H
    try:
        image = fit(decode(data, model.background), H.image_size, enlarge=True)
    except ValueError as error:
        raise UserError(f"This file {error}. Choose another picture.") from None
    return np.array(of_channels(np.array(image)[None], channels_of(H)))


@dataclass
class Encoded:
    """The latents of an image, and its score, in nats per dimension."""

    latents: list
    distortion: float
    rates: list  # of each layer

    @property
    def bits_per_dim(self):
        return nats_to_bits(self.distortion + sum(self.rates))


class Encodings:
    """Encoded images, the last few of them, by what they are functions of: a slider's next move
    decodes alone.
    """

    def __init__(self, n=8):
        self._kept, self._n = OrderedDict(), n

    def of(self, model, image, seed=0, label=None):
        """An image's Encoded, image (1, S, S, channels)."""
        key = image.tobytes(), seed, label
        if key not in self._kept:
            self._kept[key] = encode(model, image, seed, label)
            if len(self._kept) > self._n:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]


def encode(model, image, seed=0, label=None):
    """The Encoded of an image: latents as `sample.py encode`'s, figures as `sample.py score`'s."""
    labels = model.labels(label, 1)
    latents = [s["z"] for s in latents_of(model.vae, image, [0], seed, labels=labels)]
    figures = scores_of(model.vae, image, [0], seed, labels=labels)
    return Encoded(latents, figures["distortion"].item(), figures["rates"][:, 0].tolist())


def reconstruction(model, encoded, k, t, seed=0, label=None, mean=False):
    """(what the first k layers keep of an image, its latents): the rest is sampled at t."""
    with noting() as latents:
        image = decode_latents(
            model.vae, encoded.latents[:k], [0], t, seed, mean, labels=model.labels(label, 1)
        )
    return image, latents


def by_resolution(model, encoded, seed=0, label=None, mean=False):
    """What each resolution adds to an image.

    Returns:
        (images, uint8 (steps, S, S, channels), layers of each step).
    """
    steps, labels = steps_of_forming(model.vae), model.labels(label, 1)
    images = [
        forming(model.vae, k, [0], None, REST, encoded.latents, seed, mean, labels) for k in steps
    ]
    return np.concatenate(images), steps


def layers_of_picture(model):
    """How many layers `encode` with `by_resolution` and `reconstruction` passes through."""
    encoding, decoding = layers_of(model.vae)
    return 2 * encoding + decoding * (len(steps_of_forming(model.vae)) + 1)


# ---- two pictures --------------------------------------------------------------------------


def mixture(model, a, b, k, stored=False, seed=0, label=None, mean=False):
    """(a mixture of two images, its latents): of a the first k layers, of b the others.

    b's are the means of its posterior given a's, or, `stored`, what they are in b alone.
    """
    with noting() as latents:
        image = mix(model.vae, a, b, k, stored, mean, seed, model.labels(label, 1))
    return image, latents[-len(model.bases) :]  # of the last pass


def way(model, a, b, n, seed=0, label=None, mean=False):
    """(n images on the line between the latents of two, their latents); all share their noise.

    Both ends are posterior means.
    """
    x, _ = preprocess(np.concatenate([a, b]), model.vae.H)
    stats = mean_latents(model.vae, x, labels=model.labels(label, 2))
    ends = [s["z"] for s in stats]  # each (2, Z, R, R)
    weights, parts = torch.linspace(0, 1, n, device=x.device), []
    for w in weights.split(model.n_batch):
        labels = model.labels(label, len(w))
        with noting() as latents:
            images = interpolate(model.vae, ends, w, len(ends), REST, seed, mean, labels)
        parts.append((images, latents))
    images, latents = zip(*parts, strict=True)
    return np.concatenate(images), [torch.cat(zs) for zs in zip(*latents, strict=True)]


def layers_of_mixture(model, k):
    encoding, decoding = layers_of(model.vae)
    return 2 * encoding + k


def layers_of_way(model, n):
    encoding, decoding = layers_of(model.vae)
    return encoding + decoding * math.ceil(n / model.n_batch)


# ---- files ---------------------------------------------------------------------------------


def write_latents(path, model, latents, names, label=None):
    """Writes an .npz of latents as `sample.py encode` does, for `sample.py decode`.

    Args:
        names: what each image is, one a row.
    """
    arrays = {f"z{i:03}": z.float().cpu().numpy() for i, z in enumerate(latents)}
    H, labels = model.vae.H, model.labels(label, len(names))
    about = {"images": np.array(names), "preset": str(H.hparam_sets), "weights": model.weights}
    if labels is not None:
        about["label"] = np.array(names_of(H, labels))
    np.savez(path, **arrays, **about)


def as_rgb(images):
    """uint8 (n, S, S, 3) of images (n, S, S, channels)."""
    return np.broadcast_to(images, (*images.shape[:-1], 3)).copy()
