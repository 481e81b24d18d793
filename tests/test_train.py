"""Training steps against the original's figures, exact evaluation, skips; several processes."""

import copy
import math

import numpy as np
import pytest
import torch
from golden import figures, inputs, model
from runs import TINY, free_port, launch, log_of

import ahead
import steps
import train
import vae as vae_module
from batches import Images, make_preprocess
from errors import UserError
from optimizers import make_optimizer
from train_helpers import OneProcess

# ---- one step --------------------------------------------------------------------------------


def _sum_and_squares(tensors):
    flat = torch.cat([t.detach().double().flatten() for t in tensors])
    return flat.sum().item(), (flat**2).sum().item()


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("run", figures("training_steps"))
def test_training_steps(run, late, monkeypatch):
    """With the update decided before it, or by its own flag as on a GPU."""
    monkeypatch.setattr(steps, "AS_ON_CUDA", late)
    expected = figures("training_steps")[run]
    H, vae = model("tiny")
    H.update(lr=2e-4, adam_beta1=0.9, adam_beta2=0.9, wd=0.01, ema_rate=0.99)
    H.update(grad_clip=expected["grad_clip"], skip_threshold=expected["skip_threshold"])
    ema = copy.deepcopy(vae).requires_grad_(False)
    optimizer, _ = make_optimizer(vae.parameters(), H, use_apex=False)
    for i, want in enumerate(expected["steps"]):
        x, target = inputs(H, 3, 30 + i)
        if run == "nan_at_step_2" and i == 2:
            x[0, 0, 0, 0] = math.nan
        torch.manual_seed(100 + i)
        got = train.training_step(H, x, target, vae, ema, optimizer, i)
        assert got.pop("iter_time") > 0 and all(type(v) is float for v in got.values())
        want = {k: float(v) for k, v in want.items()}
        assert got == pytest.approx(want, rel=1e-5, nan_ok=True)
    total, squares = _sum_and_squares(vae.parameters())
    assert squares == pytest.approx(expected["weights_sq"], rel=1e-6)
    # Of 75,682 weights that each moved by about lr: the sum tells one skipped step from none.
    assert total == pytest.approx(expected["weights_sum"], abs=2e-3)
    total, squares = _sum_and_squares(ema.parameters())
    assert squares == pytest.approx(expected["ema_sq"], rel=1e-6)
    assert total == pytest.approx(expected["ema_sum"], abs=1e-4)
    for weights, key in ((vae, "in_conv_weight_sum"), (ema, "ema_in_conv_weight_sum")):
        got = _sum_and_squares([weights.encoder.in_conv.weight])
        assert got == pytest.approx(expected[key], rel=1e-4)


def test_a_gradient_that_is_not_finite_never_reaches_the_weights():
    """Also where the norm's threshold is off and the loss itself is finite."""
    H, vae = model("tiny")
    H.update(lr=2e-4, adam_beta1=0.9, adam_beta2=0.9, wd=0.01, ema_rate=0.99)
    H.update(grad_clip=200.0, skip_threshold=-1)
    ema = copy.deepcopy(vae).requires_grad_(False)
    optimizer, _ = make_optimizer(vae.parameters(), H, use_apex=False)
    vae.decoder.gain.register_hook(lambda g: g * math.inf)
    before = copy.deepcopy(vae.state_dict())
    stats = train.training_step(H, *inputs(H, 3, 30), vae, ema, optimizer, 0)
    assert stats["skipped_updates"] == 1 and math.isfinite(stats["elbo"])
    assert all(torch.equal(t, before[k]) for k, t in vae.state_dict().items())
    assert not optimizer.state


# ---- gradient accumulation, precision --------------------------------------------------------


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


# ---- evaluation ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    return model("tiny")


def test_eval_step_gives_floats(tiny):
    H, net = tiny
    stats = train.eval_step(*inputs(H, 2, 0), net)
    assert stats.keys() == {"elbo", "distortion", "rate"}
    assert all(type(v) is float for v in stats.values())


def _dataset(n, size, seed=0):
    return Images(np.random.RandomState(seed).randint(0, 256, (n, size, size, 3), dtype=np.uint8))


