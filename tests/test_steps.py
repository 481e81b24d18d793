"""A step in two halves: what a GPU does late, on the CPU by a switch."""

import copy
import functools
import itertools
import math
import os
import signal

import pytest
import torch
from faulty_train import Fault
from golden import inputs, model
from runs import SAVING, SMALL, Run, assert_same, check_latest, figures, hashes, log_of, start

import precision
import steps
import train
from batches import Images
from endings import stop
from noise import noise_shapes
from optimizers import applied_updates, make_optimizer, move_towards
from steps import Launched, Unread
from train_helpers import OneProcess

OPTIONS = dict(lr=1e-3, adam_beta1=0.9, adam_beta2=0.9, wd=0.01, ema_rate=0.99, grad_clip=200.0,
               skip_threshold=400.0)  # fmt: skip


# ---- one step ------------------------------------------------------------------------------


def stepped(n, late, monkeypatch, nan_at=None, **options):
    """(statistics, weights, EMA's, optimizer) after n steps, read late or not."""
    monkeypatch.setattr(steps, "AS_ON_CUDA", late)
    H, vae = model("tiny")
    H.update(OPTIONS | options)
    ema = copy.deepcopy(vae).requires_grad_(False)
    optimizer, _ = make_optimizer(vae.parameters(), H, use_apex=False)
    stats = []
    for step in range(n):
        x, target = inputs(H, 4, step)
        if step == nan_at:
            x[0, 0, 0, 0] = math.nan
        torch.manual_seed(step)
        stats.append(train.training_step(H, x, target, OneProcess(vae), ema, optimizer, step))
        del stats[-1]["iter_time"]
    return stats, list(vae.parameters()), list(ema.parameters()), optimizer


@pytest.mark.parametrize("nan_at", [None, 0, 2])
@pytest.mark.parametrize("options", [{}, {"ema_warmup": True, "grad_accum": 2}])
def test_the_device_decides_as_the_host_does(options, nan_at, monkeypatch):
    host, device = (stepped(4, late, monkeypatch, nan_at, **options) for late in (False, True))
    for one, other in zip(host[0], device[0], strict=True):
        assert one == pytest.approx(other, rel=0, nan_ok=True)
    assert [s["skipped_updates"] for s in host[0]] == [float(i == nan_at) for i in range(4)]
    assert all(torch.equal(*pair) for pair in zip(host[1], device[1], strict=True))
    for one, other in zip(host[2], device[2], strict=True):
        assert torch.allclose(one, other, rtol=1e-6, atol=1e-8)
    assert applied_updates(host[3]) == applied_updates(device[3]) == 4 - (nan_at is not None)
    for p, q in zip(host[1], device[1], strict=True):
        for name, value in host[3].state[p].items():
            assert torch.equal(value, device[3].state[q][name])
    assert not hasattr(device[3], "found_inf")


def test_a_skipped_step_changes_no_bit_of_the_average(monkeypatch):
    _, _, ema, _ = stepped(2, True, monkeypatch)
    _, _, same, _ = stepped(3, True, monkeypatch, nan_at=2)
    assert all(torch.equal(*pair) for pair in zip(ema, same, strict=True))


@pytest.mark.parametrize("replaced", ["update_ema", "get_cpu_stats_over_ranks", "optimizer"])
def test_with_a_programs_own_part_the_host_decides(replaced, monkeypatch):
    """update_ema gets a float, after applied steps alone."""
    calls = []
    if replaced == "optimizer":
        decided = steps.Steps._decide_here
        monkeypatch.setattr(steps.Steps, "_decide_here", lambda *a: calls.append(a) or decided(*a))
        own = torch.optim.SGD
        monkeypatch.setitem(globals(), "make_optimizer", lambda p, H, use_apex: (own(p, 1e-3), ""))
    else:
        original = getattr(train, replaced)
        # A wrapper has what functools.wraps copies of our own function.
        wrapped = functools.wraps(original)(lambda *a: calls.append(a) or original(*a))
        monkeypatch.setattr(train, replaced, wrapped)
    stepped(3, True, monkeypatch, nan_at=1)
    assert len(calls) == (2 if replaced == "update_ema" else 3)
    if replaced == "update_ema":
        assert all(type(rate) is float for *_, rate in calls)


