"""What forks rely on beyond names, across the rooms: what the original's modules do is done."""

import argparse
import json
import math
from types import MappingProxyType

import numpy as np
import pytest
import torch
from fakes import write_cifar10
from golden import inputs, model
from torch import nn
from torch.func import functional_call, grad, vmap

import data
import hps
import train
import train_helpers
import utils
import vae as vae_module
from block_strings import parse_layer_string
from errors import UserError
from hps import Hyperparams
from noise import without_noise
from vae import VAE, DecBlock


@pytest.fixture
def tiny():
    return model("tiny")


def latents_of(net, x):
    torch.manual_seed(2)
    with torch.no_grad():
        return [layer["z"] for layer in net.forward_get_latents(x)]


# ---- latents, temperatures -------------------------------------------------------------------


@torch.no_grad()
def test_latents_of_many_are_decoded_with_a_batch_of_one(tiny):
    H, net = tiny
    zs = latents_of(net, inputs(H, 3, 7)[0])
    assert torch.allclose(
        net.decoder.forward_manual_latents(1, zs), net.decoder.forward_manual_latents(3, zs),
        atol=1e-5,
    )  # fmt: skip
    pictures = net.forward_samples_set_latents(1, zs[:3], t=0.1)
    assert pictures.shape == (3, H.image_size, H.image_size, 3)


TEMPERATURES = {
    "0-dim tensor": lambda n: torch.tensor(0.5),
    "0-dim array": lambda n: np.array(0.5),
    "numpy number": lambda n: np.float32(0.5),
    "list": lambda n: [0.5] * n,
    "longer list": lambda n: [0.5] * (n + 7),
    "tuple": lambda n: (0.5,) * n,
    "dict by block": lambda n: dict.fromkeys(range(n), 0.5),
    "array": lambda n: np.full(n, 0.5),
    "tensor": lambda n: torch.full((n,), 0.5),
    "tensors that broadcast": lambda n: [torch.full((2, 1, 1, 1), 0.5)] * n,
    "arrays": lambda n: [np.array(0.5)] * n,
}


@torch.no_grad()
@pytest.mark.parametrize("kind", TEMPERATURES)
def test_temperatures_in_every_form(tiny, kind):
    _, net = tiny
    t = TEMPERATURES[kind](len(net.decoder.dec_blocks))
    torch.manual_seed(3)
    wanted = net.decoder.forward_uncond(2, 0.5)
    torch.manual_seed(3)
    assert torch.allclose(net.decoder.forward_uncond(2, t), wanted, atol=1e-6)


@torch.no_grad()
def test_a_dict_of_temperatures_is_read_by_block_and_not_by_order(tiny):
    _, net = tiny
    n = len(net.decoder.dec_blocks)
    made = []
    for t in ({i: float(i == n - 1) + 0.1 for i in reversed(range(n))}, [0.1] * (n - 1) + [1.1]):
        torch.manual_seed(3)
        made.append(net.decoder.forward_uncond(2, t))
    assert made[0].equal(made[1])
    with pytest.raises(ValueError, match="no temperatures from block 1"):
        net.decoder.forward_uncond(2, {0: 0.5})


@torch.no_grad()
def test_a_tensor_of_temperatures_gives_each_image_its_own(tiny):
    _, net = tiny
    n = len(net.decoder.dec_blocks)
    each = torch.tensor([1.0, 0.0]).view(2, 1, 1, 1)
    torch.manual_seed(3)
    mixed = net.decoder.forward_uncond(2, [each] * n)
    torch.manual_seed(3)
    hot = net.decoder.forward_uncond(2)
    cold = net.decoder.forward_uncond(2, 0)
    assert torch.allclose(mixed[0], hot[0], atol=1e-5)
    assert torch.allclose(mixed[1], cold[1], atol=1e-5)


# ---- blocks ----------------------------------------------------------------------------------


