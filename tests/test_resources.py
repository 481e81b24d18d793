"""What the machine runs short of, in one line; a closed output; a wait without a limit."""

import ctypes
import datetime
import errno
import functools
import http.server
import itertools
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
import torch.distributed as dist
from runs import ENV, ROOT, SMALL, Run, check_latest, hashes, start

import resources
import turns
from errors import UserError
from launchers import SLURM, World

RUN = [*SMALL, "--num_epochs", "1", "--iters_per_save", "4"]


def check_one_line(status, text, what, remedy):
    """Status 2, and one line at the end that says both."""
    *others, last = text.splitlines()
    assert status == 2 and "Traceback" not in text, text
    assert last.startswith("error: ") and what in last and remedy in last, last
    assert not [line for line in others if "rror" in line and "type: " not in line], text


# ---- what exceptions say ---------------------------------------------------------------------


def _allocate():
    torch.empty(2**55)


def _allocate_numpy():
    np.empty(2**60, np.uint8)


@pytest.mark.parametrize(
    "error, what, remedy",
    [
        (_allocate, "memory is short", "--n_batch"),
        (_allocate_numpy, "memory is short", "--checkpoint_activations"),
        (MemoryError(), "memory is short", "--n_batch"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "memory", "--grad_accum"),
        (OSError(errno.ENOMEM, "x"), "memory is short", "--num_workers"),
        (OSError(errno.EMFILE, "x"), "limit on open files", "ulimit -n"),
        (RuntimeError("received 0 items of ancdata"), "limit on open files", "ulimit -n"),
        (RuntimeError("Too many open files. Communication"), "open files", "ulimit -n"),
        (BlockingIOError(errno.EAGAIN, "x"), "no further process", "ulimit -u"),
        (RuntimeError("can't start new thread"), "no further process", "ulimit -u"),
        (
            RuntimeError(
                "Caught RuntimeError in DataLoader worker process 0.\nTraceback\nRuntimeError: "
                "unable to allocate shared memory(shm) for file </torch_1_2_0>: No space left on"
                " device (28)"
            ),
            "(RuntimeError: unable to allocate shared memory(shm)", "--shm-size",
        ),
        (
            RuntimeError("DataLoader worker (pid 1) is killed by signal: Bus error. It is possible"
            " that dataloader's workers are out of shared memory."), "shared memory", "/dev/shm",
        ),
        (RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed. "), "killed", "--re"),
        (
            RuntimeError("DataLoader worker (pid(s) 1) exited unexpectedly"),
            "has ended before its time", "--num_workers 0",
        ),
    ],
)  # fmt: skip
def test_a_shortage_is_named(error, what, remedy):
    with pytest.raises(UserError) as caught, resources.naming_shortages():
        if callable(error):
            error()
        raise error
    line = str(caught.value)
    assert what in line and remedy in line and "\n" not in line


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        RuntimeError("Caught KeyError in DataLoader worker process 0.\nTraceback\nKeyError: 3"),
        OSError(errno.EIO, "Input/output error"),
        OSError(errno.ENOSPC, "No space left on device"),
        KeyError("memory"),
    ],
)
def test_what_is_no_shortage_stays_what_it_is(error):
    with pytest.raises(type(error)) as caught, resources.naming_shortages():
        raise error
    assert caught.value is error


# ---- whole runs ------------------------------------------------------------------------------


def _files(room):
    """No more than so many files beside those that are open."""
    last = max(int(name) for name in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (last + room,) * 2)


def _no_fork():
    def fork():
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    os.fork = fork


def _small_shm():
    """A /dev/shm of 64 kB, as of containers that ask for none, for this process alone."""
    assert ctypes.CDLL(None).unshare(0x20000) == 0  # CLONE_NEWNS
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", "/dev/shm"], check=True)


def _no_shm():
    """One that can't be written, or is not there at all."""
    _small_shm()
    subprocess.run(["mount", "-o", "remount,ro", "/dev/shm"], check=True)


def _kill_a_worker(number):
    """In the third step."""
    import train

    original, calls = train.training_step, itertools.count(1)

    def wrapped(*args):
        if next(calls) == 3:
            os.kill(multiprocessing.active_children()[0].pid, number)
        return original(*args)

    train.training_step = wrapped


_unshare = shutil.which("unshare") and shutil.which("mount")
_mountable = _unshare and not subprocess.run(["unshare", "-m", "true"], stderr=-3).returncode


