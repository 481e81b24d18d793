"""The files of a save: whole after a fault at every point of it; kept, removed, reported."""

import contextlib
import errno
import itertools
import json
import os
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from golden import inputs, model
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from runs import SAVING, Run, Signal, check_latest, events, figures, hashes
from torch import nn

import checkpoints
import files
import resuming
import run_folder
from checkpoints import remove_old_checkpoints, repair_checkpoints, write_checkpoint
from hps import Hyperparams
from optimizers import make_optimizer
from train_helpers import save_model
from vae import VAE

RUN = [*SAVING, "--num_epochs", "2"]


# ---- every point of a save -------------------------------------------------------------------


def _save(folder, step, prefix="latest", fault=None):
    model = nn.Linear(3, 2)
    nn.init.constant_(model.weight, step)
    optimizer = torch.optim.AdamW(model.parameters())
    path = os.path.join(folder, prefix)
    fault = fault and fault()
    H = Hyperparams(save_dir=str(folder), progress={"step": step})
    write_checkpoint(path, model, model, optimizer, H)
    return NO_SUCH_POINT if fault and next(fault.calls) <= fault.n else 0


NO_SUCH_POINT = 3


@pytest.fixture(scope="module", autouse=True)
def warm(tmp_path_factory):
    """What a first save imports is imported here, and not in every fork: a second each."""
    _save(tmp_path_factory.mktemp("warm"), 0)