@torch.no_grad()
def test_a_blocks_parts_are_its_pass(tiny):
    H, net = tiny
    acts = net.encoder(inputs(H, 2, 7)[0])
    xs = {p.shape[2]: p for p in net.decoder.bias_xs}
    for block in net.decoder.dec_blocks:
        x, at = block.get_inputs(xs, acts)
        assert at is acts[block.base] and x.shape == at.shape
        if block.mixin is not None:
            factor = block.base // block.mixin
            x = x + nn.functional.interpolate(xs[block.mixin][:, : x.shape[1]], scale_factor=factor)
        torch.manual_seed(1)
        z, merged, kl = block.sample(x, at)
        assert z.shape == kl.shape == (2, block.zdim, block.base, block.base)
        made = block.resnet(merged + block.z_fn(z))
        residual = block.prior(x)[:, 2 * block.zdim :]
        assert torch.allclose(merged, x + residual, atol=1e-5)
        torch.manual_seed(1)
        xs, stats = block(xs, acts, get_latents=True)
        assert torch.allclose(xs[block.base], made, atol=1e-5) and stats["kl"].equal(kl)
        again, merged = block.sample_uncond(x, 0.5, lvs=z)
        assert again is z and torch.allclose(merged, x + residual, atol=1e-5)
        torch.manual_seed(1)
        drawn, _ = block.sample_uncond(x, 0.5)
        pm, pv = block.prior(x)[:, : 2 * block.zdim].chunk(2, dim=1)
        torch.manual_seed(1)
        noise = torch.randn(pm.shape)
        assert torch.allclose(drawn, pm + 0.5 * pv.exp() * noise, atol=1e-5)
    missing, _ = net.decoder.dec_blocks[0].get_inputs({}, acts)
    assert missing.shape[0] == 2 and not missing.any()


@torch.no_grad()
@pytest.mark.parametrize("name", ["get_inputs", "sample", "sample_uncond"])
@pytest.mark.parametrize("how", ["subclass", "instance"])
def test_an_overridden_part_is_what_a_block_computes(tiny, name, how):
    H, net = tiny
    block, calls = net.decoder.dec_blocks[2], []
    original = getattr(block, name)

    def part(*args, **kwargs):
        calls.append(name)
        first, *rest = original(*args, **kwargs)
        return (first * 0 + 1, *rest)

    def figures():
        torch.manual_seed(1)
        return net(*inputs(H, 2, 7))["elbo"].item(), net.forward_uncond_samples(2).sum()

    before = figures()
    if how == "instance":
        setattr(block, name, part)
    else:
        block.__class__ = type("Mine", (DecBlock,), {name: lambda self, *a, **k: part(*a, **k)})
    after = figures()
    assert calls and (before[0] != after[0] or before[1] != after[1])


@torch.no_grad()
def test_replaced_sampler_and_kl_of_the_originals_arguments_are_used(tiny, monkeypatch):
    H, net = tiny
    batch = inputs(H, 2, 7)
    monkeypatch.setattr(vae_module, "draw_gaussian_diag_samples", lambda mu, logsigma: mu)
    assert net(*batch)["elbo"].item() == net(*batch)["elbo"].item()  # no noise is left
    monkeypatch.setattr(
        vae_module, "gaussian_analytical_kl",
        lambda mu1, mu2, logsigma1, logsigma2: torch.ones_like(mu1),
    )  # fmt: skip
    n_latents = sum(b.zdim * b.base**2 for b in net.decoder.dec_blocks)
    assert net(*batch)["rate"].item() == pytest.approx(n_latents / batch[0][0].numel())


@torch.no_grad()
def test_an_evaluation_with_a_replaced_sampler_says_so(tiny, monkeypatch):
    H, net = tiny
    H.update(n_batch=2, seed=0, device="cpu")
    images = torch.utils.data.TensorDataset(torch.zeros(3, 16, 16, 3, dtype=torch.uint8))

    def preprocess_fn(batch):
        return batch[0].float(), batch[0].float() / 127.5 - 1

    assert "notice" not in train.evaluate(H, net, images, preprocess_fn)
    monkeypatch.setattr(
        vae_module, "draw_gaussian_diag_samples",
        lambda mu, logsigma: mu + logsigma.exp() * torch.randn_like(mu),
    )  # fmt: skip
    assert train.OWN_SAMPLER in train.evaluate(H, net, images, preprocess_fn)["notice"]


