"""Faults while files are written: kills at every point, full and read-only disks, two runs."""

import contextlib
import errno
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from runs import ENV, ROOT, SMALL, Run, Signal, check_latest, events, figures, hashes
from torch import nn

import train_helpers
import utils
from hps import Hyperparams
from train_helpers import mend_sets, remove_old_sets, save_model, save_run

RUN = [*SMALL, "--iters_per_save", "4", "--iters_per_ckpt", "10", "--num_epochs", "2", "--resume"]

# ---- every point of a save -------------------------------------------------------------------


def _save(folder, step, prefix="latest", fault=None):
    model = nn.Linear(3, 2)
    nn.init.constant_(model.weight, step)
    optimizer = torch.optim.AdamW(model.parameters())
    path = os.path.join(folder, prefix)
    fault = fault and fault()
    save_run(path, model, model, optimizer, Hyperparams(save_dir=str(folder)), {"step": step})
    return NO_SUCH_POINT if fault and next(fault.calls) <= fault.n else 0


NO_SUCH_POINT = 3


@pytest.fixture(scope="module", autouse=True)
def warm(tmp_path_factory):
    """What a first save imports is imported here, and not in every fork: a second each."""
    _save(tmp_path_factory.mktemp("warm"), 0)


class Fault:
    """Breaks the n-th operation on files of train_helpers, before it or, a write, in its middle."""

    def __init__(self, n, strike):
        self.n, self.strike, self.calls = n, strike, itertools.count()
        for module, names in (
            (os, ("mkdir", "fsync", "rename", "replace", "symlink", "link", "unlink", "rmdir")),
            (train_helpers.shutil, ("copyfile",)),
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

        train_helpers.open = File

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
        mend_sets(folder)
        assert check_latest(folder) in (found, 7)  # a complete set that had no name yet has it now
        assert not [p for p in folder.rglob("*") if p.suffix == ".partial" or not p.exists()]
        _save(folder, 8)
        assert check_latest(folder) == 8 and len(list((folder / "sets").glob("0*"))) <= 2
    assert n > 30


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
            remove_old_sets(folder, 2)
            return NO_SUCH_POINT if next(fault.calls) <= n else 0

        outcome = _in_a_fork(faulty)
        mend_sets(folder)
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
        mend_sets(folder)
        if outcome == NO_SUCH_POINT:
            break
        [content] = found
        assert (folder / "latest-opt.th").read_bytes()[:3] in (content, b"PK\x03")
    assert found != {b"old"} and n > 30
    [old, _] = sorted((folder / "sets").glob("0*"))
    assert (old / "model.th").read_text() == "old"


@given(
    weights=arrays("float32", array_shapes(max_dims=3, max_side=4)),
    state=st.dictionaries(st.text(), st.floats() | st.integers() | st.text(), max_size=4),
)
def test_a_saved_set_reads_back_the_same(weights, state, tmp_path_factory):
    folder = tmp_path_factory.mktemp("set")
    model = nn.ParameterList([nn.Parameter(torch.from_numpy(weights))])
    H = Hyperparams(save_dir=str(folder))
    state = {"step": 1, "own": state}
    save_run(str(folder / "iter-1"), model, model, torch.optim.SGD([model[0]]), H, state)
    back = torch.load(folder / "iter-1-model.th", weights_only=True)["0"]
    assert back.numpy().tobytes() == weights.tobytes() and back.shape == weights.shape
    path, found = train_helpers.newest_set(str(folder), print)
    assert json.dumps(found["own"]) == json.dumps(state["own"])


def test_save_model_alone_is_enough_for_programs(tmp_path):
    model = nn.Linear(2, 2)
    path, H = str(tmp_path / "mine"), Hyperparams(save_dir=str(tmp_path))
    for _ in range(3):
        save_model(path, model, model, torch.optim.AdamW(model.parameters()), H)
    assert len(list((tmp_path / "sets").glob("0*"))) == 1
    assert train_helpers.newest_set(str(tmp_path), print) is None


# ---- whole runs --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert Run([*RUN, "--save_dir", folder], folder / "out").wait()[0] == 0
    return folder / "test"


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


def test_a_run_whose_output_can_not_be_written_goes_on(whole, tmp_path):
    """As where stdout and stderr are files on a full disk."""
    run = Run([*RUN, "--save_dir", tmp_path], "/dev/full")
    run.process.join(120)
    assert run.process.exitcode == 0
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


def _mounts():
    """Whether a mount of one's own can be made here, or why not."""
    probe = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"]
    try:
        return subprocess.run(probe, capture_output=True, text=True).stderr.strip()
    except FileNotFoundError as error:
        return str(error)


@pytest.mark.skipif(bool(_mounts()), reason=f"no mounts here: {_mounts()}")
def test_a_full_disk_and_a_read_only_one(whole, tmp_path):
    """A disk of 400 kB: a set is about 100 kB. Its log is cut short too; the run goes on.

    Then it has no byte free, or is read-only: a start is refused, what it prints to this disk lost.
    Then there is room: it ends as if nothing were.
    """
    disk = tmp_path / "disk"
    disk.mkdir()
    script = """
import os, subprocess, sys
import train

disk, copy, *argv = sys.argv[1:]

def run(name, *more):
    child = os.fork()
    if child == 0:
        sys.argv = ["train.py", *argv, *more]
        train.run_command(train.main)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(name, status, flush=True)

def mount(*words):
    subprocess.run(["mount", *words, disk], check=True)

mount("-t", "tmpfs", "-o", "size=400k", "none")
run("small", "--iters_per_ckpt", "2")
subprocess.run(f"cat /dev/zero > {disk}/fill", shell=True)
run("full")
os.remove(f"{disk}/fill")
mount("-o", "remount,ro")
run("read-only")
mount("-o", "remount,rw,size=40M")
run("roomy")
subprocess.run(["cp", "-r", f"{disk}/test", copy], check=True)
"""
    done = subprocess.run(
        ["unshare", "-rm", os.sys.executable, "-c", script, disk, tmp_path / "copy",
         *RUN, "--save_dir", disk],
        cwd=ROOT, env=ENV, text=True, capture_output=True,
    )  # fmt: skip
    out, err = done.stdout, done.stderr
    for line in ("small 2", "full 2", "read-only 2", "roomy 0"):
        assert line in out.splitlines(), out + err
    assert "is not saved at step" in out and "Traceback" not in err
    assert f"{disk}/test can't be written (No space left on device)" in err
    assert "lock can't be written or locked (Read-only file system)" in err
    check_latest(tmp_path / "copy")
    assert hashes(tmp_path / "copy") == hashes(whole)


def test_a_second_run_on_the_folder_is_refused(tmp_path):
    """For as long as the first lives: a SIGKILL frees the folder."""
    options = [*RUN, "--num_epochs", "999", "--save_dir", tmp_path]
    first = Run(options, tmp_path / "first")
    while not check_latest(tmp_path / "test"):
        time.sleep(0.05)
    log = tmp_path / "test" / "log.jsonl"
    for resume in ([], ["--resume"]):
        arguments = [a for a in options if a != "--resume"] + resume
        status, text = Run(arguments, tmp_path / "o").wait()
        last = text.splitlines()[-1]
        assert (
            status == 2
            and f"is in use by process {first.process.pid} on" in last
            and "--desc" in last
        )
        assert text.count("error:") == 1
    assert sum(e.get("message", "").startswith("training model") for e in events(log.parent)) == 1
    first.kill()
    status, text = Run([*options, "--num_epochs", "2"], tmp_path / "o").wait()
    assert status == 0, text


def test_a_log_cut_short_or_lost(whole, tmp_path):
    options = [*RUN, "--save_dir", tmp_path]
    folder = tmp_path / "test"
    for mend in ("cut", "lost"):
        run = Run(
            options, tmp_path / "o", Signal(signal.SIGTERM, "step", 9 if mend == "cut" else 3)
        )
        assert run.wait()[0] == 143
        if mend == "cut":
            for name in ("log.jsonl", "log.txt"):
                with open(folder / name, "r+b") as file:
                    file.truncate(os.path.getsize(folder / name) - 9)
        else:
            (folder / "log.jsonl").unlink()
    assert Run(options, tmp_path / "o").wait()[0] == 0
    assert hashes(folder) == hashes(whole)
    assert all(figures(whole)[key] == line for key, line in figures(folder).items())
    utils.logger(str(tmp_path / "log"))("one")
    for name in ("log.jsonl", "log.txt"):
        with open(tmp_path / name, "r+b") as file:
            file.truncate(os.path.getsize(tmp_path / name) - 4)
    utils.logger(str(tmp_path / "log"))("two")
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert len(lines) == 2 and json.loads(lines[1])["message"] == "two"


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


def test_a_second_signal_ends_at_once(tmp_path):
    """Unless it comes within two seconds, when it is a launcher's copy of the first."""
    status, _ = Run([*RUN, "--save_dir", tmp_path], tmp_path / "o", _signals_in_a_long_step).wait()
    assert status == 130
    assert check_latest(tmp_path / "test") == 4


def _signals_in_a_long_step():
    import train

    original, calls = train.training_step, itertools.count(1)

    def wrapped(*args):
        if next(calls) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(2.1)
            os.kill(os.getpid(), signal.SIGINT)
        return original(*args)

    train.training_step = wrapped
