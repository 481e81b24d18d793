"""The network against the original's figures: weights, forward, gradients, latents, samples."""

import math

import numpy as np
import pytest
import torch
from golden import FOLDER, figures, inputs, model, sha256_of_weights
from torch.utils.flop_counter import FlopCounterMode

from hps import Hyperparams, UserError, get_hparams
from vae import VAE, parse_layer_string

BATCH = {"tiny": 3, "tiny_lowbit": 3, "tiny_widths": 3, "tiny_res2": 3, "cifar10": 2}
by_name = pytest.mark.parametrize("name", BATCH)


@by_name
def test_initial_weights_are_the_originals_bit_for_bit(name):
    expected = figures(name)
    torch.manual_seed(0)
    vae = VAE(Hyperparams(expected["H"]))
    shapes = [[key, list(t.shape)] for key, t in vae.state_dict().items()]
    assert shapes == expected["state_dict"]
    assert sum(p.numel() for p in vae.parameters()) == expected["num_parameters"]
    sums = {k: vae.state_dict()[k].double().abs().sum() for k in expected["init_abs_sum_seed0"]}
    assert sums == pytest.approx(expected["init_abs_sum_seed0"], rel=1e-12)
    assert sha256_of_weights(vae) == expected["init_sha256_seed0"]


@by_name
def test_forward_and_gradients(name):
    expected, (H, vae) = figures(name), model(name)
    batch = inputs(H, BATCH[name], seed=7)
    torch.manual_seed(1)
    stats = vae(*batch)
    assert {k: v.item() for k, v in stats.items()} == pytest.approx(
        expected["forward_seed1"], rel=1e-5
    )
    stats["elbo"].backward()
    norms = {k: p.grad.double().norm().item() for k, p in vae.named_parameters()}
    assert norms == pytest.approx(expected["grad_norms"], rel=5e-4)
    total = math.hypot(*norms.values())
    assert total == pytest.approx(expected["total_grad_norm"], rel=1e-4)