@pytest.mark.parametrize(
    "change, layers",
    [
        ({"enc_blocks": "16x0,16x2,16d2,8d2,4d4,1x1"}, None),
        ({"dec_blocks": "1x2,4x0,8m1,16m8"}, [(1, None), (1, None), (8, 1), (16, 8)]),
        ({"dec_blocks": "1x1,8m1,8d2,16m8"}, [(1, None), (8, 1), (8, None), (16, 8)]),
        ({"dec_blocks": "4x1,8m4,16m8", "enc_blocks": "16x1,16d2,8d2,4x1,4d4,1x2"}, None),
        ({"dec_blocks": "16x2", "enc_blocks": "16x1,16d2,8x1"}, [(16, None)] * 2),
    ],
)
def test_block_strings_that_the_original_builds(change, layers):
    H = Hyperparams(
        image_size=16, image_channels=3, width=8, zdim=2, bottleneck_multiple=0.25, dataset=None,
        no_bias_above=64, num_mixtures=2, custom_width_str="",
        enc_blocks="16x1,16d2,8d2,4d4,1x1", dec_blocks="1x1,4m1,8m4,16m8",
    )  # fmt: skip
    H.update(change)
    net = VAE(H)
    x, target = inputs(H, 2, 0)
    net(x, target)["elbo"].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())
    assert net.forward_uncond_samples(2).shape == (2, 16, 16, 3)
    if layers:
        assert [(b.base, b.mixin) for b in net.decoder.dec_blocks] == layers
    assert len(parse_layer_string("16x0,8x2")) == 2


# ---- types, layouts, transforms --------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("dtype, rel", [(torch.float16, 0.01), (torch.bfloat16, 0.03)])
def test_a_network_of_half_precision_computes(tiny, dtype, rel, monkeypatch):
    H, net = tiny
    batch = inputs(H, 3, 7)
    monkeypatch.setattr(vae_module, "draw_gaussian_diag_samples", lambda mu, logsigma: mu)
    wanted = net(*batch)["elbo"].item()
    half = net.to(dtype)
    for args in (batch, [t.to(dtype) for t in batch]):
        assert half(*args)["elbo"].item() == pytest.approx(wanted, rel=rel)
    monkeypatch.undo()
    zs = half.forward_get_latents(batch[0].to(dtype))
    assert {layer["z"].dtype for layer in zs} == {dtype}
    assert half.forward_uncond_samples(2, t=0.9).shape == (2, H.image_size, H.image_size, 3)
    made = []
    for kind in (dtype, torch.float32):  # as a program stores them, and as it computes them
        torch.manual_seed(0)
        made.append(half.forward_samples_set_latents(3, [layer["z"].to(kind) for layer in zs]))
    assert np.array_equal(*made)


@torch.no_grad()
@pytest.mark.parametrize("name", ["tiny", "tiny_widths", "tiny_res2"])
def test_flat_views_of_activations_and_px_z(name):
    H, net = model(name)
    activations = net.encoder(inputs(H, 3, 7)[0])
    px_z, stats = net.decoder(activations, get_latents=True)
    for t in (*activations.values(), px_z, *(t for s in stats for t in s.values())):
        assert t.view(3, -1).equal(t.flatten(1))


def test_an_empty_batch(tiny):
    H, net = tiny
    x, target = (t[:0] for t in inputs(H, 3, 7))
    stats = net(x, target)
    assert all(math.isnan(t.item()) for t in stats.values())
    stats["elbo"].backward()
    assert [layer["z"].shape[0] for layer in net.forward_get_latents(x)] == [0] * len(
        net.decoder.dec_blocks
    )
    assert net.forward_uncond_samples(0).shape == (0, H.image_size, H.image_size, 3)


@pytest.mark.parametrize("name", ["tiny", "tiny_lowbit"])
def test_gradients_by_torch_func(name):
    H, net = model(name)
    batch, parameters = inputs(H, 3, 7), dict(net.named_parameters())
    torch.manual_seed(1)
    found = grad(lambda p: functional_call(net, p, batch)["elbo"])(parameters)
    torch.manual_seed(1)
    net(*batch)["elbo"].backward()
    for key, p in parameters.items():
        assert (found[key] - p.grad).norm() <= 5e-4 * p.grad.norm(), key


def test_gradients_of_each_image_by_vmap(tiny):
    """And each example draws its own noise."""
    H, net = tiny
    parameters = {key: p.detach() for key, p in net.named_parameters()}
    images = [t[:, None] for t in inputs(H, 3, 7)]  # each (3, 1, R, R, 3)

    def loss(p, *batch):
        return functional_call(net, p, batch)["elbo"]

    of_images = vmap(grad(loss), in_dims=(None, 0, 0), randomness="different")
    with without_noise():
        found = of_images(parameters, *images)
        for i in range(3):
            expected = grad(loss)(parameters, *(t[i] for t in images))
            for key, g in expected.items():
                assert (found[key][i] - g).norm() <= 5e-4 * g.norm() + 1e-7, key
    twice = [t[:1].expand(2, -1, -1, -1, -1) for t in images]
    first, second = of_images(parameters, *twice)["decoder.out_net.out_conv.weight"]
    assert not torch.equal(first, second)


