"""Random numbers that belong to something: an image, a step, a purpose."""

import contextlib
import contextvars

import numpy as np
import torch

# The purposes of random numbers: each is a seed of its own, a function of the run's seed.
TRAINING, EVALUATION, PICTURES, IMPORTANCE, MIRRORING, DROPPING = range(6)
SAMPLING, ENCODING, DECODING = range(10, 13)


def noise_seed(*key):
    """A 63-bit seed that is a function of the whole key, a few integers of at least 0."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


def image_generators(indices, *key):
    """One generator per image, a function of the key, a few integers, and the image's index."""
    return [torch.Generator().manual_seed(noise_seed(*key, i)) for i in indices]


def chosen(probability, indices, *key):
    """Which images are chosen, each with a probability: bool (n,), a function of key and index.

    It is the same wherever an image is looked at: in any batch, worker or process.
    """
    # SplitMix64 (Steele, Lea, Flood 2014) of the index, from a state that is a function of the key.
    x = np.asarray(indices, dtype=np.uint64) + np.uint64(1)
    x = x * np.uint64(0x9E3779B97F4A7C15) + np.uint64(noise_seed(*key))
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = x ^ (x >> np.uint64(31))
    return (x >> np.uint64(11)) * 2.0**-53 < probability


class _OfImages:
    """The generators of a batch's images; `draws` counts the tensors that came from them."""

    def __init__(self, generators):
        self.generators = generators
        self.draws = 0


_of_images = contextvars.ContextVar("the generators of the images in work", default=None)


@contextlib.contextmanager
def noise_of_images(generators):
    """In the body, row i of what fill_noise makes comes from generators[i], a CPU generator.

    Such noise belongs to its image, whatever the batch or the device. With None, nothing changes.
    A sampler that a program has put in place draws its own numbers: `draws` of the context's value
    then stays behind.
    """
    mine = _OfImages(generators)
    token = _of_images.set(mine if generators is not None else _of_images.get())
    try:
        yield mine
    finally:
        _of_images.reset(token)


def is_of_images():
    """Whether noise comes from the images' own generators now."""
    return _of_images.get() is not None


def fill_noise(shape, like, fill):
    """A contiguous tensor of the given shape, filled by fill(tensor, generator=...).

    The numbers come from the default generator of `like`'s device, or within noise_of_images from
    the images' own.
    """
    own = _of_images.get()
    if own is None:
        return fill(torch.empty(shape, dtype=like.dtype, device=like.device))
    assert len(own.generators) == shape[0]
    own.draws += 1
    rows = torch.empty(shape, dtype=like.dtype)
    for row, generator in zip(rows, own.generators, strict=True):
        fill(row, generator=generator)
    return rows.to(like.device)
