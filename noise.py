"""Random numbers that belong to something: an image, a step, a purpose."""

import contextlib
import threading

import numpy as np
import torch

# The purposes of random numbers: each is a seed of its own, a function of the run's seed.
TRAINING, EVALUATION, PICTURES, IMPORTANCE, MIRRORING, DROPPING = range(6)
SAMPLING, ENCODING, DECODING, LABELLING = range(10, 14)


def noise_seed(*key):
    """A 63-bit seed that is a function of the whole key, a few integers of at least 0."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


def image_generators(indices, *key):
    """One generator per image, a function of the key, a few integers, and the image's index."""
    return [torch.Generator().manual_seed(noise_seed(*key, i)) for i in indices]


def bound_key(seed, k):
    """The key of image_generators of the k-th sample of an importance-weighted bound.

    The first sample is the ELBO's own: with one, the two are the same.
    """
    return (seed, IMPORTANCE, k) if k else (seed, EVALUATION)


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
    """The generators of a batch's images; `draws` counts the tensors that came from them.

    _NO_NOISE in place of generators makes zeros. `plan` and `drawn` are those of
    ahead.Generators.
    """

    def __init__(self, generators):
        self.generators = generators
        self.plan = getattr(generators, "plan", None)
        self.drawn = getattr(generators, "drawn", None)
        self.draws = 0

    def given(self, shape, dtype, fill):
        """The tensor that was drawn ahead for this call; None where none was, or for another."""
        if self.drawn is None:
            if self.plan is not None and dtype == torch.float32:
                self.plan.append((tuple(shape[1:]), fill))
            return None
        wanted = (tuple(shape), fill, dtype)
        if self.draws < len(self.drawn):
            t = self.drawn[self.draws]
            if (tuple(t.shape), self.plan[self.draws][1], t.dtype) == wanted:
                return t
        for row, passed in self.plan[: self.draws]:  # what the generators have given meanwhile
            for generator in self.generators:
                passed(torch.empty(row), generator=generator)
        self.drawn = self.plan = None
        return None


_NO_NOISE = object()  # in place of generators


class _Here(threading.local):
    """Where this thread's noise comes from now. (torch.compile follows no ContextVar.)"""

    of_images = drawn = shapes = None  # an _OfImages, a _Drawn, those that are being noted


_here = _Here()


@contextlib.contextmanager
def noise_of_images(generators):
    """In the body, row i of what fill_noise makes comes from generators[i], a CPU generator.

    Such noise belongs to its image, whatever the batch or the device. With None, nothing changes.
    A sampler that a program has put in place draws its own numbers: `draws` of the context's value
    then stays behind.
    """
    mine = _OfImages(generators)
    before = _here.of_images, _here.drawn
    if generators is not None:  # also of a pass whose other noise was drawn before
        _here.of_images, _here.drawn = mine, None
    try:
        yield mine
    finally:
        _here.of_images, _here.drawn = before


@contextlib.contextmanager
def without_noise():
    """In the body, what fill_noise makes is 0: a sample is its mean. Nothing is drawn.

    The context's value counts as that of noise_of_images.
    """
    with noise_of_images(_NO_NOISE) as mine:
        yield mine


def is_of_images():
    """Whether noise comes from the images' own generators now, or there is none."""
    return _here.of_images is not None


class _Drawn:
    """Tensors that fill_noise gives out in turn; `place` is the number of the next."""

    def __init__(self, tensors, place=0):
        self.tensors = tensors
        self.place = place


@contextlib.contextmanager
def noting_shapes():
    """The context's value gets (shape, fill) of each call of fill_noise in the body."""
    before, _here.shapes = _here.shapes, []
    try:
        yield _here.shapes
    finally:
        _here.shapes = before


def draws_alone(shapes, like, state):
    """Whether normals of these shapes are all that was drawn since the generator had `state`.

    That is the default generator of `like`'s device, which is left as it is found. (A sampler of a
    program's own, or dropout, draws besides.)
    """
    found = generator_state(like)
    set_generator_state(like, state)
    draw_normals(shapes, like)
    same = torch.equal(generator_state(like), found)
    set_generator_state(like, found)
    return same