@pytest.fixture
def tiny_run():
    """(H, EMA model, preprocess_fn) of a model of 16 x 16 pixels, on the CPU."""
    H, vae = model("tiny")
    H.update(seed=5, n_batch=4, device="cpu", desc="t", ema_rate=0.99)
    return H, vae.requires_grad_(False), make_preprocess("cifar10", "cpu")


def test_evaluation_does_not_depend_on_the_batch_size(tiny_run):
    H, ema, preprocess_fn = tiny_run
    images = _dataset(17, 16)
    results = {}
    for n_batch in (1, 3, 16, 17):
        H.n_batch = n_batch
        results[n_batch] = train.evaluate(H, ema, images, preprocess_fn)
        assert results[n_batch].pop("n_batches") == math.ceil(17 / n_batch)
        results[n_batch] |= dict(enumerate(results[n_batch].pop("rate_per_layer")))
    for result in results.values():
        assert result == pytest.approx(results[1], rel=1e-5)
    assert results[1]["n_images"] == 17
    assert results[1]["elbo"] == results[1]["filtered_elbo"]
    assert results[1]["bits_per_dim"] == pytest.approx(results[1]["elbo"] / math.log(2))
    H.seed += 1
    assert train.evaluate(H, ema, images, preprocess_fn)["elbo"] != results[17]["elbo"]


def test_evaluation_weighs_every_image_alike(tiny_run):
    """The mean over 5 images is the mean of the images' own figures."""
    H, ema, preprocess_fn = tiny_run
    images, H.n_batch = _dataset(5, 16), 2
    whole = train.evaluate(H, ema, images, preprocess_fn)
    own = []
    for i in range(5):
        g = [torch.Generator().manual_seed(train.noise_seed(H.seed, train.EVALUATION, i))]
        distortion, rate = ema.distortion_and_rate(
            *preprocess_fn([images[i][0][None]]), generators=g
        )
        own.append((distortion + rate).item())
    assert whole["elbo"] == pytest.approx(np.mean(own), rel=1e-5)


def test_evaluation_gives_the_rates_and_the_bound(monkeypatch):
    H, vae = model("tiny")
    H.update(n_batch=4, seed=0, device="cpu")
    levels = np.random.RandomState(0).randint(0, 256, (10, H.image_size, H.image_size, 3))
    images = torch.utils.data.TensorDataset(torch.from_numpy(levels.astype(np.uint8)))
    x, target = inputs(H, 10, 0)

    def preprocess_fn(batch):
        return x[: len(batch[0])], target[: len(batch[0])]

    figures = {}
    for k in (None, 1, 8):
        H.iw_samples = k
        figures[k] = train.evaluate(H, vae, images, preprocess_fn)
        assert sum(figures[k]["rate_per_layer"]) == pytest.approx(figures[k]["rate"])
    assert len(figures[1]["rate_per_layer"]) == len(vae.decoder.dec_blocks)
    assert "iw_elbo" not in figures[None]
    assert figures[1]["iw_elbo"] == pytest.approx(figures[1]["elbo"], rel=1e-6)
    assert figures[8]["iw_elbo"] < figures[1]["iw_elbo"]
    assert figures[8]["iw_bits_per_dim"] == pytest.approx(figures[8]["iw_elbo"] / np.log(2))

    begun, begin = [], ahead.Ahead._begin
    monkeypatch.setattr(ahead, "AS_ON_CUDA", True)
    monkeypatch.setattr(ahead.Ahead, "_begin", lambda *a: (begun.append(a[1:]), begin(*a))[1])
    assert train.evaluate(H, vae, images, preprocess_fn) == figures[8]
    # All 27 passes but the first, of which the others learn, each once; then the end.
    assert len(begun) == 27 and not begun[-1][0]


# ---- the loop --------------------------------------------------------------------------------


