"""Noise drawn ahead has the bits of noise drawn as the network asks for it."""

import numpy as np
import pytest
import torch
from golden import inputs, model

import ahead
from ahead import Ahead
from noise import fill_noise, image_generators, noise_of_images

KEY = 3, 1
N = 7


def following(batch, key):
    return range(batch[-1] + 1, min(batch[-1] + 4, N)), key


@pytest.fixture(autouse=True)
def _on(monkeypatch):
    monkeypatch.setattr(ahead, "AS_ON_CUDA", True)


def batches():
    return [range(0, 3), range(3, 6), range(6, 7)]


@pytest.mark.parametrize("task", ["latents", "samples"])
@torch.inference_mode()
def test_every_batch_has_the_bits_of_its_generators(task):
    H, vae = model("tiny")
    x, _ = inputs(H, N, seed=7)
    generators = Ahead("cpu", following)

    def make(batch, generators):
        if task == "samples":
            return [vae.forward_uncond_samples(len(batch), 0.9, generators)]
        of_layers = vae.forward_get_latents(x[batch.start : batch.stop], generators)
        return [s["z"].numpy() for s in of_layers]

    for number, batch in enumerate(batches()):
        mine = generators(batch, *KEY)
        assert (mine.drawn is not None) == (number > 0)
        made = make(batch, mine)
        expected = make(batch, image_generators(batch, *KEY))
        assert all(np.array_equal(*pair) for pair in zip(made, expected, strict=True))
    assert generators.under_way is None  # nothing is drawn after the last
    assert len(generators.plan) == len(vae.decoder.dec_blocks) + 2 * (task == "samples")


def draw(generators, *shapes):
    like = torch.empty(())
    with noise_of_images(generators) as own:
        drawn = [fill_noise((len(generators), *s), like, torch.Tensor.normal_) for s in shapes]
    assert own.draws == len(shapes)
    return drawn


def test_a_network_that_draws_otherwise_in_another_batch_has_its_own_numbers():
    generators = Ahead("cpu", following)
    draw(generators(range(0, 3), *KEY), (20,), (4, 2))
    for batch, shapes in (
        (range(3, 6), [(20,), (5, 2), (3,)]),
        (range(6, 7), [(20,), (4, 2), (9,)]),
    ):
        given = generators(batch, *KEY)
        assert given.drawn is not None
        expected = draw(image_generators(batch, *KEY), *shapes)
        assert all(torch.equal(*pair) for pair in zip(draw(given, *shapes), expected, strict=True))


def test_another_batch_than_the_following_and_too_large_a_one(monkeypatch):
    generators = Ahead("cpu", following)
    draw(generators(range(0, 3), *KEY), (20,))
    generators(range(3, 6), *KEY)
    again = generators(range(1, 3), *KEY)  # not what was drawn ahead
    assert torch.equal(draw(again, (20,))[0], draw(image_generators(range(1, 3), *KEY), (20,))[0])
    monkeypatch.setattr(ahead, "MOST_BYTES", 4 * 2 * 20)
    assert generators(range(1, 3), *KEY).drawn is not None
    large = generators(range(3, 6), *KEY)
    assert large.drawn is None
    assert torch.equal(draw(large, (20,))[0], draw(image_generators(range(3, 6), *KEY), (20,))[0])


def test_an_error_of_a_thread_is_the_commands():
    generators = Ahead("cpu", following)
    draw(generators(range(0, 3), *KEY), (20,))
    generators.plan[0] = ((20,), lambda row, generator: row / 0 + {}[1])
    with pytest.raises(KeyError):
        generators(range(3, 6), *KEY)
