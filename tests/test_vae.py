"""The network against the original's figures; its parts by themselves; what its methods promise."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from golden import FOLDER, figures, generators, inputs, model, sha256_of_weights
from reference import PlainVAE
from torch.utils.flop_counter import FlopCounterMode

from hps import Hyperparams, get_hparams
from noise import noise_of_images
from vae import VAE, Block, pad_channels
from vae_helpers import draw_gaussian_diag_samples, gaussian_analytical_kl, get_3x3

# ---- the original's figures ------------------------------------------------------------------


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


# ---- hooks, exchanged modules, copies --------------------------------------------------------


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


@pytest.mark.parametrize("small", [False, pytest.param(True, marks=pytest.mark.small)])
@pytest.mark.parametrize(
    "places",
    [
        ["decoder.out_net.out_conv"],
        ["decoder.dec_blocks.3.z_proj"],
        ["decoder.dec_blocks.3.enc.c1"],
        ["decoder.dec_blocks.3.enc.c1", "decoder.dec_blocks.3.prior.c1"],
        ["decoder.dec_blocks.3.prior.c4", "encoder.enc_blocks.0.c1"],
    ],
)
def test_a_kernel_of_3_in_place_of_one_of_1(places, small):
    """Where it is the plain convolution, too, that a fused form may replace."""
    H, vae = model("tiny")
    for place in places:
        parent, _, name = place.rpartition(".")
        conv = getattr(vae.get_submodule(parent), name)
        setattr(vae.get_submodule(parent), name, get_3x3(conv.in_channels, conv.out_channels))
    found = []
    for m in (vae, PlainVAE(vae)):
        torch.manual_seed(1)
        loss = m(*inputs(H, 3, seed=7))["elbo"]
        found.append((loss.item(), m.forward_uncond_samples(3).astype(int)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    difference = np.abs(found[0][1] - found[1][1])
    assert difference.max() <= 1 and (difference > 0).sum() <= 5


@torch.no_grad()
@pytest.mark.parametrize("name", ["enc.c1", "prior.c1", "prior.c4", "resnet.c3"])
def test_what_is_no_module_in_place_of_a_convolution_is_called(name):
    H, vae = model("tiny")
    block, _, conv = f"decoder.dec_blocks.3.{name}".rpartition(".")
    block, elbos, calls = vae.get_submodule(block), [], []
    for replaced in (False, True):
        if replaced:
            own = getattr(block, conv)
            delattr(block, conv)
            setattr(block, conv, lambda t, own=own: (calls.append(1), own(t))[1])
        torch.manual_seed(1)
        elbos.append(vae(*inputs(H, 3, seed=7))["elbo"].item())
    assert calls == [1] and elbos[1] == pytest.approx(elbos[0], rel=1e-5)


@pytest.mark.parametrize("grad", [True, False])
def test_what_a_z_fn_of_a_programs_own_gave_is_not_written_to(grad):
    """Nor what a program reads of one by the hook of its convolution."""
    H, vae = model("tiny")
    kept, calls = [], {"z_fn": 0, "hook": 0}

    def keep(name, out):
        kept.append((out, out.detach().clone()))
        calls[name] += 1
        return out

    def run():
        with torch.set_grad_enabled(grad):
            torch.manual_seed(1)
            elbo = vae(*inputs(H, 3, seed=7))["elbo"].item()
        torch.manual_seed(1)
        return elbo, vae.forward_uncond_samples(3).astype(int)

    elbo, pictures = run()
    first, *_, last = vae.decoder.dec_blocks
    own = first.z_fn
    first.z_fn = lambda z: keep("z_fn", own(z))
    last.z_proj.register_forward_hook(lambda module, _, out: keep("hook", out))
    other_elbo, other_pictures = run()
    assert other_elbo == pytest.approx(elbo, rel=1e-5)
    assert np.abs(other_pictures - pictures).max() <= 1
    assert calls == {"z_fn": 2, "hook": 2}
    assert all(torch.equal(out, then) for out, then in kept)


@torch.no_grad()
def test_a_state_of_fewer_bits_is_promoted():
    """As x + z_fn(z) is: a program's own sample_uncond may give another dtype than its z's."""
    H, vae = model("tiny")
    block, given = vae.decoder.dec_blocks[0], vae.decoder._start(2)
    own, seen = block.sample_uncond, []

    def sample_uncond(*args):
        z, x = own(*args)
        return z, x.bfloat16()

    block.sample_uncond = sample_uncond
    block.resnet.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    block.forward_uncond(given)
    assert seen == [torch.float32]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_on_the_way_of_their_gradients(checkpointing):
    """Nothing reaches the input convolution where the gradient of its activations is stopped."""
    H, vae = model("tiny")
    if checkpointing:
        vae.checkpoint_activations()
    x, target = inputs(H, 3, seed=7)
    activations = vae.encoder(x)
    assert all(t.is_contiguous() for t in activations.values())
    activations[H.image_size].register_hook(torch.zeros_like)
    px_z, _ = vae.decoder(activations)
    vae.decoder.out_net.nll(px_z, target).sum().backward()
    assert not vae.encoder.in_conv.weight.grad.any()
    assert vae.encoder.enc_blocks[-1].c1.weight.grad.any()


class Strict:
    """Only what VAE(H) reads; any other name raises, as a programs' own class would."""

    def __init__(self, H):
        names = ("dataset", "image_size", "image_channels", "width", "zdim", "custom_width_str",
                 "bottleneck_multiple", "no_bias_above", "num_mixtures", "enc_blocks",
                 "dec_blocks")  # fmt: skip
        for name in names:
            setattr(self, name, H[name])