# ---- options ---------------------------------------------------------------------------------


def test_a_programs_own_options_stand_beside_the_originals():
    parser = argparse.ArgumentParser()
    for name, kind in {"device": str, "image_size": int, "num_workers": int}.items():
        parser.add_argument(f"--{name}", type=kind, default=7 if kind is int else "mine")
    parser.add_argument("--compile", action="store_true")
    assert hps.add_vae_arguments(parser) is parser
    parser.add_argument("--resume", type=str, default="latest")
    H = Hyperparams()
    hps.parse_args_and_update_hparams(
        H, parser, ["--hps", "imagenet32,cifar10", "--zdim", "3", "--dataset", "mine"]
    )
    own = {k: H[k] for k in ("device", "image_size", "num_workers", "compile", "resume")}
    assert own == dict(device="mine", image_size=7, num_workers=7, compile=False, resume="latest")
    assert (H.dataset, H.zdim, H.width) == ("mine", 3, 384)
    assert parser.get_default("width") == 384  # the presets' values are the parser's defaults
    assert parser.parse_args(["--hps", "cifar10"]).enc_blocks == hps.cifar10.enc_blocks


def test_an_option_string_of_a_forks_own_is_left_to_it(monkeypatch, tmp_path):
    original = hps.add_vae_arguments

    def add_vae_arguments(parser):
        original(parser)
        parser.add_argument("--resume", type=str, default="latest")
        parser.add_argument("--grad_accum", type=str, default="many")
        return parser

    monkeypatch.setattr(train_helpers, "add_vae_arguments", add_vae_arguments)
    H, _ = train_helpers.set_up_hyperparams(
        ["--hps", "digits", "--resume", "from_here", "--save_dir", str(tmp_path)]
    )
    assert (H.resume, H.grad_accum) == ("from_here", "many")
    assert train.setting(H, "resume") is False and train.setting(H, "grad_accum") == 1
    log = (tmp_path / "test" / "log.txt").read_text()
    assert "--resume has another meaning" in log and "--grad_accum has another meaning" in log


def test_a_data_set_is_held_against_the_list_where_data_is_set_up():
    H = Hyperparams(dataset="cifar100", device="cpu")
    with pytest.raises(UserError, match="unknown dataset 'cifar100'"):
        data.set_up_data(H)


# ---- models, files, figures ------------------------------------------------------------------


def small_run(tmp_path, *more):
    words = "--hps digits --device cpu --width 8 --zdim 2 --num_mixtures 2 --enc_blocks 8x1,8d8,1x1"
    words = [*words.split(), "--dec_blocks", "1x1,8m1", "--save_dir", str(tmp_path), *more]
    H, logprint = train_helpers.set_up_hyperparams(words)
    H, *_ = data.set_up_data(H)
    return H, logprint


def test_the_random_stream_after_load_vaes_is_that_of_two_networks(tmp_path):
    H, logprint = small_run(tmp_path)
    torch.manual_seed(5)
    VAE(H), VAE(H)
    wanted = torch.rand(4)
    torch.manual_seed(5)
    vae, ema_vae = train_helpers.load_vaes(H, logprint)
    assert torch.rand(4).equal(wanted)
    weights = zip(vae.module.parameters(), ema_vae.parameters(), strict=True)
    assert all(a.equal(b) for a, b in weights)


def test_the_wrapped_model_takes_keywords(tmp_path):
    H, logprint = small_run(tmp_path)
    vae, _ = train_helpers.load_vaes(H, logprint)
    x, target = inputs(H, 2, 0)
    torch.manual_seed(0)
    wanted = vae(x, target)["elbo"].item()
    torch.manual_seed(0)
    assert vae(x=x, x_target=target)["elbo"].item() == wanted
    assert set(vae(x_target=target, x=x)) == {"elbo", "distortion", "rate"}


