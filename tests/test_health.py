"""What keeps a training healthy, and shows that it is: EMA and KL warm-up, channels in use, NaN."""

import json
import math

import numpy as np
import pytest
import torch
from golden import inputs, model
from runs import SMALL, Run, check_latest, events, hashes
from test_train import tiny_run  # noqa: F401  a fixture

import train
from bounds import LayerRates
from errors import UserError
from hps import HPARAMS_REGISTRY
from optimizers import (
    applied_updates,
    convert_optimizer_state,
    count_update,
    ema_rate_after,
    make_optimizer,
)
from options import DEFAULTS, Hyperparams
from pictures import draw_rates
from reports import young_ema
from train_helpers import OneProcess


def lines(folder, kind):
    return [e for e in events(folder) if e.get("type") == kind]


# ---- EMA warm-up ---------------------------------------------------------------------------


def test_the_rate_of_the_ema():
    on, off = (Hyperparams(ema_rate=0.999, ema_warmup=flag) for flag in (True, False))
    assert ema_rate_after(1, on) == 2 / 11 and ema_rate_after(10**6, on) == 0.999
    assert ema_rate_after(1, off) == ema_rate_after(1, Hyperparams(ema_rate=0.999)) == 0.999
    published = ["cifar10", "imagenet32", "imagenet64", "ffhq256", "ffhq1024"]
    assert not any(HPARAMS_REGISTRY[name].ema_warmup for name in published)
    assert all(HPARAMS_REGISTRY[f"images{size}"].ema_warmup for size in (32, 64, 128, 256))


def test_a_warning_while_the_ema_holds_what_the_run_began_with():
    H = Hyperparams(ema_rate=0.999)
    assert "53% of the EMA" in young_ema(H, 638)
    assert young_ema(H, 2994) and not young_ema(H, 2995)  # 0.999 ** n is 5 %
    assert not young_ema(H, 0) and not young_ema(Hyperparams(H, ema_warmup=True), 638)


def stepped(n, H):
    """A model, its EMA, and an optimizer after n steps of training_step."""
    _, vae = model("tiny")
    _, ema = model("tiny")
    optimizer, _ = make_optimizer(vae.parameters(), H, use_apex=False)
    for step in range(n):
        torch.manual_seed(step)
        train.training_step(H, *inputs(vae.H, 2, step), OneProcess(vae), ema, optimizer, step)
    return vae, ema, optimizer


OPTIONS = dict(lr=1e-3, adam_beta1=0.9, adam_beta2=0.9, wd=0.0, ema_rate=0.999, grad_clip=200.0,
               skip_threshold=1e9)  # fmt: skip


def test_training_moves_the_ema_by_the_count_of_applied_updates(monkeypatch):
    rates = []
    monkeypatch.setattr(train, "update_ema", lambda vae, ema, rate: rates.append(rate))
    H = Hyperparams(OPTIONS, ema_warmup=True)
    vae, ema, optimizer = stepped(3, H)
    assert rates == [2 / 11, 3 / 12, 4 / 13] and all(type(r) is float for r in rates)
    # A resumed optimizer counts on from its file; one without a count of its own, from 0.
    again, _ = make_optimizer(vae.parameters(), H, use_apex=False)
    again.load_state_dict(optimizer.state_dict())
    assert applied_updates(again) == 3
    loss = vae(*inputs(vae.H, 2, 0))["elbo"]
    loss.backward()
    again.step()
    assert count_update(again) == 4 and count_update(again) == 5
    plain = torch.optim.SGD(vae.parameters(), 1e-3)
    assert [applied_updates(plain), count_update(plain), count_update(plain)] == [0, 1, 2]
    apex = torch.optim.SGD(vae.parameters(), 1e-3)  # whose count is in the group
    apex.param_groups[0]["step"] = 7
    assert count_update(apex) == 7 and count_update(apex) == 8


def young_run(folder):
    """Arguments of a run of 6 steps an epoch on own images, which shows what is new to it."""
    rng = np.random.RandomState(0)
    np.save(folder / "own.npy", rng.randint(0, 60, (300, 8, 8, 3), dtype=np.uint8))
    preset = ["--hps", "images32", "--image_size", "8", "--custom_width_str=", *SMALL[2:]]
    return [*preset, "--data_root", folder / "own.npy", "--n_batch", "45", "--lr", "0.01",
            "--save_dir", folder]  # fmt: skip


@pytest.fixture(scope="module")
def young(tmp_path_factory):
    """A young run on own images, broken in its middle and taken up again."""
    folder = tmp_path_factory.mktemp("young")
    argv = [*young_run(folder), "--resume"]
    for epochs in ("4", "8"):
        status, text = Run([*argv, "--num_epochs", epochs], folder / "out").wait()
        assert status == 0, text
    return folder, argv, text


