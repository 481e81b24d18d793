"""The fast and light ways to run the network give the figures of the plain one."""

import copy
import json
import math
import sys
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from golden import inputs, model
from test_processes import TINY, free_port, launch, log_of
from torch.distributions import Normal, kl_divergence

import train
import vae as vae_module
import vae_helpers
from hps import UserError, get_hparams
from train_helpers import OneProcess, load_vaes, make_optimizer, setup_mpi
from vae import VAE, segments
from vae_helpers import (
    discretized_mix_logistic_loss,
    forward_precision,
    gaussian_analytical_kl,
    gelu_convs,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import bench
import growth
import step
from reference import PlainVAE, plain_mixture_loss

MODELS = ["tiny", "tiny_lowbit", "tiny_widths", "tiny_res2"]


def gradients(module, batch, seed=1, bf16=False):
    module.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        stats = module(*batch)
    stats["elbo"].backward()
    return stats, {k.removeprefix("vae."): p.grad for k, p in module.named_parameters()}


@pytest.mark.parametrize("small", [0, 2**14])
@pytest.mark.parametrize("name", MODELS)
def test_the_reference_is_the_network(name, small, monkeypatch):
    monkeypatch.setattr(vae_helpers, "SMALL", small)
    H, vae = model(name)
    plain, batch = PlainVAE(vae), inputs(H, 3, seed=7)
    (stats, grads), (plain_stats, plain_grads) = gradients(vae, batch), gradients(plain, batch)
    for key, value in stats.items():
        assert value.item() == pytest.approx(plain_stats[key].item(), rel=1e-5)
    for key, grad in grads.items():
        assert (grad - plain_grads[key]).norm() <= 5e-4 * plain_grads[key].norm(), key
    pictures = []
    for m in (vae, plain):
        torch.manual_seed(4)
        pictures.append(m.forward_uncond_samples(3).astype(int))
    difference = np.abs(pictures[0] - pictures[1])
    assert difference.max() <= 1 and (difference > 0).sum() <= 5


# ---- memory ----------------------------------------------------------------------------------


def preset(name):
    torch.manual_seed(0)
    H = get_hparams(name)
    shape = 1, H.image_size, H.image_size, 3
    return VAE(H), (torch.randn(shape), torch.rand(shape) * 2 - 1)


def test_bytes_saved_for_the_backward_pass():
    vae, batch = preset("cifar10")
    plain = PlainVAE(vae)
    reference = bench.saved_bytes(plain, lambda: plain(*batch)["elbo"])

    def share(bf16):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return bench.saved_bytes(vae, lambda: vae(*batch)["elbo"]) / reference

    assert share(False) < 0.4 and share(True) < 0.25
    vae.checkpoint_activations()
    assert share(False) < 1 / 15 and share(True) < 1 / 20


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True])
def test_peak_of_a_checkpointed_step(bf16):
    vae, batch = preset("cifar10")
    batch = [t.expand(8, -1, -1, -1).contiguous() for t in batch]
    plain = PlainVAE(vae)
    reference = bench.peak_bytes("cpu", lambda: gradients(plain, batch))
    vae.checkpoint_activations()
    peak = bench.peak_bytes("cpu", lambda: gradients(vae, batch, bf16=bf16))
    assert peak < reference / (10 if bf16 else 6)


def test_segments():
    alike = [(8, None)] * 7
    assert segments([*alike, (8, 2), (4, None)]) == [
        slice(0, 3), slice(3, 6), slice(6, 7), slice(7, 8), slice(8, 9)
    ]  # fmt: skip


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_checkpointed_gradients_are_equal_bit_for_bit(name, bf16, monkeypatch):
    H, vae = model(name)
    batch = inputs(H, 3, seed=7)
    stats, grads = gradients(vae, batch, bf16=bf16)
    calls = []
    checkpoint = vae_module.checkpoint
    monkeypatch.setattr(
        vae_module, "checkpoint", lambda *a, **k: calls.append(a) or checkpoint(*a, **k)
    )
    vae.checkpoint_activations()
    again, checkpointed = gradients(vae, batch, bf16=bf16)
    assert len(calls) == len(vae.encoder.segments) + len(vae.decoder.segments)
    assert again == stats
    for key, grad in grads.items():
        assert torch.equal(grad, checkpointed[key]), key
    # The noise after a step is that of a step without.
    after = torch.randn(1)
    gradients(copy.deepcopy(vae), batch, bf16=bf16)
    assert torch.equal(after, torch.randn(1))


def test_checkpointing_with_noise_of_the_images_own():
    H, vae = model("tiny")
    batch = inputs(H, 3, seed=7)

    def gradient():
        vae.zero_grad()
        generators = [torch.Generator().manual_seed(i) for i in range(3)]
        sum(vae.distortion_and_rate(*batch, generators)).sum().backward()
        return vae.decoder.dec_blocks[0].enc.c1.weight.grad.clone()

    without = gradient()
    vae.checkpoint_activations()
    assert torch.equal(without, gradient())