def _fake_training(monkeypatch, tmp_path, norms, **options):
    """Runs train_loop with steps that report the given gradient norms; returns log lines."""
    H, vae = model("tiny")
    H.update(lr=1e-3, adam_beta1=0.9, adam_beta2=0.9, wd=0.0, warmup_iters=0, grad_clip=1.0)
    H.update(seed=0, n_batch=1, device="cpu", desc="t", save_dir=str(tmp_path), num_epochs=1)
    H.update(skip_streak=3, skip_threshold=400.0, iters_per_print=1000, iters_per_save=1000)
    H.update(iters_per_ckpt=1000, iters_per_images=1000, epochs_per_eval=1, dataset="ffhq_1024")
    H.update(num_images_visualize=1, num_variables_visualize=1, num_temperatures_visualize=1)
    H.update(options)
    norms = iter(norms)

    def training_step(*args):
        norm = next(norms)
        nans = {"rate_nans": 0.0, "distortion_nans": 0.0}
        skipped = float(norm >= 400)
        return {"elbo": 1.0, "grad_norm": norm, "skipped_updates": skipped, "iter_time": 1, **nans}

    monkeypatch.setattr(train, "training_step", training_step)
    monkeypatch.setattr(train, "evaluate", lambda *a: {"elbo": 1.0})
    monkeypatch.setattr(train, "log_evaluation", lambda *a, **event: None)
    lines = []

    def logprint(*args, **kwargs):
        lines.append(" ".join(args) if args else kwargs)

    data, preprocess_fn = _dataset(len(options.pop("steps")), 16), make_preprocess("cifar10", "cpu")
    wrapped = OneProcess(vae)
    train.train_loop(H, data, _dataset(1, 16), preprocess_fn, wrapped, copy.deepcopy(vae), logprint)
    return lines


def test_a_streak_of_skips_is_reported_once(monkeypatch, tmp_path):
    norms = [1, 500, 500, 1, 500, 500, 500, 500, 500, 1, 600, 600, 600]
    lines = _fake_training(monkeypatch, tmp_path, norms, steps=norms)
    warnings = [line for line in lines if "WARNING" in line]
    assert len(warnings) == 2
    assert "3 updates" in warnings[0] and "--skip_threshold" in warnings[0]


def test_max_skips_ends_the_run_with_its_state_saved(monkeypatch, tmp_path):
    norms = [1, 500, 500, 500, 500]
    with pytest.raises(UserError, match="--max_skips 3"):
        _fake_training(monkeypatch, tmp_path, norms, steps=norms, max_skips=3)
    assert (tmp_path / "latest-model.th").exists()


def test_a_batch_larger_than_the_data_is_refused(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="--n_batch 3"):
        _fake_training(monkeypatch, tmp_path, [], steps=[1, 1], n_batch=3)


# ---- several processes -----------------------------------------------------------------------


def test_two_processes_with_every_option(tmp_path):
    args = [*TINY, "--grad_accum", "3", "--n_batch", "8", "--precision", "bf16"]
    for done in launch("slurm", 2, [*args, "--checkpoint_activations"], tmp_path, free_port()):
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Grad strides do not match" not in done.stdout + done.stderr
    events = log_of(tmp_path / "saved_models" / "test")
    assert any("global batch: 48 images" in e.get("message", "") for e in events)
    [evaluation] = [e for e in events if e.get("type") == "eval_loss"]
    assert evaluation["step"] == 1397 // 2 // 24
    *_, last = [e for e in events if e.get("type") == "train_loss"]
    assert math.isfinite(last["elbo"]) and last["skipped_updates"] == 0


def test_evaluation_agrees_for_any_batch_and_number_of_processes(tmp_path):
    [done] = launch("slurm", 1, TINY, tmp_path, 1)
    assert done.returncode == 0, done.stderr
    ema = str(tmp_path / "saved_models" / "test" / "latest-model-ema.th")
    figures = []
    for n, n_batch in [(1, 1), (1, 3), (1, 16), (2, 3), (3, 16)]:
        args = [*TINY, "--restore_ema_path", ema, "--test_eval", "--n_batch", str(n_batch)]
        for done in launch("slurm", n, args, tmp_path, free_port()):
            assert done.returncode == 0, done.stderr
        figures.append(log_of(tmp_path / "saved_models" / "test")[-1])
    for f in figures:
        assert f["type"] == "test_loss" and f["n_images"] == 200
        for name in ("elbo", "distortion", "rate", "bits_per_dim"):
            assert f[name] == pytest.approx(figures[0][name], rel=1e-5)