@pytest.mark.slow
def test_a_young_runs_ema_is_as_good_as_its_weights(young):
    """48 updates at rate 0.999: without the warm-up 95 % of the EMA would be initial weights."""
    folder, _, text = young
    evaluations = lines(folder / "test", "eval_loss")
    assert len(evaluations) == 8 and "of the EMA" not in text
    for e in evaluations[2:]:
        assert abs(e["bits_per_dim"] - e["weights_bits_per_dim"]) < 0.25, e
    assert evaluations[-1]["bits_per_dim"] < evaluations[0]["bits_per_dim"] - 1


@pytest.mark.slow
def test_the_warm_up_can_be_taken_back(young, tmp_path):
    _, argv, _ = young
    argv = [*argv, "--save_dir", tmp_path, "--no_ema_warmup", "--num_epochs", "4"]
    status, text = Run(argv, tmp_path / "o").wait()
    assert status == 0 and "98% of the EMA" in text
    last = lines(tmp_path / "test", "eval_loss")[-1]
    assert last["bits_per_dim"] > last["weights_bits_per_dim"] + 1  # noise, by its figure


@pytest.mark.slow
def test_a_run_recorded_before_these_options_goes_on_as_it_was(young, tmp_path):
    """Its state.json lacks them: they keep the former meaning, over any number of resumes."""
    _, argv, _ = young
    argv = [*argv, "--save_dir", tmp_path]
    whole = [*argv, "--no_ema_warmup", "--desc", "whole", "--num_epochs", "3"]
    assert Run(whole, tmp_path / "o").wait()[0] == 0
    assert Run([*argv, "--no_ema_warmup", "--num_epochs", "1"], tmp_path / "o").wait()[0] == 0
    path = tmp_path / "test" / "latest-state.json"
    state = json.loads(path.read_text())
    for name in ("ema_warmup", "kl_warmup_iters", "patience", "init_from", "overwrite"):
        assert name in DEFAULTS
        del state["hparams"][name]
    for name in ("best", "stale"):
        del state[name]
    path.write_text(json.dumps(state))
    for epochs in "23":
        status, text = Run([*argv, "--num_epochs", epochs], tmp_path / "o").wait()
        warned = [line for line in text.splitlines() if "the run had" in line]
        assert status == 0 and len(warned) == 1 and "num_epochs is" in warned[0], text
    assert hashes(tmp_path / "test") == hashes(tmp_path / "whole")


# ---- KL warm-up ----------------------------------------------------------------------------


@pytest.mark.parametrize("grad_accum", [1, 2])
def test_kl_warmup_weighs_the_rate_in_the_loss_alone(grad_accum):
    """The gradient is that of distortion + beta * rate; the figures stay the true ones."""
    H = Hyperparams(OPTIONS, kl_warmup_iters=10, grad_accum=grad_accum)
    for step, beta in ((4, 0.5), (50, 1.0)):
        _, vae = model("tiny")
        x, target = inputs(vae.H, 4, 0)
        torch.manual_seed(1)
        parts = [vae(*p) for p in zip(x.chunk(grad_accum), target.chunk(grad_accum), strict=True)]
        loss = sum(p["distortion"] + beta * p["rate"] for p in parts) / grad_accum
        wanted = torch.autograd.grad(loss, list(vae.parameters()))
        taken = []

        class Optimizer:
            def step(self, taken=taken, vae=vae):
                taken += [p.grad.clone() for p in vae.parameters()]

        optimizer = Optimizer()
        optimizer.state, optimizer.param_groups = {}, [{}]
        torch.manual_seed(1)
        _, ema = model("tiny")
        torch.manual_seed(1)
        stats = train.training_step(H, x, target, OneProcess(vae), ema, optimizer, step)
        for a, b in zip(taken, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        assert stats["elbo"] == pytest.approx(stats["distortion"] + stats["rate"], rel=1e-5)
        assert "beta" not in stats


@pytest.mark.slow
def test_kl_warmup_of_0_is_the_published_loss_bit_for_bit(tmp_path):
    off = [*SMALL, "--num_epochs", "1", "--save_dir", tmp_path]
    runs = {"none": [], "zero": ["--kl_warmup_iters", "0"], "one": ["--kl_warmup_iters", "1"],
            "some": ["--kl_warmup_iters", "20"]}  # fmt: skip
    for name, more in runs.items():
        assert Run([*off, *more, "--desc", name], tmp_path / "o").wait()[0] == 0
    assert hashes(tmp_path / "none") == hashes(tmp_path / "zero") == hashes(tmp_path / "one")
    assert hashes(tmp_path / "none") != hashes(tmp_path / "some")
    betas = {e["step"]: e["beta"] for e in lines(tmp_path / "some", "train_loss")}
    assert betas[1] == 1 / 20 and betas[10] == 10 / 20
    assert not any("beta" in e for e in lines(tmp_path / "zero", "train_loss"))


# ---- channels in use -----------------------------------------------------------------------


def test_channels_in_use_are_counted_by_layer(tiny_run, monkeypatch):  # noqa: F811
    H, ema, preprocess_fn = tiny_run
    images = [(torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8),) for _ in range(5)]
    H.n_batch = 2
    rates = train.evaluate(H, ema, images, preprocess_fn)["rate_per_layer"]
    with torch.no_grad():
        kl, g = [0] * len(rates), {}
        for i in range(5):  # image by image, with the noise that evaluate gives each
            g = [torch.Generator().manual_seed(train.noise_seed(H.seed, train.EVALUATION, i))]
            x, _ = preprocess_fn([images[i][0][None]])
            for k, s in enumerate(ema.forward_get_latents(x, g)):
                kl[k] = kl[k] + s["kl"].sum(dim=(0, 2, 3)) / 5
    assert rates.active == [int((c > 0.01).sum()) for c in kl] and sum(rates.active) > 0
    for block in ema.decoder.dec_blocks:  # a posterior that is the prior tells nothing
        for conv in (block.enc.c4, block.prior.c4):
            torch.nn.init.zeros_(conv.weight)
            torch.nn.init.zeros_(conv.bias)
    assert train.evaluate(H, ema, images, preprocess_fn)["rate_per_layer"].active == [0] * len(kl)