def test_any_object_with_the_eleven_fields_makes_a_vae():
    H, net = model("tiny")
    other = Strict(H)
    other.custom_width_str = other.dataset = None
    built = VAE(other)
    built.load_state_dict(net.state_dict())
    for v in (net, built):
        torch.manual_seed(0)
        v.elbo = v(*inputs(H, 2, 0))["elbo"].item()
    assert built.elbo == net.elbo


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copied_model_is_equal_and_independent(how):
    H, net = model("tiny")
    batch = inputs(H, 2, 0)

    def elbo(v):
        torch.manual_seed(0)
        return v(*batch)["elbo"].item()

    other, before = how(net), elbo(net)
    assert elbo(other) == before
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.01)
    assert elbo(net) != before and elbo(other) == before


# ---- its parts -------------------------------------------------------------------------------


def test_pad_channels():
    t = torch.randn(2, 3, 4, 4)
    padded = pad_channels(t, 5)
    assert padded.shape == (2, 5, 4, 4) and torch.equal(padded[:, :3], t)
    assert not padded[:, 3:].any() and pad_channels(t, 3).shape[1] == 3
    with pytest.raises(ValueError):
        pad_channels(t, 2)


def test_block():
    x = torch.randn(2, 4, 8, 8)
    block = Block(4, 2, 6, down_rate=2, zero_last=True)
    assert block(x).shape == (2, 6, 4, 4) and not block(x).any()
    assert Block(4, 2, 4, residual=True, zero_last=True)(x).equal(x)
    assert Block(4, 2, 4, use_3x3=False).c2.weight.shape == (2, 2, 1, 1)


@pytest.fixture(scope="module")
def tiny():
    return model("tiny")


def test_encoder_and_decoder(tiny):
    H, net = tiny
    x, target = inputs(H, 2, 0)
    activations = net.encoder(x)
    assert type(activations) is dict
    for resolution, t in activations.items():
        assert t.shape == (2, net.encoder.widths[resolution], resolution, resolution)
    px_z, stats = net.decoder(activations)
    assert px_z.shape == (2, H.width, H.image_size, H.image_size)
    assert [list(s) for s in stats] == [["kl"]] * len(net.decoder.dec_blocks)
    px_z, stats = net.decoder(activations, get_latents=True)
    for block, s in zip(net.decoder.dec_blocks, stats, strict=True):
        shape = (2, block.zdim, block.base, block.base)
        assert s["z"].shape == s["kl"].shape == shape and not s["z"].requires_grad
    parameters = net.decoder.out_net(px_z)
    assert parameters.shape == (2, H.image_size, H.image_size, 10 * H.num_mixtures)
    assert net.decoder.out_net.nll(px_z, target).shape == (2,)
    image = net.decoder.out_net.sample(px_z)
    assert type(image) is np.ndarray and image.dtype == np.uint8 and image.shape == x.shape
    assert net.decoder.out_net.width == H.width and net.decoder.out_net.out_conv.weight.ndim == 4
    assert net.decoder.resolutions == sorted({b.base for b in net.decoder.dec_blocks})
    biased = [r for r in net.decoder.resolutions if r <= H.no_bias_above]
    assert [p.shape[2] for p in net.decoder.bias_xs] == biased
    assert net.decoder.H is H and net.decoder.widths[H.image_size] == H.width


def test_a_step_of_a_block_by_hand(tiny):
    """Programs run the blocks themselves; the state is a plain dict, nothing written in place."""
    H, net = tiny
    activations = net.encoder(inputs(H, 2, 0)[0])
    decoder = net.decoder

    def by_hand(xs, step):
        for block in decoder.dec_blocks:
            before = {k: t.clone() for k, t in xs.items()}
            held = dict(xs)
            xs = step(block, xs)
            assert type(xs) is dict
            assert all(held[k].equal(before[k]) for k in held)
        return decoder.final_fn(xs[H.image_size])

    constants = [p.detach().clone() for p in decoder.bias_xs]

    def start(n):
        return {p.shape[2]: p.repeat(n, 1, 1, 1) for p in decoder.bias_xs}

    torch.manual_seed(5)
    want = decoder(activations)[0]
    torch.manual_seed(5)
    got = by_hand(start(2), lambda block, xs: block(xs, activations)[0])
    assert torch.allclose(got, want, atol=1e-5)
    torch.manual_seed(6)
    want = decoder.forward_uncond(2, t=0.7)
    torch.manual_seed(6)
    got = by_hand(start(2), lambda block, xs: block.forward_uncond(xs, 0.7))
    assert torch.allclose(got, want, atol=1e-5)
    # The constants themselves, of batch 1, serve as a state too.
    torch.manual_seed(6)
    xs = {p.shape[2]: p for p in decoder.bias_xs}
    assert by_hand(xs, lambda block, xs: block.forward_uncond(xs)).shape[0] == 1
    assert all(p.equal(c) for p, c in zip(decoder.bias_xs, constants, strict=True))
    block = decoder.dec_blocks[-1]
    z = torch.randn(2, block.zdim, block.base, block.base)
    assert torch.allclose(block.z_fn(z), block.z_proj(z), atol=1e-6)
    assert block.widths[block.base] == block.z_fn(z).shape[1]
    assert decoder.dec_blocks[0].mixin is None and isinstance(block.base, int)


