"""What a model makes of images: two pictures in one, what some layers keep of one."""

import numpy as np
import pytest
import torch
from fakes import nearly_equal, noise

import vae as vae_module
from batches import of_channels, preprocess
from synthesis import decode_latents, mix, reconstruct
from weights import load_model

IMAGES = of_channels(noise(4, 8), 1)


@pytest.fixture
def model(folder):
    return load_model(folder / "ema.th", device="cpu")


@pytest.mark.parametrize("k", [0, 1, 4, 7])
def test_coarse_latents_of_one_picture_with_fine_ones_of_another(model, monkeypatch, k):
    """The fine ones are means of the other's posterior given the coarse; or, as stored, its own."""
    a, b = IMAGES[:2], IMAGES[2:]

    def means(images, fixed=()):
        """z of each layer: those that are fixed, then the posterior's means, given those above."""
        rest = iter(fixed)
        with monkeypatch.context() as m:
            m.setattr(vae_module, "draw_gaussian_diag_samples", lambda mu, _: next(rest, mu))
            return [s["z"] for s in model.forward_get_latents(preprocess(images, model.H)[0])]

    of_a, of_b = means(a), means(b)
    given = means(b, of_a[:k])
    assert k in (0, 7) or not torch.allclose(given[-1], of_b[-1], atol=1e-2)
    for stored, latents in ((False, given), (True, [*of_a[:k], *of_b[k:]])):
        for how in ({"seed": 3}, {"mean": True}):
            direct = decode_latents(model, latents, range(2), **how)
            assert nearly_equal(mix(model, a, b, k, stored, **how), direct), (stored, how)


def test_a_reconstruction_keeps_the_first_layers(model):
    images = IMAGES[:2]
    whole = reconstruct(model, images, range(2), 7, mean=True)
    assert np.array_equal(whole, reconstruct(model, images, range(2), 7, t=1.0, mean=True))
    for k in (0, 5):
        assert not np.array_equal(whole, reconstruct(model, images, range(2), k, mean=True))