def mixture(size, dtype=torch.float32):
    torch.manual_seed(0)
    x = torch.randint(0, 256, (1, size, size, 3), dtype=dtype) / 127.5 - 1
    return x, torch.randn(1, size, size, 100, dtype=dtype).requires_grad_()


def test_memory_of_the_mixtures_loss():
    x, l = mixture(128)
    n_bytes = 4 * (x.numel() + l.numel())

    def peak(loss):
        l.grad = None
        return bench.peak_bytes("cpu", lambda: loss(x, l, False).sum().backward()) / n_bytes

    assert peak(discretized_mix_logistic_loss) < 3 < peak(plain_mixture_loss)


@pytest.mark.parametrize("low_bit", [False, True])
def test_the_mixtures_loss_in_parts_is_the_loss(low_bit):
    x, l = mixture(9, torch.float64)  # 81 pixels are no multiple of the number of parts
    x.requires_grad_()
    weight = torch.tensor([3.0])
    losses = [f(x, l, low_bit) for f in (discretized_mix_logistic_loss, plain_mixture_loss)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-12)
    for own, plain in zip(
        *(torch.autograd.grad((weight * loss).sum(), (x, l)) for loss in losses), strict=True
    ):
        assert torch.allclose(own, plain, rtol=1e-9, atol=1e-12)


# ---- functions with a backward pass of their own ---------------------------------------------


@pytest.mark.parametrize("small", [0, 2**14])
@pytest.mark.parametrize("kernel, size", [(1, 3), (3, 3), (1, 16)])
def test_gradients_of_gelu_convs(kernel, size, small, monkeypatch):
    monkeypatch.setattr(vae_helpers, "SMALL", small)
    torch.manual_seed(0)
    x = torch.randn(2, 2, size, size, dtype=torch.float64)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    weights = [torch.randn(n, 2, kernel, kernel, dtype=torch.float64) for n in (3, 1)]
    biases = [torch.randn(n, dtype=torch.float64) for n in (3, 1)]
    leaves = [t.requires_grad_() for pair in zip(weights, biases, strict=True) for t in pair]
    outputs = gelu_convs(x, *leaves)
    assert ("_GeluConvs" in outputs[0].grad_fn.name()) == (small == 0)
    assert torch.autograd.gradcheck(gelu_convs, (x, *leaves), fast_mode=True)
    assert all(y.is_contiguous(memory_format=torch.channels_last) for y in outputs)