@pytest.mark.parametrize(
    "fault, what, remedy",
    [
        (functools.partial(_files, 4), "limit on open files", "ulimit -n"),
        pytest.param(
            functools.partial(_files, 14), "limit on open files", "ulimit -n",
            marks=pytest.mark.slow,
        ),
        (_no_fork, "no further process", "ulimit -u"),
        pytest.param(
            _small_shm, "shared memory", "--shm-size",
            marks=pytest.mark.skipif(not _mountable, reason="no right to mount here"),
        ),
        pytest.param(
            _no_shm, "shared memory", "--shm-size",
            marks=pytest.mark.skipif(not _mountable, reason="no right to mount here"),
        ),
        (functools.partial(_kill_a_worker, signal.SIGKILL), "killed", "--num_workers"),
        pytest.param(
            functools.partial(_kill_a_worker, signal.SIGBUS), "shared memory", "--shm-size",
            marks=pytest.mark.slow,
        ),
    ],
    ids="files-4 files-14 fork shm no-shm killed bus".split(),
)  # fmt: skip
def test_a_run_that_loads_in_processes(fault, what, remedy, tmp_path):
    """It can go on where it was, with the remedy."""
    run = Run([*RUN, "--save_dir", tmp_path, "--num_workers", "2"], tmp_path / "out", fault)
    check_one_line(*run.wait(), what, remedy)
    assert not [*tmp_path.rglob("*.partial")]


class _KillPacking:
    """The process that fits the n-th image is killed; forks fail where n is None."""

    def __init__(self, n):
        self.n = n

    def __call__(self):
        import packing

        packing.cores = lambda: 2
        original, calls = packing.fit, itertools.count(1)

        def fit(image, size):
            if next(calls) == self.n:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(image, size)

        packing.fit = fit
        if self.n is None:
            _no_fork()


@pytest.mark.parametrize(
    "n, what",
    [(9, "killed"), pytest.param(None, "no further process", marks=pytest.mark.slow)],
)
def test_packing(n, what, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for i, image in enumerate(np.random.RandomState(0).randint(0, 256, (101, 8, 8, 3), np.uint8)):
        imageio.imwrite(photos / f"{i}.png", image)
    options = [*RUN, "--dataset", "images", "--image_size", "8", "--data_root", photos]
    options += ["--save_dir", tmp_path, "--dry_run"]
    check_one_line(*Run(options, tmp_path / "out", _KillPacking(n)).wait(), what, "taskset")
    assert {p.name for p in (photos / ".vdvae").iterdir()} <= {"8.lock"}
    assert Run(options, tmp_path / "out", _KillPacking(10**9)).wait()[0] == 0


def test_compile_without_a_compiler(tmp_path):
    environ = {"PATH": "/nonexistent", "CXX": "", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "c")}
    options = [*RUN, "--save_dir", tmp_path / "runs", "--compile"]
    status, text = Run(options, tmp_path / "out", environ=environ).wait()
    check_one_line(status, text, "--compile: ", "install a C++ compiler")
    assert "ompiler found" in text.splitlines()[-1] and not (tmp_path / "runs").exists()


# ---- outputs that are closed -----------------------------------------------------------------