def test_a_programs_own_module_with_integer_buffers_is_restored(tmp_path):
    path = tmp_path / "own.th"
    saved, restored = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    saved(torch.randn(8, 3))
    torch.save({f"module.{k}": t for k, t in saved.state_dict().items()}, path)
    train_helpers.restore_params(restored, str(path), 0, 1)
    assert restored.num_batches_tracked.item() == 1
    assert all(t.equal(saved.state_dict()[k]) for k, t in restored.state_dict().items())


def test_sums_of_gcskip():
    steps = [{"elbo": 1.0, "gcskip": 1.0, "skipped_updates": 0.0}] * 3
    assert train_helpers.accumulate_stats(steps, 2) == {
        "elbo": 1.0, "elbo_filtered": 1.0, "gcskip": 2.0, "skipped_updates": 0.0
    }  # fmt: skip


def test_a_log_of_set_up_hyperparams_alone_is_written_at_once(tmp_path):
    """A program that calls it finds folder and log, though no run has begun."""
    H, logprint = small_run(tmp_path, "--desc", "mine")
    logprint("hello")
    *_, last = (tmp_path / "mine" / "log.jsonl").read_text().splitlines()
    assert json.loads(last)["message"] == "hello"
    assert H.save_dir == str(tmp_path / "mine") and H.logdir == str(tmp_path / "mine" / "log")


# ---- data functions, names -------------------------------------------------------------------


def test_cifar10_with_labels(tmp_path):
    write_cifar10(tmp_path)
    parts = data.cifar10(str(tmp_path))
    assert [x.shape for x, _ in parts] == [(n, 32, 32, 3) for n in (45000, 5000, 10000)]
    for x, y in parts:
        assert x.dtype == np.uint8 and y.dtype == np.float32 and y.shape == (len(x), 10)
        assert (y.sum(axis=1) == 1).all() and y[:, 0].all()
    (_, y), *_ = data.cifar10(str(tmp_path), one_hot=False)
    assert y.shape == (45000, 1) and y.dtype.kind == "i"
    batch = data.unpickle_cifar10(str(tmp_path / "cifar-10-batches-py" / "test_batch"))
    assert set(batch) == {"data", "labels"} and batch["data"].shape == (10000, 3072)


def test_data_functions_give_what_indexes_like_an_array(tmp_path, monkeypatch):
    images = np.random.RandomState(0).randint(0, 256, (6000, 4, 4, 3), dtype=np.uint8)
    opened = []

    def open_npy(path, shape, remedy):
        opened.append((path.name, shape))
        return images[:500] if "valid" in path.name else images

    monkeypatch.setattr(data, "open_npy", open_npy)
    train_set, valid_set, test_set = data.imagenet64(str(tmp_path))
    order = np.random.RandomState(42).permutation(6000)
    assert train_set.shape == (1000, 4, 4, 3) and len(valid_set) == 5000
    assert opened[0] == ("imagenet64-train.npy", (1281149, 64, 64, 3))
    assert np.array_equal(train_set[3], images[order[3]])
    assert np.array_equal(train_set[2:5], images[order[2:5]])
    assert np.array_equal(train_set[[0, 7]], images[order[[0, 7]]])
    assert np.array_equal(valid_set[-1], images[order[-1]])
    assert np.array_equal(train_set[:, 1:3], images[order[:1000], 1:3])
    assert np.array_equal(np.asarray(train_set), images[order[:1000]])
    assert valid_set.dtype == np.uint8 and next(iter(valid_set)).shape == (4, 4, 3)
    names = ("ffhq-256.npy", (70000, 256, 256, 3))
    monkeypatch.setattr(
        data, "open_npy", lambda *a: opened.append(a[:2]) or np.tile(images, (2, 1, 1, 1))
    )
    ffhq = data.ffhq256(str(tmp_path))
    assert (opened[-1][0].name, opened[-1][1]) == names
    assert [len(a) for a in ffhq] == [5000, 7000, 7000]
    assert data.ffhq1024("faces") == ("faces",) * 3
    assert data.flatten([[1, 2], (3,)]) == [1, 2, 3]


def test_names_importable_from_train():
    names = ("set_up_hyperparams load_vaes load_opt accumulate_stats save_model update_ema").split()
    assert all(getattr(train, name) is getattr(train_helpers, name) for name in names)
    assert train.get_cpu_stats_over_ranks is utils.get_cpu_stats_over_ranks
    assert train.set_up_data is data.set_up_data


