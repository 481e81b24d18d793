"""Signals: each that a scheduler sends saves and ends the run, and no more than that."""

import ctypes
import os
import signal
import subprocess
import time

import pytest
from runs import BIN, SMALL, Run, check_latest, command, events, saved_step, start

import endings
from endings import SIGNALS

RUN = [*SMALL, "--n_batch", "40", "--num_epochs", "100000", "--iters_per_save", "4", "--resume"]
NAMES = [s.name for s in SIGNALS]


def wait_until_saved(folder, alive):
    deadline = time.monotonic() + 6000
    while not saved_step(folder / "test"):
        assert time.monotonic() < deadline and alive()
        time.sleep(0.05)


def lives(pid):
    """Whether a process runs: one that has ended may have nobody who asks for its status."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_what_schedulers_send_is_known():
    known = {"SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGQUIT", "SIGALRM"}
    assert known <= set(NAMES)


def test_a_timer_that_a_library_has_taken_stays_its_own():
    """By Python or by C, of which Python does not know."""
    request, handlers = endings._StopRequest(), {n: signal.getsignal(n) for n in SIGNALS}
    in_c, own = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: None), lambda *_: None
    try:
        signal.signal(signal.SIGPROF, own)
        ctypes.CDLL(None).signal(int(signal.SIGVTALRM), in_c)
        request.listen()
        assert signal.getsignal(signal.SIGPROF) is own
        assert signal.getsignal(signal.SIGVTALRM) == signal.SIG_DFL
        assert signal.getsignal(signal.SIGALRM) == request._note
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.mark.parametrize(
    "name",
    [n if n in ("SIGHUP", "SIGUSR1") else pytest.param(n, marks=pytest.mark.slow) for n in NAMES],
)
def test_every_signal_saves_and_ends_with_its_number(name, tmp_path):
    number = getattr(signal, name)
    run = Run([*RUN, "--save_dir", tmp_path], tmp_path / "out")
    wait_until_saved(tmp_path, lambda: run.process.exitcode is None)
    for _ in range(3):  # a scheduler may repeat it, with another kind
        os.kill(run.process.pid, number)
    if number < signal.SIGTERM and number != signal.SIGINT:  # of two, Python sees the lower first
        os.kill(run.process.pid, signal.SIGTERM)
    status, text = run.wait()
    assert status == 128 + number, text[-2000:]
    last = [e for e in events(tmp_path / "test") if e.get("type") == "train_loss"]
    assert check_latest(tmp_path / "test") >= last[-1]["step"]
    assert f"saved; --resume goes on from it ({name})" in text


def _ignore_hangups():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def test_what_is_ignored_stays_ignored(tmp_path):
    """As under nohup."""
    run = Run([*RUN, "--save_dir", tmp_path], tmp_path / "out", _ignore_hangups)
    wait_until_saved(tmp_path, lambda: run.process.exitcode is None)
    os.kill(run.process.pid, signal.SIGHUP)
    saved = saved_step(tmp_path / "test")
    deadline = time.monotonic() + 600
    while saved_step(tmp_path / "test") <= saved + 4:
        assert run.process.exitcode is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(run.process.pid, signal.SIGUSR2)
    assert run.wait()[0] == 128 + signal.SIGUSR2


@pytest.mark.parametrize("ranks", [(1,), pytest.param((0, 1), marks=pytest.mark.slow)])
def test_all_ranks_end_with_the_signal_of_one(ranks, tmp_path):
    runs = start(2, RUN, tmp_path)
    wait_until_saved(tmp_path, lambda: all(r.process.exitcode is None for r in runs))
    for rank in ranks:
        os.kill(runs[rank].process.pid, signal.SIGUSR1)
    ended = [run.wait() for run in runs]
    assert [status for status, _ in ended] == [128 + signal.SIGUSR1] * 2, ended
    assert "(SIGUSR1)" in ended[0][1] and check_latest(tmp_path / "test")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
@pytest.mark.parametrize("launcher", ["mpiexec", "torchrun"])
def test_a_signal_to_the_launcher(launcher, name, tmp_path):
    """All end and nothing is left running; docs/reliability.md says with what status."""
    words = [BIN / launcher, "-n" if launcher == "mpiexec" else "--nproc_per_node", "2"]
    process = command([*RUN, "--save_dir", tmp_path], words, stdout=open(tmp_path / "out", "w"))
    wait_until_saved(tmp_path, lambda: process.poll() is None)
    group = os.getpgid(process.pid)
    os.kill(process.pid, getattr(signal, name))
    status = process.wait(600)
    deadline = time.monotonic() + 600
    found = ["pgrep", "-f", f"train.py.*--save_dir {tmp_path}"]
    while left := subprocess.run(found, capture_output=True, text=True).stdout.split():
        assert time.monotonic() < deadline, (left, group)
        time.sleep(0.2)
    print(f"{launcher} {name}: status {status}, saved step {check_latest(tmp_path / 'test')}")
    assert status != 0 and check_latest(tmp_path / "test")


def test_a_loader_worker_ends_with_its_process(tmp_path):
    """Killed outright, a process leaves no worker that keeps its sockets."""
    run = Run([*RUN, "--save_dir", tmp_path, "--num_workers", "1"], tmp_path / "out")
    wait_until_saved(tmp_path, lambda: run.process.exitcode is None)
    pid = run.process.pid
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        workers = file.read().split()
    assert workers
    run.kill()
    deadline = time.monotonic() + 4  # torch's own workers look for their process every 5 s
    while any(map(lives, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