def generator_state(like):
    """The state of the default generator of `like`'s device, bytes on the CPU."""
    return torch.cuda.get_rng_state(like.device) if like.is_cuda else torch.get_rng_state()


def set_generator_state(like, state):
    """Puts a generator_state back."""
    if like.is_cuda:
        torch.cuda.set_rng_state(state, like.device)
    else:
        torch.set_rng_state(state)


def noise_shapes(vae, n):
    """Of the noise of a pass of n images through a VAE's posterior: one shape a block, in order."""
    return [(n, block.zdim, block.base, block.base) for block in vae.decoder.dec_blocks]


def draw_normals(shapes, like):
    """A normal tensor per shape, in order: what fill_noise would draw for them, with these bits.

    From the default generator of `like`'s device, in `like`'s dtype.
    """
    return [torch.empty(s, dtype=like.dtype, device=like.device).normal_() for s in shapes]


@contextlib.contextmanager
def drawn_before(tensors):
    """In the body, fill_noise gives these tensors in turn, and draws nothing.

    So the pass in the body can be captured, compiled or computed anew. A sampler that a program
    has put in place draws its own numbers all the same: the context's `place`, how many tensors
    were given out, then stays behind.
    """
    mine = _Drawn(tensors)
    before, _here.drawn = _here.drawn, mine
    try:
        yield mine
    finally:
        _here.drawn = before


def is_drawn_before():
    """Whether noise has been drawn before the pass."""
    return _here.drawn is not None


def from_this_place(function):
    """function, which at every call is given the drawn_before tensors that are next now.

    A backward pass that computes a part of the forward pass anew, in another thread perhaps, has
    that part's noise again.
    """
    mine = _here.drawn
    if mine is None:
        return function
    place = mine.place

    def at_that_place(*args):
        part = _Drawn(mine.tensors, place)
        before, _here.drawn = _here.drawn, part
        try:
            return function(*args)
        finally:
            _here.drawn = before
            mine.place = max(mine.place, part.place)

    return at_that_place


class NoNoise(ValueError):
    """A pass draws otherwise than the noise that it was given."""


_given = None  # no context variable: compilers read none


@contextlib.contextmanager
def given_noise(tensors):
    """In the body fill_noise takes the tensors of a list, one after another, in place of new ones.

    What is taken leaves the list. This is for a body that a compiler reads, in one thread.
    """
    global _given
    before, _given = _given, tensors
    try:
        yield
    finally:
        _given = before


def fill_noise(shape, like, fill):
    """A contiguous tensor of the given shape, filled by fill(tensor, generator=...).

    The numbers come from the default generator of `like`'s device, or within noise_of_images from
    the images' own; within drawn_before they are there already, within without_noise they are 0.

    Raises:
        NoNoise: within drawn_before or given_noise, where another shape was drawn.
    """
    if _given is not None:
        if not _given or _given[0].shape != torch.Size(shape):
            raise NoNoise(f"no noise of shape {tuple(shape)} was given to this pass")
        return _given.pop(0)
    own, drawn = _here.of_images, _here.drawn
    if drawn is not None:
        drawn.place += 1
        if drawn.place > len(drawn.tensors) or drawn.tensors[drawn.place - 1].shape != shape:
            raise NoNoise(f"no noise of shape {tuple(shape)} was drawn before this pass")
        return drawn.tensors[drawn.place - 1]
    if own is None:
        if _here.shapes is not None:
            _here.shapes.append((tuple(shape), fill))
        return fill(like.new_empty(shape))  # in a vmap one an example, where `like` has
    if own.generators is _NO_NOISE:
        own.draws += 1
        return torch.zeros(shape, dtype=like.dtype, device=like.device)
    assert len(own.generators) == shape[0]
    given = own.given(shape, like.dtype, fill)
    own.draws += 1
    if given is not None:
        return given
    rows = torch.empty(shape, dtype=like.dtype)
    for row, generator in zip(rows, own.generators, strict=True):
        fill(row, generator=generator)
    return rows.to(like.device)