def test_an_average_moves_alike_by_a_number_and_by_a_tensor():
    torch.manual_seed(0)
    averages, parameters = ([torch.randn(3, 5) for _ in range(300)] for _ in range(2))
    others = [t.clone() for t in averages]
    move_towards(averages, parameters, 0.25)
    move_towards(others, parameters, torch.tensor(0.25, dtype=torch.float64))
    assert torch.allclose(torch.stack(averages), torch.stack(others))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_weights_cast_once_and_noise_drawn_before_change_no_bit(checkpointed, monkeypatch):
    results = []
    for late in (False, True):
        casts = counted_casts(monkeypatch)
        options = {"precision": "bf16", "checkpoint_activations": checkpointed}
        stats, weights, *_ = stepped(3, late, monkeypatch, **options)
        results.append((stats, weights, casts))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(*pair) for pair in zip(results[0][1], results[1][1], strict=True))
    assert len(results[1][2]) == 3 and not results[0][2]


def counted_casts(monkeypatch):
    """The calls of precision.cast_together from now on."""
    calls, original = [], precision.cast_together
    monkeypatch.setattr(steps, "cast_together", lambda *a: calls.append(a) or original(*a))
    return calls


def test_weights_are_cast_while_the_step_lasts_and_no_longer():
    """An evaluation in bf16 after an update computes with the new weights."""
    _, vae = model("tiny")
    weights = list(vae.parameters())
    batch = inputs(vae.H, 2, 0)
    copies = [torch.empty_like(p, dtype=torch.bfloat16) for p in weights]

    def loss():
        torch.manual_seed(0)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return vae(*batch)["elbo"].item()

    before = loss()
    with precision.cast_together(weights, copies):
        assert loss() == before
        with torch.no_grad():
            for p in weights:
                p.mul_(1.5)
        stale = loss()
    assert loss() != stale


def test_an_evaluation_casts_once_and_keeps_nothing(monkeypatch):
    """With the figures of one that casts weight by weight."""
    H, vae = model("tiny")
    H.update(OPTIONS | {"precision": "bf16", "n_batch": 2, "seed": 0})
    x, target = inputs(H, 5, 0)
    images, found = Images(torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).numpy()), []
    for on_cuda in (False, True):
        monkeypatch.setattr(steps, "AS_ON_CUDA", on_cuda)
        casts = counted_casts(monkeypatch)
        figures = train.evaluate(
            H, vae, images, lambda batch: tuple(t[batch[0].flatten().long()] for t in (x, target))
        )
        assert figures["n_batches"] == 3 and len(casts) == on_cuda
        assert not precision._Casts.copies
        found.append(figures["elbo"])
    assert found[0] == found[1]


@pytest.mark.parametrize("own", ["sampler", "dropout", None])
def test_noise_is_drawn_before_only_where_nothing_else_draws(own, monkeypatch):
    monkeypatch.setattr(steps, "AS_ON_CUDA", True)
    H, vae = model("tiny")
    H.update(OPTIONS | {"checkpoint_activations": True})
    if own == "sampler":
        monkeypatch.setattr(
            "vae.draw_gaussian_diag_samples", lambda m, s: m + s.exp() * torch.randn_like(m)
        )
    if own == "dropout":
        conv = vae.decoder.dec_blocks[0].resnet.c1
        conv.register_forward_hook(lambda _, __, out: torch.nn.functional.dropout(out))
    one = steps.Steps(H, OneProcess(vae), copy.deepcopy(vae), torch.optim.SGD(vae.parameters(), 0))
    for _ in range(2):
        batch = *inputs(H, 2, 0), None, 0
        one.launch(*batch, train.get_cpu_stats_over_ranks, train.update_ema).read()
    [shapes] = one.noise.values()
    assert shapes == (None if own else noise_shapes(vae, 2))


# ---- the order of reading ------------------------------------------------------------------


class At:
    skips = 0


def reader(max_skips=None):
    """(an Unread, a function that adds a late step of that number of skips in a row)."""
    at = At()
    unread = Unread(at, max_skips)

    def add(number, skips=0):
        def read():
            at.skips = skips
            return number

        step = Launched((), (), 0.0, None, late=True)
        step.read = read
        unread.add(step)

    return unread, add


def test_a_step_is_read_when_the_next_is_launched_or_when_something_is_due():
    unread, add = reader()
    add(1)
    assert list(unread.read(due=False)) == [] and len(unread) == 1
    add(2)
    assert list(unread.read(due=False)) == [1]
    add(3)
    assert list(unread.read(due=True)) == [2, 3] and not unread
    unread.add({"elbo": 1.0})  # of a program's own training_step
    assert list(unread.read(due=False)) == [{"elbo": 1.0}]