@by_name
def test_latents_and_pictures(name):
    expected, (H, vae) = figures(name), model(name)
    n = BATCH[name]
    torch.manual_seed(2)
    with torch.no_grad():
        latents = vae.forward_get_latents(inputs(H, n, seed=7)[0])
    assert len(latents) == len(expected["latents_seed2"])
    for got, want in zip(latents, expected["latents_seed2"], strict=True):
        z, kl = got["z"].double(), got["kl"].double()
        assert list(z.shape) == list(kl.shape) == want["shape"]
        # The sum cancels: its error is in proportion to the terms.
        scale = math.sqrt(z.numel() * want["z_sq"])
        assert abs(z.sum().item() - want["z_sum"]) / scale < 1e-5
        assert (z**2).sum().item() == pytest.approx(want["z_sq"], rel=1e-4)
        assert kl.sum().item() == pytest.approx(want["kl_sum"], rel=1e-5)

    zs = [s["z"] for s in latents]
    pictures = {
        "uncond_t0.8_seed3": (3, lambda: vae.forward_uncond_samples(n, t=0.8)),
        "uncond_seed4": (4, lambda: vae.forward_uncond_samples(n)),
        "set_latents_all_seed5": (5, lambda: vae.forward_samples_set_latents(n, zs, t=0.1)),
        "set_latents_half_seed6": (
            6,
            lambda: vae.forward_samples_set_latents(n, zs[: len(zs) // 2], t=0.1),
        ),
    }
    for key, (seed, sample) in pictures.items():
        torch.manual_seed(seed)
        images = sample()
        assert images.dtype == np.uint8 and list(images.shape) == expected[key]["shape"]
        assert images.mean() == pytest.approx(expected[key]["mean"], rel=1e-3)
        assert images.std() == pytest.approx(expected[key]["std"], rel=1e-3)
        if name != "cifar10":
            want = np.load(FOLDER / f"{name}.npz")[key].astype(int)
            difference = np.abs(images.astype(int) - want)
            assert difference.max() <= 1 and (difference > 0).sum() <= 5


# parameters, stochastic layers, encoder blocks, state-dict entries, GFLOP of a posterior pass
PRESETS = {
    "cifar10": (39_145_700, 43, 33, 1393, 44.8),
    "imagenet32": (119_280_868, 78, 48, 2423, 140.7),
    "imagenet64": (125_005_860, 75, 65, 2482, 298.3),
    "ffhq256": (114_874_852, 66, 68, 2272, 1144),
    "ffhq1024": (109_366_904, 70, 70, 2392, 754.5),
}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_have_the_published_size(preset):
    H = get_hparams(preset)
    with torch.device("meta"), FlopCounterMode(display=False) as flop:  # shapes, no arithmetic
        vae = VAE(H)
        image = torch.empty(1, H.image_size, H.image_size, 3)
        vae(image, image)
    parameters, layers, enc_blocks, entries, gflop = PRESETS[preset]
    assert sum(p.numel() for p in vae.parameters()) == parameters
    assert len(vae.decoder.dec_blocks) == layers
    assert len(vae.encoder.enc_blocks) == enc_blocks
    assert len(vae.state_dict()) == entries
    assert flop.get_total_flops() / 1e9 == pytest.approx(gflop, rel=1e-3)


def test_hooks_see_every_convolution():
    flop = []

    def count(conv, _, out):
        flop.append(2 * conv.weight.numel() * out.shape[2] * out.shape[3])

    with torch.device("meta"):
        vae = VAE(get_hparams("cifar10"))
        for module in vae.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.register_forward_hook(count)
        image = torch.empty(1, 32, 32, 3)
        vae(image, image)
    assert sum(flop) / 1e9 == pytest.approx(44.8, rel=1e-3)


def test_hooks_change_nothing():
    H, vae = model("tiny")
    batch, seen, names_seen, grads = inputs(H, 3, seed=7), [], set(), []

    def run():
        vae.zero_grad()
        torch.manual_seed(1)
        stats = vae(*batch)
        stats["elbo"].backward()
        grads.append({k: p.grad.clone() for k, p in vae.named_parameters()})
        torch.manual_seed(3)
        return stats["elbo"].item(), vae.forward_uncond_samples(3).astype(int)

    def see(module, _, out):
        names_seen.add(names[module])
        if isinstance(out, torch.Tensor):
            seen.append((out, out.detach().clone()))

    elbo, pictures = run()
    names = {module: name for name, module in vae.named_modules()}
    for module in names:
        module.register_forward_hook(see)
        module.register_full_backward_hook(lambda *_: None)
    hooked_elbo, hooked_pictures = run()
    assert hooked_elbo == pytest.approx(elbo, rel=1e-5)
    assert np.abs(pictures - hooked_pictures).max() <= 1
    for key, grad in grads[0].items():
        assert (grads[1][key] - grad).norm() <= 5e-4 * grad.norm(), key
    assert all(torch.equal(out, then) for out, then in seen)  # none was written over
    lists = torch.nn.ModuleList, torch.nn.ParameterList
    called = {name for name, m in vae.named_modules() if not isinstance(m, lists)}
    assert names_seen == called - {"decoder.out_net"}  # its loss and its samples are called


def test_a_module_put_in_place_of_a_convolution_is_called():
    class Doubled(torch.nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    for conv in ("enc.c1", "enc.c3", "prior.c4", "resnet.c4"):
        H, vae = model("tiny")
        elbos = []
        for kind in (torch.nn.Conv2d, Doubled):
            vae.get_submodule(f"decoder.dec_blocks.3.{conv}").__class__ = kind
            torch.manual_seed(1)
            with torch.no_grad():
                elbos.append(vae(*inputs(H, 3, seed=7))["elbo"].item())
        assert elbos[0] != elbos[1], conv


def test_parse_layer_string():
    assert parse_layer_string("1x2,4m1, 8d2,16") == [(1, None)] * 2 + [(4, 1), (8, 2), (16, None)]


TINY = {"image_size": 8, "image_channels": 3, "width": 16, "zdim": 2, "bottleneck_multiple": 0.25,
        "no_bias_above": 64, "num_mixtures": 2, "custom_width_str": "", "dataset": "digits",
        "enc_blocks": "8x1,8d2,4d4,1x1", "dec_blocks": "1x1,4m1,8m4"}  # fmt: skip


@pytest.mark.parametrize(
    "change, quoted",
    [
        ({"enc_blocks": "8x1,8q2,4d4,1x1"}, "'8q2'"),
        ({"enc_blocks": "8x1,,4d4"}, "''"),
        ({"enc_blocks": None}, "None"),
        ({"enc_blocks": "8x0,8d2,4d4"}, "'8x0'"),
        ({"enc_blocks": "8d2,4m8,4d4,1x1"}, "'4m8'"),
        ({"enc_blocks": "8x1,8d3,4d4"}, "'8d3'"),
        ({"enc_blocks": "16x1,16d2,8d2,4d4"}, "'16x1'"),
        ({"image_size": 16}, "'8x1'"),
        ({"dec_blocks": "1x1,2m1,4m2,8m4"}, "'2m1'"),
        ({"dec_blocks": "1x1,4d2,8m4"}, "'4d2'"),
        ({"dec_blocks": "1x1,4m1"}, "'1x1,4m1'"),
        ({"dec_blocks": "4x1,8m4"}, "end at 1"),
        ({"dec_blocks": "1x1,4m1,8m3"}, "'8m3'"),
        ({"dec_blocks": "1x1,8m4,4m1", "no_bias_above": 1}, "'8m4'"),
        ({"custom_width_str": "4:32,1:8"}, "'4d4'"),
        ({"custom_width_str": "8:32"}, "'8:32'"),
        ({"custom_width_str": "4-32"}, "'4-32'"),
    ],
)
def test_blocks_that_do_not_fit_are_refused_by_name(change, quoted):
    VAE(Hyperparams(TINY))
    with pytest.raises(UserError) as error:
        VAE(Hyperparams(TINY | change))
    assert quoted in str(error.value) and "\n" not in str(error.value)
