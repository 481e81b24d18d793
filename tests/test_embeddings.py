"""Embeddings: images as vectors, the same each time, in the order of public code; and back."""

import numpy as np
import pytest
import torch
from fakes import noise

import vae as vae_module
from batches import preprocess
from errors import UserError
from hps import get_hparams
from vae import VAE, DecBlock


def model_of(preset, **options):
    """A VAE with weights that make more of an image than the initial ones."""
    torch.manual_seed(0)
    model = VAE(get_hparams(preset, device="cpu", **options)).requires_grad_(False).eval()
    for p in model.parameters():
        p.add_(torch.randn_like(p) * 0.05)
    return model


# Layers: two at 1x1, three at 8x8, two at 32x32.
SMALL = {
    "width": 16, "zdim": 4, "num_mixtures": 2, "custom_width_str": "",
    "enc_blocks": "32x1,32d4,8x1,8d8,1x1", "dec_blocks": "1x2,8m1,8x2,32m8,32x1",
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return model_of("cifar10", **SMALL)


@pytest.fixture(scope="module")
def x(model):
    return preprocess(noise(14, 32), model.H)[0]


def test_an_embedding_is_the_same_each_time_and_draws_nothing(model, x):
    before = torch.get_rng_state()
    e = model.embed(x)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    assert torch.equal(model.embed(x), e)
    assert e.dtype == torch.float32 and e.shape == (14, 4 * (2 + 3 * 64 + 2 * 1024))
    for size in (1, 7):
        parts = torch.cat([model.embed(part) for part in x.split(size)])
        assert ((parts - e).abs().amax(dim=0) <= 1e-4 * e.std(dim=0)).all()


def test_it_is_the_means_of_the_posterior_in_the_order_of_public_code(model, x):
    stats = model.forward_get_latents(x, get_gaussians=True, mean=True)
    flat = torch.cat([s["z"].reshape(14, -1) for s in stats], dim=1)
    assert torch.equal(flat, model.embed(x))
    for s in stats:
        assert torch.equal(s["z"], s["qm"])
    # Deeper means depend on the z above: of drawn ones they are others.
    drawn = model.forward_get_latents(x, get_gaussians=True)
    assert torch.equal(drawn[0]["qm"], stats[0]["qm"])
    assert not torch.allclose(drawn[4]["qm"], stats[4]["qm"], atol=1e-3)


def test_layers_or_a_resolution(model, x):
    whole = model.embed(x)
    for given, width in (
        ({"layers": 1}, 4), ({"layers": 5}, 776), ({"resolution": 1}, 8), ({"resolution": 8}, 776),
    ):  # fmt: skip
        assert torch.equal(model.embed(x, **given), whole[:, :width])
    for given, words in (
        ({"layers": 8}, "layers 8: this model has 7 layers"),
        ({"layers": 0}, "layers 0: this model has 7"),
        ({"resolution": 2}, "resolution 2: .* 1, 8, 32"),
        ({"layers": 2, "resolution": 4}, "leave one of them out"),
    ):
        with pytest.raises(UserError, match=words):
            model.embed(x, **given)


def test_imagenet64_gives_the_numbers_of_public_code():
    """The first 31 of its layers, narrower here: the shapes of latents are the preset's."""
    model = model_of("imagenet64", width=16, custom_width_str="", num_mixtures=1)
    x, _ = preprocess(noise(1, 64), model.H)
    e = model.embed(x, layers=31)
    assert e.shape == (1, 91_168)
    stats = model.forward_get_latents(x, mean=True)
    assert torch.equal(e[0], torch.cat([s["z"].flatten() for s in stats[:31]]))
    assert [z.shape[1:] for z in model.unflatten(e)] == [s["z"].shape[1:] for s in stats[:31]]


def test_unflatten_is_the_way_back(model, x):
    stats = model.forward_get_latents(x, mean=True)
    for k in (1, 5, 7):
        e = model.embed(x, layers=k)
        for rows in (e, e.numpy(), e.double().numpy(), e.double()):
            found = model.unflatten(rows)
            assert len(found) == k and all(z.dtype == torch.float32 for z in found)
            assert all(torch.equal(z, s["z"]) for z, s in zip(found, stats, strict=False))
    half = model.unflatten(model.embed(x, layers=5).half().numpy())
    assert torch.allclose(half[4], stats[4]["z"], rtol=1e-3, atol=1e-3)
    decoded = model.forward_samples_set_latents(14, model.unflatten(model.embed(x)), mean=True)
    direct = model.forward_samples_set_latents(14, [s["z"] for s in stats], mean=True)
    assert np.array_equal(decoded, direct)
    for rows, words in (
        (np.zeros((2, 9)), "9 numbers .* 4, 8, 264"),
        (np.zeros((2, 8), int), "int64 .*floats"),
        (np.zeros(8), "a row an image"),
    ):
        with pytest.raises(UserError, match=words):
            model.unflatten(rows)


def test_rows_of_any_order_in_memory(model, x):
    e = model.embed(x).numpy()
    for rows in (e.astype(">f8"), e[::-1][::-1], np.asfortranarray(e), e.astype(np.longdouble)):
        for z, own in zip(model.unflatten(rows), model.unflatten(e), strict=True):
            assert torch.equal(z, own)


def test_what_is_no_input_is_refused(model, x):
    for images in (noise(2, 32), torch.from_numpy(noise(2, 32))):
        with pytest.raises(UserError, match=r"uint8.*preprocess\(images, model.H\)"):
            model.embed(images)
    with pytest.raises(UserError, match=r"\(14, 32, 4, 3\)"):
        model.embed(x[:, :, :4])


def test_what_draws_otherwise_is_refused_by_name(model, x, monkeypatch):
    class Other(DecBlock):
        def sample(self, x, acts, gaussians=None):
            return super().sample(x, acts, gaussians)

    def own_sampler(mu, logsigma):
        return mu + logsigma.exp() * torch.randn_like(mu)

    with monkeypatch.context() as m:
        m.setattr(vae_module, "DecBlock", Other)
        other = VAE(model.H)
    with pytest.raises(UserError, match="Other.sample stands in the place of vae.DecBlock.sample"):
        other.embed(x)
    with monkeypatch.context() as m:
        m.setattr(vae_module, "draw_gaussian_diag_samples", own_sampler)
        with pytest.raises(UserError, match="own_sampler stands in the place of vae_helpers"):
            model.forward_get_latents(x, mean=True)
        own_sampler.__module__ = "vae_helpers"  # as in a fork's own file
        own_sampler.__qualname__ = "draw_gaussian_diag_samples"
        with pytest.raises(UserError, match="draws numbers of its own"):
            model.embed(x)
    model.embed(x)
