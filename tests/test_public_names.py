"""The names that other programs import: signatures, layouts, return types, independence."""

import copy
import inspect
import math
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from golden import inputs, model
from torch import nn

import data
import hps
import train
import train_helpers
import utils
import vae
import vae_helpers

SIGNATURES = {
    hps.parse_args_and_update_hparams: "(H, parser, s=None)",
    hps.add_vae_arguments: "(parser)",
    vae.VAE: "(H)",
    vae.Encoder: "(H)",
    vae.Decoder: "(H)",
    vae.DecBlock: "(H, res, mixin, n_blocks)",
    vae.Block: "(in_width, middle_width, out_width, down_rate=None, residual=False, "
    "use_3x3=True, zero_last=False)",
    vae.parse_layer_string: "(s)",
    vae.get_width_settings: "(width, s)",
    vae.pad_channels: "(t, width)",
    vae_helpers.gaussian_analytical_kl: "(mu1, mu2, logsigma1, logsigma2)",
    vae_helpers.get_conv: "(in_dim, out_dim, kernel_size, stride, padding, zero_bias=True, "
    "zero_weights=False, groups=1, scaled=False)",
    vae_helpers.get_3x3: "(in_dim, out_dim, zero_bias=True, zero_weights=False, groups=1, "
    "scaled=False)",
    vae_helpers.get_1x1: "(in_dim, out_dim, zero_bias=True, zero_weights=False, groups=1, "
    "scaled=False)",
    vae_helpers.HModule: "(H)",
    vae_helpers.DmolNet: "(H)",
    vae_helpers.discretized_mix_logistic_loss: "(x, l, low_bit=False)",
    vae_helpers.log_prob_from_logits: "(x)",
    vae_helpers.const_max: "(t, constant)",
    vae_helpers.const_min: "(t, constant)",
    data.set_up_data: "(H)",
    data.mkdir_p: "(path)",
    train_helpers.set_up_hyperparams: "(s=None)",
    train_helpers.load_vaes: "(H, logprint)",
    train_helpers.load_opt: "(H, vae, logprint)",
    train_helpers.restore_params: "(model, path, local_rank, mpi_size, map_ddp=True, "
    "map_cpu=False)",
    train_helpers.restore_log: "(path, local_rank, mpi_size)",
    train_helpers.save_model: "(path, vae, ema_vae, optimizer, H)",
    train_helpers.update_ema: "(vae, ema_vae, ema_rate)",
    train_helpers.accumulate_stats: "(stats, frequency)",
    train_helpers.linear_warmup: "(warmup_iters)",
    train_helpers.setup_mpi: "(H)",
    train_helpers.setup_save_dirs: "(H)",
    train_helpers.distributed_maybe_download: "(path, local_rank, mpi_size)",
    train_helpers.first_rank_first: "(local_rank, mpi_size)",
    utils.logger: "(log_prefix)",
    utils.maybe_download: "(path, filename=None)",
    utils.mpi_size: "()",
    utils.mpi_rank: "()",
    utils.local_mpi_rank: "()",
    utils.allreduce: "(x, average)",
    utils.get_cpu_stats_over_ranks: "(stat_dict)",
    train.training_step: "(H, data_input, target, vae, ema_vae, optimizer, iterate)",
    train.eval_step: "(data_input, target, ema_vae)",
    train.train_loop: "(H, data_train, data_valid, preprocess_fn, vae, ema_vae, logprint)",
    train.evaluate: "(H, ema_vae, data_valid, preprocess_fn)",
    train.write_images: "(H, ema_vae, viz_batch_original, viz_batch_processed, fname, logprint)",
    train.run_test_eval: "(H, ema_vae, data_test, preprocess_fn, logprint)",
    train.get_sample_for_visualization: "(data, preprocess_fn, num, dataset)",
    train.main: "()",
}
# Ours take optional arguments after the published ones.
LONGER = {
    vae_helpers.draw_gaussian_diag_samples: "(mu, logsigma",
    vae_helpers.sample_from_discretized_mix_logistic: "(l, nr_mix",
    vae.VAE.forward: "(self, x, x_target",
    vae.VAE.forward_get_latents: "(self, x",
    vae.VAE.forward_uncond_samples: "(self, n_batch, t=None",
    vae.VAE.forward_samples_set_latents: "(self, n_batch, latents, t=None",
    vae.Decoder.forward: "(self, activations, get_latents=False",
    vae.Decoder.forward_uncond: "(self, n, t=None, y=None",
    vae.Decoder.forward_manual_latents: "(self, n, latents, t=None",
    vae.DecBlock.forward: "(self, xs, activations, get_latents=False",
    vae.DecBlock.forward_uncond: "(self, xs, t=None, lvs=None",
    vae_helpers.DmolNet.nll: "(self, px_z, x",
    vae_helpers.DmolNet.sample: "(self, px_z",
    utils.tile_images: "(images",
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda f: f.__name__)
def test_signature(function):
    assert str(inspect.signature(function)) == SIGNATURES[function]