def test_gradients_of_the_kl():
    leaves = [torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    assert torch.autograd.gradcheck(gaussian_analytical_kl, leaves)
    assert torch.autograd.gradgradcheck(gaussian_analytical_kl, leaves)


def test_the_mixtures_loss_where_no_gradient_is_wanted():
    x, l = mixture(3)
    loss = discretized_mix_logistic_loss(x, l)
    with torch.inference_mode():  # of a leaf that wants a gradient elsewhere
        assert torch.equal(discretized_mix_logistic_loss(x, l), loss)


def test_a_network_of_float64():
    H, vae = model("tiny")
    batch = inputs(H, 3, seed=7)
    stats, _ = gradients(vae.double(), [t.double() for t in batch])
    plain_stats, _ = gradients(PlainVAE(vae), [t.double() for t in batch])
    for key, value in stats.items():
        assert value.dtype == torch.float64
        assert value.item() == pytest.approx(plain_stats[key].item(), rel=1e-12)


# ---- bf16 ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_bf16_is_for_the_convolutions_alone(name):
    H, vae = model(name)
    batch = inputs(H, 3, seed=7)
    stats, grads = gradients(vae, batch)
    bf16_stats, bf16_grads = gradients(vae, batch, bf16=True)
    for key, value in bf16_stats.items():
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(stats[key].item(), rel=2e-2), key
    assert bf16_stats != stats
    assert {g.dtype for g in bf16_grads.values()} == {torch.float32}
    total, error = (
        math.hypot(*(t.norm().item() for t in tensors))
        for tensors in (grads.values(), [bf16_grads[k] - g for k, g in grads.items()])
    )
    assert error < 0.1 * total
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        activations = vae.encoder(batch[0])
        px_z, latents = vae.decoder(activations, get_latents=True, get_gaussians=True)
        assert px_z.dtype == torch.float32
        assert {t.dtype for s in latents for t in s.values()} == {torch.float32}
        assert vae.decoder.out_net(px_z).dtype == torch.float32
    for layer in latents:
        assert not torch.equal(layer["qm"], layer["qm"].bfloat16().float())
        qm, qv, pm, pv = (layer[key].double() for key in ("qm", "qv", "pm", "pv"))
        kl = kl_divergence(Normal(qm, qv.exp()), Normal(pm, pv.exp()))
        assert torch.allclose(layer["kl"].double(), kl, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bf16", [False, True])
def test_weights_changed_in_place_take_effect(bf16):
    H, vae = model("tiny")
    batch = inputs(H, 3, seed=7)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16), torch.no_grad():
        before = vae(*batch)["elbo"].item()
        for block in (vae.encoder.enc_blocks[0].c2, vae.decoder.dec_blocks[-1].resnet.c1):
            block.weight.mul_(1.5)
            torch.manual_seed(1)
            after = vae(*batch)["elbo"].item()
            assert after != before
            before = after


def test_tf32_and_cudnn_trials_are_as_asked(monkeypatch):
    flags = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [f.allow_tf32 for f in flags]
    H = get_hparams("digits", device="cpu")
    try:
        for precision, allowed in (("tf32", True), ("fp32", False), ("bf16", False)):
            H.update(precision=precision, cudnn_benchmark=allowed)
            setup_mpi(H)
            assert [f.allow_tf32 for f in flags] == [allowed] * 2
            assert torch.backends.cudnn.benchmark == allowed
            with forward_precision("fp32", "cpu"):  # the call of who uses train.evaluate alone
                assert [f.allow_tf32 for f in flags] == [allowed] * 2
    finally:
        torch.backends.cudnn.benchmark = False
        for flag, allowed in zip(flags, before, strict=True):
            flag.allow_tf32 = allowed


# ---- gradient accumulation ---------------------------------------------------------------------


def _accumulated(parts, batch, monkeypatch, precision="fp32"):
    """Weights and statistics after a step of `tiny` in so many parts, its noise off."""
    monkeypatch.setattr(vae_module, "draw_gaussian_diag_samples", lambda mu, *_: mu)
    H, vae = model("tiny")
    H.update(lr=2e-4, adam_beta1=0.9, adam_beta2=0.9, wd=0.01, ema_rate=0.99, grad_clip=0.5)
    H.update(skip_threshold=400.0, grad_accum=parts, precision=precision)
    vae, ema = OneProcess(vae), copy.deepcopy(vae).requires_grad_(False)
    optimizer, _ = make_optimizer(vae.parameters(), H, use_apex=False)
    apart, no_sync = [], OneProcess.no_sync
    monkeypatch.setattr(OneProcess, "no_sync", lambda self: apart.append(1) or no_sync(self))
    stats = train.training_step(H, *batch, vae, ema, optimizer, 0)
    assert len(apart) == parts - 1  # gradients are exchanged once
    return stats, vae.module.state_dict()


def test_accumulated_gradients_make_the_update_of_the_whole_batch(monkeypatch):
    H, vae = model("tiny")
    batch = inputs(H, 6, seed=7)
    (whole, weights), (parts, accumulated) = (_accumulated(k, batch, monkeypatch) for k in (1, 3))
    for key in ("elbo", "distortion", "rate", "grad_norm", "skipped_updates"):
        assert parts[key] == pytest.approx(whole[key], rel=1e-5)
    start = vae.state_dict()
    moved = math.hypot(*((weights[k] - start[k]).norm().item() for k in start))
    apart = math.hypot(*((weights[k] - accumulated[k]).norm().item() for k in start))
    assert moved > 0 and apart < 1e-3 * moved
    assert all(torch.allclose(weights[k], accumulated[k], atol=1e-5) for k in start)


def test_a_training_step_computes_in_the_precision_asked_for(monkeypatch):
    H, vae = model("tiny")
    batch = inputs(H, 6, seed=7)
    fp32, bf16 = (_accumulated(1, batch, monkeypatch, p)[0]["elbo"] for p in ("fp32", "bf16"))
    assert bf16 != fp32 and bf16 == pytest.approx(fp32, rel=2e-2)


def test_a_nan_in_one_part_skips_the_update(monkeypatch):
    H, vae = model("tiny")
    x, target = inputs(H, 6, seed=7)
    x[0, 0, 0, 0] = math.nan
    stats, weights = _accumulated(3, (x, target), monkeypatch)
    assert stats["rate_nans"] == stats["skipped_updates"] == 1
    assert all(torch.equal(weights[k], t) for k, t in vae.state_dict().items())


def test_two_processes_with_every_option(tmp_path):
    args = [*TINY, "--grad_accum", "3", "--n_batch", "8", "--precision", "bf16"]
    [done] = launch("mpiexec", 2, [*args, "--checkpoint_activations"], tmp_path, free_port())
    assert done.returncode == 0, done.stdout + done.stderr
    events = log_of(tmp_path / "saved_models" / "test")
    assert any("global batch: 48 images" in e.get("message", "") for e in events)
    [evaluation] = [e for e in events if e.get("type") == "eval_loss"]
    assert evaluation["step"] == 1397 // 2 // 24
    *_, last = [e for e in events if e.get("type") == "train_loss"]
    assert math.isfinite(last["elbo"]) and last["skipped_updates"] == 0


# ---- torch.compile, benchmarks -------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_compiled_blocks_agree(cuda_graphs):
    H, vae = model("tiny")
    batch = inputs(H, 3, seed=7)
    stats, grads = gradients(vae, batch)
    compiled = copy.deepcopy(vae)
    compiled.compile_blocks(cuda_graphs)
    compiled_stats, compiled_grads = gradients(compiled, batch)
    assert compiled_stats["elbo"].item() == pytest.approx(stats["elbo"].item(), rel=1e-5)
    for key, grad in grads.items():
        assert (grad - compiled_grads[key]).norm() <= 5e-4 * grad.norm(), key
    assert set(copy.deepcopy(compiled).state_dict()) == set(vae.state_dict())


@pytest.mark.slow
def test_bench_of_compiled_blocks():
    options = "--presets digits --batches 2 --rounds 1 --device cpu --tasks evaluate --compile"
    [row] = bench.main(options.split())["rows"]
    assert row["time_of_without"] > 0


@pytest.mark.parametrize("option, mode", [("compile", None), ("cuda_graphs", "reduce-overhead")])
def test_both_options_compile_the_residual_blocks(option, mode, monkeypatch):
    modes, marks = [], []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kw: modes.append(kw["mode"]))
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(1))
    H = get_hparams("digits", device="cpu", **{option: True})
    vae, ema = load_vaes(H, print)
    assert modes == [mode] * 2 * (len(ema.encoder.enc_blocks) + len(ema.decoder.dec_blocks))
    ema(*[torch.zeros(1, 8, 8, 3)] * 2)
    assert len(marks) == (mode is not None)  # graphs may write over what the pass before computed