def test_names_that_the_readme_showed_stay():
    from data import preprocess
    from hps import UserError as error
    from hps import get_hparams
    from train_helpers import load_model
    from utils import image_generators

    assert error is UserError and callable(preprocess) and callable(load_model)
    assert get_hparams("digits", zdim=3).zdim == 3 and len(image_generators([0, 1], 5)) == 2


def test_hosts_and_processes_a_host():
    assert (utils.num_nodes(), utils.gpus_per_node()) == (1, 1)


@pytest.mark.parametrize(
    "env, nodes, per_node",
    [
        (dict(RANK="5", WORLD_SIZE="8", LOCAL_RANK="1", LOCAL_WORLD_SIZE="4"), 2, 4),
        (dict(SLURM_PROCID="0", SLURM_STEP_ID="0", SLURM_STEP_NUM_TASKS="6",
              SLURM_STEP_TASKS_PER_NODE="2(x3)"), 3, 2),
    ],
)  # fmt: skip
def test_hosts_by_a_launchers_word(env, nodes, per_node, monkeypatch):
    from launchers import find_world

    monkeypatch.setattr(utils, "world", lambda: find_world(env))
    assert (utils.num_nodes(), utils.gpus_per_node()) == (nodes, per_node)


# ---- what a program puts in a part's place ----------------------------------------------------


@torch.no_grad()
def test_temperatures_of_any_kind_that_reads_by_block(tiny):
    _, net = tiny
    n = len(net.decoder.dec_blocks)
    mixed = [torch.full((2, 1, 1, 1), 0.5), *[0.5] * (n - 1)]
    for t in (mixed, MappingProxyType(dict(enumerate(mixed))), [torch.tensor(0.5)] * n):
        torch.manual_seed(3)
        wanted = net.decoder.forward_uncond(2, 0.5)
        torch.manual_seed(3)
        assert torch.allclose(net.decoder.forward_uncond(2, t), wanted, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("conv", ["enc.c2", "prior.c3", "resnet.c2"])
def test_a_convolution_of_another_kind_is_called(tiny, conv):
    """Circular padding, or a forward of the instance's own: neither is computed as a plain one."""
    H, net = tiny
    batch, module = inputs(H, 2, 7), net.decoder.dec_blocks[-1].get_submodule(conv)

    def elbo():
        torch.manual_seed(1)
        return net(*batch)["elbo"].item()

    plain = elbo()
    module.padding_mode = "circular"
    module._reversed_padding_repeated_twice = [1, 1, 1, 1]
    assert elbo() != plain
    module.padding_mode = "zeros"
    assert elbo() == plain
    module.forward = lambda x: 2 * nn.functional.conv2d(x, module.weight, module.bias, padding=1)
    assert elbo() != plain


@torch.no_grad()
def test_a_replaced_block_class_and_hooks_leave_flat_views(tiny, monkeypatch):
    H, net = tiny
    calls = []

    class Mine(vae_module.Block):
        def forward(self, x):
            calls.append(1)
            return super().forward(x)

    monkeypatch.setattr(vae_module, "Block", Mine)
    mine = VAE(H)
    mine.load_state_dict(net.state_dict())
    stats = mine.decoder(mine.encoder(inputs(H, 2, 7)[0]), get_latents=True)[1]
    n = len(mine.encoder.enc_blocks) + 3 * len(mine.decoder.dec_blocks)
    assert len(calls) == n
    assert all(s["z"].view(2, -1).shape[0] == 2 for s in stats)


@torch.no_grad()
def test_an_overridden_block_sees_all_activations(tiny):
    H, net = tiny
    block = net.decoder.dec_blocks[0]
    original, seen = block.get_inputs, []
    block.get_inputs = lambda xs, activations: (
        seen.append(sorted(activations)) or original(xs, activations)
    )
    activations = net.encoder(inputs(H, 2, 7)[0])
    net.decoder(activations)
    assert seen == [sorted(activations)]


def test_a_forks_preset_of_its_own_data_set_stands_in_no_ones_way(monkeypatch):
    from presets import get_hparams, preset_of, shapes_of

    monkeypatch.setitem(hps.HPARAMS_REGISTRY, "mine", Hyperparams(hps.digits, dataset="mydata"))
    with torch.device("meta"):
        shapes = shapes_of(VAE(get_hparams("digits")).state_dict())
    assert preset_of(shapes).hparam_sets == "digits"
    assert preset_of({"odd": (1,)}) is None