@pytest.mark.parametrize("function", LONGER, ids=lambda f: f.__qualname__)
def test_signature_begins_as_published(function):
    signature = inspect.signature(function)
    assert str(signature).startswith(LONGER[function])
    published = LONGER[function].count(",") + 1
    assert all(
        p.default is not p.empty or p.kind is p.KEYWORD_ONLY
        for p in list(signature.parameters.values())[published:]
    )


def test_names_importable_from_elsewhere():
    for name in ("Hyperparams", "add_vae_arguments", "parse_args_and_update_hparams"):
        assert getattr(train_helpers, name) is getattr(hps, name)
    assert train_helpers.logger is utils.logger and train_helpers.VAE is vae.VAE
    assert train_helpers.mkdir_p is data.mkdir_p and utils.Hyperparams is hps.Hyperparams
    assert train.set_up_data is data.set_up_data
    modules = {"cifar10": "cifar10", "imagenet32": "i32", "imagenet64": "i64",
               "ffhq256": "ffhq_256", "ffhq1024": "ffhq1024"}  # fmt: skip
    for preset, variable in modules.items():
        assert hps.HPARAMS_REGISTRY[preset] is getattr(hps, variable)


def test_star_imports_and_few_requirements():
    """hps, vae and vae_helpers need torch and numpy only."""
    code = (
        "import sys\n"
        "for name in ('mpi4py', 'sklearn', 'imageio', 'PIL', 'tqdm', 'apex'):\n"
        "    sys.modules[name] = None\n"  # importing it now fails
        "from hps import *\nfrom vae import *\nfrom vae_helpers import *\n"
        "import vae, vae_helpers, hps\n"
        "assert VAE is vae.VAE and DmolNet is vae_helpers.DmolNet\n"
        "assert Hyperparams is hps.Hyperparams and 'utils' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- hyperparameters -------------------------------------------------------------------------


def test_hyperparams_are_a_dict_with_attributes():
    H = hps.Hyperparams(width=3)
    H.zdim = 4
    H["lr"] = 5
    assert (H.width, H["zdim"], H.lr, H.no_such_name) == (3, 4, 5, None)
    with pytest.raises(AttributeError):
        H.__no_such_name__  # noqa: B018  what the copy and pickle protocols ask
    for other in (H.copy(), copy.copy(H), copy.deepcopy(H), pickle.loads(pickle.dumps(H))):
        assert other == H and type(other) is hps.Hyperparams
        other.width = 9
    assert H.width == 3


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
    built = vae.VAE(other)
    built.load_state_dict(net.state_dict())
    for v in (net, built):
        torch.manual_seed(0)
        v.elbo = v(*inputs(H, 2, 0))["elbo"].item()
    assert built.elbo == net.elbo


# ---- the network -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    return model("tiny")


def test_widths():
    widths = vae.get_width_settings(16, "8:32,4:64")
    assert (widths[8], widths[4], widths[1], widths[1024]) == (32, 64, 16, 16)
    assert vae.get_width_settings(16, None)[8] == vae.get_width_settings(16, "")[8] == 16
    assert pickle.loads(pickle.dumps(widths))[3] == 16


def test_pad_channels():
    t = torch.randn(2, 3, 4, 4)
    padded = vae.pad_channels(t, 5)
    assert padded.shape == (2, 5, 4, 4) and torch.equal(padded[:, :3], t)
    assert not padded[:, 3:].any() and vae.pad_channels(t, 3).shape[1] == 3
    with pytest.raises(ValueError):
        vae.pad_channels(t, 2)


def test_block():
    x = torch.randn(2, 4, 8, 8)
    block = vae.Block(4, 2, 6, down_rate=2, zero_last=True)
    assert block(x).shape == (2, 6, 4, 4) and not block(x).any()
    assert vae.Block(4, 2, 4, residual=True, zero_last=True)(x).equal(x)
    assert vae.Block(4, 2, 4, use_3x3=False).c2.weight.shape == (2, 2, 1, 1)


def test_convolutions():
    conv = vae_helpers.get_conv(4, 6, 3, 2, 1, groups=2)
    assert conv.weight.shape == (6, 2, 3, 3) and conv.stride == (2, 2) and not conv.bias.any()
    assert vae_helpers.get_3x3(4, 6, zero_bias=False).bias.any()
    conv = vae_helpers.get_1x1(4, 6, zero_weights=True)
    assert conv.weight.shape == (6, 4, 1, 1) and not conv.weight.any()
    assert vae_helpers.get_3x3(1, 1)(torch.ones(1, 1, 5, 5)).shape == (1, 1, 5, 5)


def test_hmodule_builds_from_H():
    class Linear(vae_helpers.HModule):
        def build(self):
            self.layer = nn.Linear(self.H.width, 1)

    H = hps.Hyperparams(width=3)
    made = Linear(H)
    assert made.H is H and made.layer.in_features == 3


def test_small_functions():
    t = torch.tensor([-2.0, 0.0, 2.0])
    assert vae_helpers.const_max(t, 0.0).tolist() == [0, 0, 2]
    assert vae_helpers.const_min(t, 0.0).tolist() == [-2, 0, 0]
    assert vae_helpers.log_prob_from_logits(t[None]).exp().sum().item() == pytest.approx(1)


def test_forward_gives_exactly_three_scalars(tiny):
    H, net = tiny
    stats = net(*inputs(H, 2, 0))
    assert list(stats) == ["elbo", "distortion", "rate"]
    assert all(t.shape == () and t.dtype == torch.float32 for t in stats.values())
    assert stats["elbo"].item() == pytest.approx((stats["distortion"] + stats["rate"]).item())


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


# ---- around it -------------------------------------------------------------------------------


def test_preprocess_leaves_the_batch_alone():
    H = hps.Hyperparams(dataset="digits", device="cpu")
    H, train_set, valid_set, preprocess_fn = data.set_up_data(H)
    assert (H.image_size, H.image_channels) == (8, 3) and len(train_set) and len(valid_set)
    batch = torch.utils.data.default_collate([train_set[0], train_set[1]])
    before = batch[0].clone()
    x, target = preprocess_fn(batch)
    assert x.shape == target.shape == (2, 8, 8, 3) and x.dtype == target.dtype == torch.float32
    assert batch[0].equal(before) and batch[0].dtype == torch.uint8
    assert target.min() >= -1 and target.max() <= 1


def test_eval_step_gives_floats(tiny):
    H, net = tiny
    stats = train.eval_step(*inputs(H, 2, 0), net)
    assert stats.keys() == {"elbo", "distortion", "rate"}
    assert all(type(v) is float for v in stats.values())


def test_reductions_in_one_process():
    t = torch.ones(2)
    assert utils.allreduce(t, average=True).equal(t)
    assert (utils.mpi_size(), utils.mpi_rank(), utils.local_mpi_rank()) == (1, 0, 0)
    stats = utils.get_cpu_stats_over_ranks(
        {"a": torch.tensor(2.0), "b": 3, "c": torch.tensor(True)}
    )
    assert stats == {"a": 2.0, "b": 3.0, "c": 1.0} and all(type(v) is float for v in stats.values())


def test_update_ema():
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    want = [0.9 * e + 0.1 * p for e, p in zip(b.parameters(), a.parameters(), strict=True)]
    train_helpers.update_ema(a, b, 0.9)
    assert all(map(torch.allclose, b.parameters(), want))


def test_the_warm_up_is_a_pure_function_of_the_step():
    factor = train_helpers.linear_warmup(100)
    assert [factor(s) for s in (0, 49, 99, 10**6)] == [0.01, 0.5, 1, 1] and math.isfinite(factor(0))


def test_log_lines(tmp_path, capsys):
    log = utils.logger(str(tmp_path / "log"))
    log("two", "words")
    log(type="train_loss", step=np.int64(3), elbo=float("nan"), pprint=True)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    text = (tmp_path / "log.txt").read_text().splitlines()
    assert len(lines) == len(text) == 2 and '"message": "two words"' in lines[0]
    assert all(line.startswith('{"time": ') for line in lines[:1]) and '"step": 3' in lines[1]
    assert text[0].startswith("time: ") and capsys.readouterr().out.splitlines() == text


def test_tile_images():
    images = [np.full((2, 3, 3), i, np.uint8) for i in range(4)]
    tiled = utils.tile_images(images, 2, 2)
    assert tiled.shape == (7, 9, 3) and tiled[1, 1, 0] == 0 and tiled[-2, -2, 0] == 3
    assert (tiled[0] == 255).all() and (tiled[3] == 255).all()
    with pytest.raises(ValueError):
        utils.tile_images(images, 3, 2)