@pytest.mark.parametrize("broken", [False, True])
def test_a_streak_of_skips_is_read_to_its_end(broken, monkeypatch):
    """One that was broken meanwhile ends no run."""
    unread, add = reader(max_skips=3)
    add(1, skips=3)
    add(2, skips=0 if broken else 4)
    assert list(unread.read(due=False)) == [1, 2]
    assert (unread.at.skips >= 3) != broken


def test_a_request_to_stop_has_all_read(monkeypatch):
    monkeypatch.setattr(stop, "agreed", True)
    unread, add = reader()
    add(1)
    assert list(unread.read(due=False)) == [1]


# ---- whole runs ----------------------------------------------------------------------------


def read_late():
    steps.AS_ON_CUDA = True


class Killed:
    """Reads late; the process is killed when it launches its n-th step."""

    def __init__(self, n, number=signal.SIGKILL):
        self.n, self.number = n, number

    def __call__(self):
        steps.AS_ON_CUDA = True
        launch, calls = steps.Steps.launch, itertools.count(1)

        def wrapped(*args):
            if next(calls) == self.n:
                os.kill(os.getpid(), self.number)
            return launch(*args)

        steps.Steps.launch = wrapped


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that reads late."""
    folder = tmp_path_factory.mktemp("late")
    status, text = Run([*SAVING, "--save_dir", folder], folder / "out", read_late).wait()
    assert status == 0, text
    return folder / "test"


def test_a_run_that_reads_late_logs_and_saves_what_the_other_does(whole, finished):
    """Every line of the step it names; the EMA to rounding, for it moves in another order."""
    at_once = finished(SAVING)
    one, other = figures(whole), figures(at_once)
    assert one.keys() == other.keys()
    for key in one:
        if key[0] == "train_loss":
            assert one[key] == other[key]
    for name in ("model.th", "opt.th"):
        assert hashes(whole)[name] == hashes(at_once)[name]
        assert hashes(whole, "iter-10")[name] == hashes(at_once, "iter-10")[name]
    ours, theirs = (torch.load(f / "latest-model-ema.th") for f in (whole, at_once))
    assert all(torch.allclose(t, theirs[k], rtol=1e-5, atol=1e-7) for k, t in ours.items())


@pytest.mark.parametrize("n", [7, pytest.param(14, marks=pytest.mark.slow)])
def test_a_late_run_that_is_killed_goes_on_bit_for_bit(n, whole, tmp_path):
    options = [*SAVING, "--save_dir", tmp_path]
    assert Run(options, tmp_path / "out", Killed(n)).wait()[0] == -signal.SIGKILL
    assert Run(options, tmp_path / "out", read_late).wait()[0] == 0
    assert_same(tmp_path / "test", whole)


def test_a_late_run_stops_at_most_one_step_later(whole, tmp_path):
    options = [*SAVING, "--save_dir", tmp_path]
    status, text = Run(options, tmp_path / "out", Killed(6, signal.SIGTERM)).wait()
    assert status == 143 and "stopped at step 7" in text
    assert check_latest(tmp_path / "test") == 7
    assert Run(options, tmp_path / "out", read_late).wait()[0] == 0
    assert hashes(tmp_path / "test") == hashes(whole)


def test_max_skips_ends_a_late_run_with_its_state_saved(tmp_path):
    options = [*SMALL, "--skip_threshold", "1e-9", "--max_skips", "3", "--save_dir", tmp_path]
    status, text = Run(options, tmp_path / "out", read_late).wait()
    assert status == 2 and "--max_skips 3: 4 updates in a row were skipped" in text
    assert check_latest(tmp_path / "test") == 4


def test_late_ranks_decide_alike(tmp_path):
    """A NaN on one rank skips the step on both; a signal to one stops both at the same step."""
    (tmp_path / "hashes").mkdir()
    options = [*SMALL, "--n_batch", "40", "--num_epochs", "1"]
    fault = Fault("nan_input,inf_gradient,sigterm", 1, 6, late=True)
    for run in start(2, options, tmp_path, fault, HASHES=str(tmp_path / "hashes")):
        status, text = run.wait()
        assert status == 143, text[-1500:]
    ranks = [(tmp_path / "hashes" / str(rank)).read_text().split() for rank in range(2)]
    assert ranks[0] == ranks[1] and len(ranks[0]) == 10  # the signal's own step: it is logged
    assert [i + 1 for i in range(1, 10) if ranks[0][i] == ranks[0][i - 1]] == [6, 8]
    assert check_latest(tmp_path / "test") == 10
    [line] = [e for e in log_of(tmp_path / "test") if e.get("step") == 10]
    assert line["skipped_updates"] == 2 and line["distortion_nans"] == 1
