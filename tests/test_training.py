"""Training steps against the original's figures, exact evaluation, skips, schedule, optimizer."""

import copy
import json
import math
import sys

import numpy as np
import pytest
import torch
from golden import figures, inputs, model

import train
from data import Images, make_preprocess
from hps import Hyperparams, UserError
from train_helpers import (
    OneProcess,
    accumulate_stats,
    convert_optimizer_state,
    linear_warmup,
    load_opt,
    make_optimizer,
    restore_optimizer,
)


def _sum_and_squares(tensors):
    flat = torch.cat([t.detach().double().flatten() for t in tensors])
    return flat.sum().item(), (flat**2).sum().item()


@pytest.mark.parametrize("run", figures("training_steps"))
def test_training_steps(run):
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


def test_accumulate_stats():
    keys = ("elbo", "rate", "grad_norm", "rate_nans", "skipped_updates")
    rows = [(9, 9, 99, 9, 9), (1, 2, 3, 0, 1), (math.nan, 4, math.inf, 1, 1), (2, 6, 2, 0, 0)]
    stats = [dict(zip(keys, map(float, row), strict=True)) for row in rows]
    result = accumulate_stats(stats, 3)
    assert result == pytest.approx(
        {"elbo": math.nan, "elbo_filtered": 1.5, "rate": 4, "grad_norm": 3, "rate_nans": 1,
         "skipped_updates": 2},
        nan_ok=True,
    )  # fmt: skip


def test_warm_up_starts_at_one_step_and_ends_at_one():
    assert [linear_warmup(4.0)(step) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert linear_warmup(0)(0) == 1


# ---- optimizer files -------------------------------------------------------------------------


def _trained(steps=3):
    H, vae = model("tiny")
    H.update(lr=2e-4, adam_beta1=0.9, adam_beta2=0.9, wd=0.01, ema_rate=0.99, warmup_iters=100)
    H.update(grad_clip=200.0, skip_threshold=400.0, device="cpu", local_rank=0, mpi_size=1)
    ema = copy.deepcopy(vae)
    optimizer, _ = make_optimizer(vae.parameters(), H, use_apex=False)
    for i in range(steps):
        torch.manual_seed(i)
        train.training_step(H, *inputs(H, 3, i), vae, ema, optimizer, i)
    return H, vae, ema, optimizer


def _apex_layout(optimizer):
    """What Apex's FusedAdam would have saved in the place of this AdamW."""
    content = copy.deepcopy(optimizer.state_dict())
    [group] = content["param_groups"]
    [step] = {int(entry.pop("step")) for entry in content["state"].values()}
    names = ("lr", "betas", "eps", "weight_decay", "params")
    apex = {name: group[name] for name in names}
    apex |= {"bias_correction": True, "initial_lr": group["lr"], "step": step}
    return {"state": content["state"], "param_groups": [apex]}


@pytest.mark.parametrize("layout", ["AdamW", "Apex", "Apex, legacy file"])
def test_training_goes_on_exactly_from_a_restored_optimizer(layout, tmp_path):
    H, vae, ema, optimizer = _trained()
    H.restore_optimizer_path = str(tmp_path / "opt.th")
    content = optimizer.state_dict() if layout == "AdamW" else _apex_layout(optimizer)
    torch.save(
        content, H.restore_optimizer_path, _use_new_zipfile_serialization="legacy" not in layout
    )
    log = tmp_path / "log.jsonl"
    log.write_text(json.dumps({"type": "train_loss", "step": 3, "epoch": 7}) + "\n")
    H.restore_log_path = str(log)
    other, other_ema = copy.deepcopy(vae), copy.deepcopy(ema)
    restored, scheduler, best, iterate, epoch = load_opt(H, other, print)
    assert (best, iterate, epoch) == (math.inf, 3, 7)
    assert scheduler.get_last_lr() == [pytest.approx(2e-4 * 4 / 100)]  # no second warm-up
    assert restored.param_groups[0]["fused"]
    restored.param_groups[0]["lr"] = 2e-4
    for v, e, o in ((vae, ema, optimizer), (other, other_ema, restored)):
        torch.manual_seed(9)
        train.training_step(H, *inputs(H, 3, 9), v, e, o, 3)
    assert all(torch.equal(a, b) for a, b in zip(vae.parameters(), other.parameters(), strict=True))


def test_conversion_there_and_back():
    _, vae, _, optimizer = _trained(2)
    apex = _apex_layout(optimizer)
    there, step = convert_optimizer_state(apex, vae.parameters(), per_parameter_step=True)
    assert step == 2
    for position, entry in optimizer.state_dict()["state"].items():
        for name, t in entry.items():
            assert torch.equal(there[position][name], t)
            assert there[position][name].dtype == torch.float32
            assert there[position][name] is not t
    back, step = convert_optimizer_state(
        optimizer.state_dict(), vae.parameters(), per_parameter_step=False
    )
    assert step == 2 and back[0].keys() == {"exp_avg", "exp_avg_sq"}


def test_an_optimizer_file_of_another_model_is_refused(tmp_path):
    _, vae, _, optimizer = _trained(1)
    path = tmp_path / "opt.th"
    torch.save(optimizer.state_dict(), path)
    _, other = model("tiny_res2")
    other_optimizer, _ = make_optimizer(
        other.parameters(), Hyperparams(lr=1, adam_beta1=0.9, adam_beta2=0.9, wd=0), False
    )
    with pytest.raises(UserError, match="parameters"):
        restore_optimizer(other_optimizer, str(path), 0, 1)


APEX_PACKAGES = {
    "absent": None,
    "an empty folder": {},
    "unrelated": {"__init__.py": "raise ImportError('cannot import UnencryptedCookieSession')"},
    "Python-only": {
        "__init__.py": "",
        "optimizers.py": "class FusedAdam:\n"
        "    def __init__(self, *a, **k): raise RuntimeError('apex.optimizers needs cuda')",
    },
}


def _forget_apex(monkeypatch):
    """Whatever an earlier test imported under that name."""
    for name in [name for name in sys.modules if name.split(".")[0] == "apex"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize("kind", APEX_PACKAGES)
def test_an_unusable_apex_falls_back_to_adamw_and_says_why(kind, tmp_path, monkeypatch):
    files = APEX_PACKAGES[kind]
    _forget_apex(monkeypatch)
    if files is not None:
        (tmp_path / "apex").mkdir()
        for name, text in files.items():
            (tmp_path / "apex" / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    _, vae = model("tiny")
    H = Hyperparams(lr=1e-3, adam_beta1=0.9, adam_beta2=0.8, wd=0.5)
    optimizer, name = make_optimizer(vae.parameters(), H, use_apex=True)
    assert isinstance(optimizer, torch.optim.AdamW) and "no usable NVIDIA Apex" in name


def test_a_usable_apex_is_taken(tmp_path, monkeypatch):
    _forget_apex(monkeypatch)
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    (tmp_path / "apex" / "optimizers.py").write_text(
        "import torch\n"
        "class FusedAdam(torch.optim.SGD):\n"
        "    def __init__(self, params, lr, betas, eps, weight_decay, adam_w_mode):\n"
        "        assert adam_w_mode and eps == 1e-8 and betas == (0.9, 0.8)\n"
        "        super().__init__(params, lr)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    _, vae = model("tiny")
    H = Hyperparams(lr=1e-3, adam_beta1=0.9, adam_beta2=0.8, wd=0.5)
    assert make_optimizer(vae.parameters(), H, use_apex=True)[1] == "NVIDIA Apex FusedAdam"
    assert make_optimizer(vae.parameters(), H, use_apex=False)[1] == "torch.optim.AdamW"