@torch.no_grad()
def test_manual_latents(tiny):
    """Any iterable, shorter than the blocks, None entries sampled; t a number or one a block."""
    H, net = tiny
    zs = [s["z"] for s in net.forward_get_latents(inputs(H, 2, 0)[0])]
    n = len(zs)

    def run(latents, t=None):
        torch.manual_seed(3)
        return net.decoder.forward_manual_latents(2, latents, t)

    whole = run(zs)
    for latents in (tuple(zs), dict(enumerate(zs)).values(), (z for z in zs), zs[:]):
        assert run(latents).equal(whole)
    free = run([])
    torch.manual_seed(3)
    assert net.decoder.forward_uncond(2).equal(free)
    assert run([None] * n).equal(free) and run(zs[:1] + [None]).equal(run(zs[:1]))
    cold = run([], 0.5)
    assert cold.equal(run([], [0.5] * n)) and not cold.equal(free)
    assert not run([], [None] * (n - 1) + [0.1]).equal(free)
    torch.manual_seed(3)
    assert net.decoder.forward_uncond(2, [0.5] * n, y=None).equal(cold)
    assert run([], 0).isfinite().all()  # the prior's means
    with pytest.raises(ValueError, match="latents"):
        run([*zs, zs[0]])
    with pytest.raises(ValueError, match="temperatures"):
        run([], [1.0])


# ---- its methods -----------------------------------------------------------------------------


def test_forward_gives_exactly_three_scalars(tiny):
    H, net = tiny
    stats = net(*inputs(H, 2, 0))
    assert list(stats) == ["elbo", "distortion", "rate"]
    assert all(t.shape == () and t.dtype == torch.float32 for t in stats.values())
    assert stats["elbo"].item() == pytest.approx((stats["distortion"] + stats["rate"]).item())


@torch.no_grad()
def test_samples(tiny):
    H, net = tiny
    zs = [s["z"] for s in net.forward_get_latents(inputs(H, 2, 0)[0])]
    for images in (
        net.forward_uncond_samples(2),
        net.forward_uncond_samples(2, t=0.5),
        net.forward_samples_set_latents(2, zs[:2], t=0.1),
    ):
        assert type(images) is np.ndarray and images.dtype == np.uint8
        assert images.shape == (2, H.image_size, H.image_size, 3)


@torch.no_grad()
def test_gaussians_are_those_of_z_and_kl(tiny):
    H, net = tiny
    x, _ = inputs(H, 2, 0)
    plain = net.forward_get_latents(x, generators(2, 1))
    full = net.forward_get_latents(x, generators(2, 1), get_gaussians=True)
    noise = generators(2, 1)
    for p, s in zip(plain, full, strict=True):
        assert p["z"].equal(s["z"]) and p["kl"].equal(s["kl"]) and list(p) == ["z", "kl"]
        with noise_of_images(noise):
            z = draw_gaussian_diag_samples(s["qm"], s["qv"])
        assert torch.allclose(z, s["z"], atol=1e-6)
        kl = gaussian_analytical_kl(s["qm"], s["pm"], s["qv"], s["pv"])
        assert torch.allclose(kl, s["kl"], atol=1e-6)


@torch.no_grad()
def test_elbo_per_image_and_rate_per_layer(tiny):
    H, net = tiny
    batch = inputs(H, 3, 0)
    stats = net(*batch, per_image=True, generators=generators(3, 1))
    assert all(t.shape == (3,) for t in stats.values())
    alone = [
        net(x[None], t[None], generators=generators(3, 1)[i : i + 1])["elbo"].item()
        for i, (x, t) in enumerate(zip(*batch, strict=True))
    ]
    assert stats["elbo"].tolist() == pytest.approx(alone, rel=1e-5)
    _, rates = net.distortion_and_rate(*batch, generators(3, 1), per_layer=True)
    assert rates.shape == (len(net.decoder.dec_blocks), 3)
    assert torch.allclose(rates.sum(0), stats["rate"], rtol=1e-5)


@torch.no_grad()
def test_pictures_as_floats_are_those_of_levels(tiny):
    H, net = tiny
    levels = net.forward_uncond_samples(2, 0.8, generators(2, 3))
    floats = net.forward_uncond_samples(2, 0.8, generators(2, 3), as_float=True)
    assert floats.dtype == np.float32 and abs(floats).max() <= 1
    assert np.array_equal(((floats + 1) * np.float32(127.5)).astype(np.uint8), levels)