def _close(*numbers):
    """As Python starts after `>&-`."""
    for number in numbers:
        os.close(number)
        setattr(sys, ("stdin", "stdout", "stderr")[number], None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert Run([*RUN, "--save_dir", folder], folder / "out").wait()[0] == 0
    return folder / "test"


@pytest.mark.parametrize(
    "numbers",
    [pytest.param((1,), marks=pytest.mark.slow), pytest.param((2,), marks=pytest.mark.slow),
     (0, 1, 2)],
)  # fmt: skip
def test_closed_outputs(numbers, whole, tmp_path):
    run = Run(
        [*RUN, "--save_dir", tmp_path, "--num_workers", "1"],
        tmp_path / "out", functools.partial(_close, *numbers), errors=str(tmp_path / "errors"),
    )  # fmt: skip
    status, text = run.wait()
    errors = (tmp_path / "errors").read_text()
    assert status == 0 and "Traceback" not in errors
    assert check_latest(tmp_path / "test") == 13 and hashes(tmp_path / "test") == hashes(whole)
    assert bool(text) == (1 not in numbers)


@pytest.mark.slow
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_outputs_closed_by_a_shell(closed, whole, tmp_path):
    script = f'exec "$0" train.py "$@" {closed}'
    words = ["sh", "-c", script, sys.executable, *RUN, "--save_dir", tmp_path]
    done = subprocess.run(words, cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert hashes(tmp_path / "test") == hashes(whole)
    done = subprocess.run([*words, "--lr", "x"], cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert done.returncode == 2


# ---- the wait for another's download ---------------------------------------------------------

LIMIT_S = 2  # a sign of life may be late on a busy machine


@pytest.fixture
def ranks(monkeypatch):
    """A function that runs function(local_rank) as each of 2 ranks: [what it gave or raised]."""
    table, rank = dist.HashStore(), threading.local()
    table.set_timeout(datetime.timedelta(seconds=LIMIT_S))
    monkeypatch.setattr(turns, "store", lambda: table)
    monkeypatch.setattr(turns, "world", lambda: World(rank.rank, 2, rank.rank, 2, SLURM))
    monkeypatch.setattr(turns, "SIGN_S", 0.02)
    monkeypatch.setattr(turns, "_numbers", itertools.repeat(0))

    def run(function):
        results = [None, None]

        def act(i):
            rank.rank = i
            # The thread of the signs of life asks as this rank.
            monkeypatch.setattr(
                turns, "world", lambda: World(getattr(rank, "rank", 0), 2, 0, 2, SLURM)
            )
            try:
                results[i] = function(i)
            except BaseException as error:
                results[i] = error

        threads = [threading.Thread(target=act, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(300)
        return results

    return run


def test_the_wait_has_no_limit(ranks):
    order = []

    def turn(local_rank):
        it = turns.Turns(local_rank)
        if local_rank:
            it.wait()
        else:
            with it.taken():
                time.sleep(1.5 * LIMIT_S)  # it is the time itself that must not matter
                order.append(local_rank)
            return "done"
        order.append(local_rank)
        return "done"

    assert ranks(turn) == ["done", "done"] and order == [0, 1]


def test_a_failure_of_the_first_is_that_of_all(ranks):
    def turn(local_rank):
        it = turns.Turns(local_rank)
        if local_rank:
            return it.wait()
        with it.taken():
            raise UserError("http://x can't be fetched")

    first, second = ranks(turn)
    assert isinstance(second, UserError) and str(second) == str(first)


def test_a_first_one_that_is_gone_is_not_waited_for(ranks):
    def turn(local_rank):
        it = turns.Turns(local_rank)
        return it.wait() if local_rank else None  # dead before it has said so

    _, second = ranks(turn)
    assert isinstance(second, UserError) and "no sign of life from rank 0" in str(second)


class _Weights(http.server.BaseHTTPRequestHandler):
    """Serves a file after a while; 404 where there is none."""

    content, after_s, requests = None, 0, 0

    def do_GET(self):
        type(self).requests += 1
        if self.content is None:
            return self.send_error(404)
        time.sleep(self.after_s)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.content)

    def log_message(self, *_):
        pass


def served(**attributes):
    """(handler, address) of a server of weights."""
    handler = type("Handler", (_Weights,), attributes)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return handler, f"http://127.0.0.1:{server.server_port}/weights.th"


class _In:
    """In a folder, where downloads go."""

    def __init__(self, folder):
        self.folder = folder

    def __call__(self):
        os.chdir(self.folder)


def test_a_download_that_fails_ends_all_in_one_line(tmp_path):
    handler, address = served()
    runs = start(2, [*RUN, "--restore_path", address, "--timeout", "20"], tmp_path, _In(tmp_path))
    texts = []
    for run in runs:
        status, text = run.wait()
        assert status == 2 and "Traceback" not in text, text
        texts.append(text)
    lines = [line for line in "\n".join(texts).splitlines() if "error: " in line]
    assert lines and all("can't be fetched" in line for line in lines), lines
    assert handler.requests == 1 and not [*tmp_path.glob("weights*")]


@pytest.mark.slow
def test_a_download_longer_than_the_timeout(whole, tmp_path):
    content = (whole / "latest-model.th").read_bytes()
    handler, address = served(content=content, after_s=20)
    argv = [*RUN, "--restore_path", address, "--timeout", "4"]
    for run in start(2, argv, tmp_path, _In(tmp_path)):
        status, text = run.wait()
        assert status == 0, text
    assert handler.requests == 1 and check_latest(tmp_path / "test") is not None