def test_the_threshold_is_for_the_mean_over_images():
    kl = torch.tensor([0.0, 0.0099, 0.0101, 5.0, math.inf, math.nan])
    rates = LayerRates(torch.tensor([1.0, 2.0]), kl, [4, 2])
    assert list(rates) == [1.0, 2.0] and rates.active == [2, 1]


@pytest.mark.slow
def test_log_and_picture_show_them(young, tmp_path):
    folder, _, _ = young
    rates = lines(folder / "test", "eval_rates")[-1]
    assert len(rates["active_per_layer"]) == len(rates["rate_per_layer"]) == 2
    sizes = []
    for active in (None, ([3, 0], [8, 8])):
        draw_rates(tmp_path / "r.png", [1, 8], [0.1, 0.2], "title", active)
        sizes.append((tmp_path / "r.png").stat().st_size)
    assert sizes[1] > sizes[0]


# ---- weights that are no numbers -----------------------------------------------------------


def _poisons():
    """In the process of the run: the 15th update makes a weight NaN."""
    step, calls = torch.optim.AdamW.step, []

    def poisoned(self, *args):
        step(self, *args)
        calls.append(1)
        if len(calls) == 15:
            self.param_groups[0]["params"][0].data.view(-1)[0] = math.nan

    torch.optim.AdamW.step = poisoned


def test_one_young_run_shows_all_of_it(tmp_path):
    """The EMA's and the KL's warm-up, channels in use, and no weights that are no numbers."""
    argv = [*young_run(tmp_path), "--iters_per_save", "1", "--kl_warmup_iters", "20"]
    status, text = Run([*argv, "--num_epochs", "3"], tmp_path / "o", _poisons).wait()
    assert status == 2 and "of the EMA" not in text
    assert "latest is not saved at step 15 (an update has made weights NaN" in text
    assert check_latest(tmp_path / "test") == 14
    evaluations = lines(tmp_path / "test", "eval_loss")
    assert [e["step"] for e in evaluations[:2]] == [6, 12]
    e = evaluations[1]  # without the warm-up 0.57 bits/dim, with it 0.11
    assert abs(e["bits_per_dim"] - e["weights_bits_per_dim"]) < 0.25, e
    betas = {e["step"]: e["beta"] for e in lines(tmp_path / "test", "train_loss")}
    assert betas[1] == 1 / 20 and betas[10] == 10 / 20
    rates = lines(tmp_path / "test", "eval_rates")[0]
    assert len(rates["active_per_layer"]) == len(rates["rate_per_layer"]) == 2


@pytest.mark.slow
def test_weights_that_are_no_numbers_are_never_saved(tmp_path):
    argv = [*SMALL, "--save_dir", tmp_path, "--iters_per_save", "1", "--iters_per_ckpt", "10"]
    status, text = Run(argv, tmp_path / "o", _poisons).wait()
    assert status == 2 and "latest is not saved at step 39" in text.splitlines()[-1]
    assert "latest is not saved at step 15 (an update has made weights NaN" in text
    assert check_latest(tmp_path / "test") == 14 and not list(tmp_path.rglob("iter-20-*"))
    assert json.loads((tmp_path / "test" / "best-state.json").read_text())["best"]["step"] == 13
    status, text = Run([*argv, "--resume", "--num_epochs", "2"], tmp_path / "o").wait()
    assert status == 0 and check_latest(tmp_path / "test") == 26


def test_an_optimizer_file_with_negative_squares_is_refused(tmp_path):
    p = [torch.nn.Parameter(torch.zeros(2))]
    state = {"step": torch.tensor(1.0), "exp_avg": -torch.ones(2), "exp_avg_sq": torch.ones(2)}
    content = {"state": {0: state}, "param_groups": [{"params": [0]}]}
    assert convert_optimizer_state(content, p, True)[1] == 1  # a mean of gradients may be negative
    state["exp_avg_sq"] = torch.tensor([1.0, -1e-9])
    with pytest.raises(ValueError, match="exp_avg_sq 0 is below 0"):
        convert_optimizer_state(content, p, True)
    assert issubclass(UserError, ValueError)