def test_bench(tmp_path, capsys):
    report = tmp_path / "report.json"
    bench.main(
        f"--presets digits --batches 2 --rounds 1 --device cpu --precision bf16 "
        f"--checkpoint_activations --profile --json {report}".split()
    )
    report = json.loads(report.read_text())
    assert [row["task"] for row in report["rows"]] == list(bench.TASKS)
    step = report["rows"][0]
    assert step["saved_ratio"] < 0.5 and step["speedup"] > 0 and step["own"]["calls"] > 0
    assert 0 < step["own"]["peak_share"] < 1
    assert step["time_of_without"] == step["own"]["seconds"] / step["without"]["seconds"]
    assert step["own"]["saved_mb_per_image"] < step["without"]["saved_mb_per_image"]
    *table, peaks = capsys.readouterr().out.splitlines()
    assert len(table) == 2 + len(bench.TASKS) * (1 + 6) and "convolution" in "".join(table)
    assert peaks.startswith("matrix peak") and "fp32 " in peaks and "bf16 " in peaks


def test_growth(tmp_path):
    """Twice the pixels or blocks: about twice the bytes; a larger batch: as many an image."""
    picture, report = tmp_path / "growth.png", tmp_path / "growth.json"
    growth.main(
        f"--width 8 --rounds 1 --largest 32 --device cpu --out {picture} --json {report}".split()
    )
    rows = {(row["series"], row["value"]): row for row in json.loads(report.read_text())}
    small, large = rows["resolution", 16], rows["resolution", 32]
    assert large["saved_mb"] / small["saved_mb"] == pytest.approx(4, rel=0.1)
    assert rows["batch", 32]["saved_mb"] == pytest.approx(rows["batch", 1]["saved_mb"], rel=0.01)
    blocks = [rows["depth", k]["saved_mb"] for k in (2, 4, 8)]
    assert blocks[2] - blocks[1] == pytest.approx(2 * (blocks[1] - blocks[0]), rel=0.05)
    for row in rows.values():
        assert row["checkpointed_mb"] < row["saved_mb"] <= row["peak_mb"]
        assert row["train_ms"] > 0 and row["evaluate_ms"] > 0
    assert imageio.imread(picture).shape[1] > 1000


def test_step_benchmark(capsys):
    report = step.main("--preset photos32 --batch 2 --steps 1 --rounds 1".split())
    assert report["step_s"] > report["ema_ms"] / 1e3 > 0 and report["data_ms"] > 0
    assert report["parallel_efficiency"] > 0 and report["step_s_of_two_processes"] > 0
    assert "parallel_efficiency" in capsys.readouterr().out
    with pytest.raises(UserError, match="--preset digits: photos32 has 32 pixels"):
        step.main(["--preset", "digits"])