class Fault:
    """Breaks the n-th operation on files of a save, before it or, a write, in its middle."""

    def __init__(self, n, strike):
        self.n, self.strike, self.calls = n, strike, itertools.count()
        for module, names in (
            (os, ("mkdir", "fsync", "rename", "replace", "symlink", "link", "unlink", "rmdir")),
            (checkpoints.shutil, ("copyfile",)),
        ):
            for name in names:
                setattr(module, name, self.wrap(getattr(module, name)))
        fault = self

        class File:
            def __init__(self, path, mode="r"):
                fault.count()
                self.file = open(path, mode)

            def write(self, data):
                if next(fault.calls) == fault.n:
                    self.file.write(data[: len(data) // 2])
                    self.file.flush()
                    fault.strike()
                return self.file.write(data)

            def __getattr__(self, name):
                return getattr(self.file, name)

            def __enter__(self):
                return self

            def __exit__(self, *_):
                self.file.close()

        for module in (checkpoints, files, run_folder):
            module.open = File

    def count(self):
        if next(self.calls) == self.n:
            self.strike()

    def wrap(self, function):
        def wrapped(*args, **kwargs):
            self.count()
            return function(*args, **kwargs)

        return wrapped


def _in_a_fork(function):
    """function() in a process of its own: its result, 1 after an OSError, or minus a signal."""
    child = os.fork()
    if child == 0:
        status = 2
        with contextlib.suppress(BaseException):
            try:
                status = function()
            except OSError:
                status = 1
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _kill():
    os.kill(os.getpid(), signal.SIGKILL)


def _no_space():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "sets, strike, status",
    [(0, _kill, -signal.SIGKILL), (3, _kill, -signal.SIGKILL), (2, _no_space, 1)],
)
def test_a_fault_at_every_point_of_a_save(sets, strike, status, tmp_path):
    """After each: the old set or the new one, whole; then a start mends and the next save works."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "log.jsonl").write_text("{}\n")
    for step in range(sets):
        _save(base, step)
    before = check_latest(base)
    for n in itertools.count():
        folder = tmp_path / str(n)
        shutil.copytree(base, folder, symlinks=True)

        outcome = _in_a_fork(lambda: _save(folder, 7, fault=lambda: Fault(n, strike)))  # noqa: B023
        if outcome == NO_SUCH_POINT:
            break
        assert outcome in (0, status)
        found = check_latest(folder)
        assert found in (before, 7)
        if outcome == 1 and found == before:
            assert not [p for p in folder.rglob("*.partial")]
        repair_checkpoints(folder)
        assert check_latest(folder) in (found, 7)  # a complete set that had no name yet has it now
        assert not [p for p in folder.rglob("*") if p.suffix == ".partial" or not p.exists()]
        _save(folder, 8)
        assert check_latest(folder) == 8 and len(list((folder / "sets").glob("0*"))) <= 2
    assert n > 150


def test_a_kill_at_every_point_of_the_removal_of_an_old_set(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    for step in (1, 2, 3):
        _save(base, step, f"iter-{step}")
    for n in itertools.count():
        folder = tmp_path / str(n)
        shutil.copytree(base, folder, symlinks=True)

        def faulty(folder=folder, n=n):
            fault = Fault(n, _kill)
            remove_old_checkpoints(folder, 2)
            return NO_SUCH_POINT if next(fault.calls) <= n else 0

        outcome = _in_a_fork(faulty)
        repair_checkpoints(folder)
        names = {p.name.split("-m")[0] for p in folder.glob("iter-*-model.th")}
        assert names - {"iter-1"} == {"iter-2", "iter-3"}
        assert not [p for p in folder.rglob("*") if p.suffix == ".partial" or not p.exists()]
        for step in names:
            hashes(folder, step)
        if outcome == NO_SUCH_POINT:
            return


def test_files_of_another_program_under_our_names_are_never_mixed_with_ours(tmp_path):
    """A folder of the original's plain files: first they are a set, then ours takes their place."""
    for n in itertools.count():
        folder = tmp_path / str(n)
        folder.mkdir()
        for name in ("model.th", "model-ema.th", "opt.th"):
            (folder / f"latest-{name}").write_text("old")

        outcome = _in_a_fork(lambda: _save(folder, 7, fault=lambda: Fault(n, _kill)))  # noqa: B023
        found = {
            (folder / f"latest-{name}").read_bytes()[:3]
            for name in ("model.th", "model-ema.th", "opt.th")
        }
        assert len(found) == 1
        repair_checkpoints(folder)
        if outcome == NO_SUCH_POINT:
            break
        [content] = found
        assert (folder / "latest-opt.th").read_bytes()[:3] in (content, b"PK\x03")
    assert found != {b"old"} and n > 150
    [old, _] = sorted((folder / "sets").glob("0*"))
    assert (old / "model.th").read_text() == "old"


# ---- what is in them -------------------------------------------------------------------------


@given(
    weights=arrays("float32", array_shapes(max_dims=3, max_side=4)),
    state=st.dictionaries(st.text(), st.floats() | st.integers() | st.text(), max_size=4),
)
def test_a_saved_set_reads_back_the_same(weights, state, tmp_path_factory):
    folder = tmp_path_factory.mktemp("set")
    model = nn.ParameterList([nn.Parameter(torch.from_numpy(weights))])
    state = {"step": 1, "own": state}
    H = Hyperparams(save_dir=str(folder), progress=state)
    write_checkpoint(str(folder / "iter-1"), model, model, torch.optim.SGD([model[0]]), H)
    back = torch.load(folder / "iter-1-model.th", weights_only=True)["0"]
    assert back.numpy().tobytes() == weights.tobytes() and back.shape == weights.shape
    path, found = resuming.newest_checkpoint(str(folder), print)
    assert json.dumps(found["own"]) == json.dumps(state["own"])


def _elbo(H, vae):
    torch.manual_seed(0)
    with torch.no_grad():
        return vae(*inputs(H, 2, 0))["elbo"].item()


def test_what_is_saved_is_plain_and_restores(tmp_path):
    H, vae = model("tiny")
    H.update(lr=1e-3, adam_beta1=0.9, adam_beta2=0.9, wd=0.0, save_dir=str(tmp_path))
    optimizer, _ = make_optimizer(vae.parameters(), H, use_apex=False)
    vae(*inputs(H, 2, 0))["elbo"].backward()
    optimizer.step()
    (tmp_path / "log.jsonl").write_text('{"type": "message"}\n')
    save_model(str(tmp_path / "iter-7"), vae, vae, optimizer, H)
    other = VAE(H)
    other.load_state_dict(torch.load(tmp_path / "iter-7-model-ema.th", weights_only=True))
    assert _elbo(H, other) == _elbo(H, vae)
    content = torch.load(tmp_path / "iter-7-opt.th", weights_only=True)
    assert content["state"][0].keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert (tmp_path / "iter-7-log.jsonl").read_text() == '{"type": "message"}\n'
    assert torch.load(tmp_path / "iter-7-model.th", weights_only=True).keys() == (
        vae.state_dict().keys()
    )


def test_save_model_alone_is_enough_for_programs(tmp_path):
    model = nn.Linear(2, 2)
    path, H = str(tmp_path / "mine"), Hyperparams(save_dir=str(tmp_path))
    for _ in range(3):
        save_model(path, model, model, torch.optim.AdamW(model.parameters()), H)
    assert len(list((tmp_path / "sets").glob("0*"))) == 1
    assert resuming.newest_checkpoint(str(tmp_path), print) is None


# ---- whole runs ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(finished):
    """The folder of a run without a break."""
    return finished(RUN)


class FileLimit:
    """From the n-th step on, no file grows beyond the size of an optimizer's file."""

    def __init__(self, n, until=10**9):
        self.n, self.until = n, until

    def __call__(self):
        import train

        original, calls = train.training_step, itertools.count(1)

        def wrapped(*args):
            step = next(calls)
            limit = 20_000 if self.n <= step < self.until else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            return original(*args)

        train.training_step = wrapped


def test_a_failed_save_is_reported_and_training_goes_on(whole, tmp_path):
    status, text = Run(
        [*RUN, "--save_dir", tmp_path], tmp_path / "out", FileLimit(6, until=18)
    ).wait()
    assert status == 0
    for name, step in (("latest", 8), ("iter-10", 10), ("latest", 12), ("latest", 16)):
        assert f"WARNING: {name} is not saved at step {step} ([Errno 27] File too large)" in text
    assert "not saved at step 20" not in text and "Traceback" not in text
    assert hashes(tmp_path / "test") == hashes(whole)
    assert figures(tmp_path / "test") == figures(whole)


def test_a_failed_last_save_ends_the_run_with_an_error(whole, tmp_path):
    options = [*RUN, "--save_dir", tmp_path]
    status, text = Run(options, tmp_path / "out", FileLimit(14)).wait()
    assert status == 2 and "error: latest is not saved at step 26" in text.splitlines()[-1]
    assert check_latest(tmp_path / "test") == 12
    assert not [p for p in tmp_path.rglob("*") if p.suffix == ".partial"]
    assert Run(options, tmp_path / "out").wait()[0] == 0
    assert hashes(tmp_path / "test") == hashes(whole)


def _clock_goes_backwards():
    now, calls = time.time(), itertools.count()
    time.time = lambda: now - 1000.0 * next(calls)


def test_a_clock_that_goes_backwards(whole, tmp_path):
    """The order of the sets is that of their numbers."""
    options = [*RUN, "--save_dir", tmp_path]
    for step in (7, 9):
        assert Run(options, tmp_path / "o", Signal(signal.SIGTERM, "step", step)).wait()[0] == 143
        for path in Path(tmp_path / "test" / "sets").glob("0*"):
            os.utime(path, (0, 10**9 - int(path.name[:6])))
    assert check_latest(tmp_path / "test") == 16
    assert Run(options, tmp_path / "o", _clock_goes_backwards).wait()[0] == 0
    assert hashes(tmp_path / "test") == hashes(whole)
    assert all(
        e["iter_time"] > 0 for e in events(tmp_path / "test") if e.get("type") == "train_loss"
    )


def test_what_a_set_holds(whole):
    state = json.loads((whole / "latest-state.json").read_text())
    assert (state["step"], state["epoch"], state["position"]) == (26, 2, 0)
    assert state["hparams"]["width"] == 8 and state["versions"]["torch"] == torch.__version__
    assert json.loads((whole / "iter-20-state.json").read_text())["position"] == 700
    for name in ("model", "model-ema", "opt"):
        torch.load(whole / f"latest-{name}.th", weights_only=True)
    assert len(list((whole / "sets").glob("*-latest"))) == 2  # and an older one behind it
    assert not [p for p in whole.rglob("*") if "partial" in p.name]


def test_keep_ckpts(tmp_path):
    options = [*SAVING, "--iters_per_ckpt", "5", "--keep_ckpts", "2", "--save_dir", tmp_path]
    assert Run(options, tmp_path / "o").wait()[0] == 0
    kept = sorted(p.name for p in (tmp_path / "test").glob("iter-*-model.th"))
    assert kept == ["iter-30-model.th", "iter-35-model.th"]
    assert not [p for p in Path(tmp_path).rglob("*") if not p.exists()]  # no name without a file
