"""Across the rooms: two hosts, network namespaces joined by a link that is cut while they train."""

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from runs import BIN, ENV, ROOT, SMALL, Run, check_latest, quick_watch, saved_step

TIMEOUT = 30
NAMES = [f"vdvae{os.getpid() % 100_000}{end}" for end in "ab"]
HOSTS = ["10.213.77.1", "10.213.77.2"]
BY_HAND = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": HOSTS[0], "MASTER_PORT": "29411",
           "GLOO_SOCKET_IFNAME": "wire"}  # fmt: skip
RUN = [*SMALL, "--n_batch", "50", "--iters_per_save", "4", "--timeout", str(TIMEOUT), "--resume"]


def ip(*words, check=True):
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    assert done.returncode == 0 or not check, done.stderr
    return done


def why_not():
    """Why no namespaces can be made here, or None."""
    try:
        done = ip("netns", "add", NAMES[0], check=False)
    except FileNotFoundError:
        return "there is no `ip` command (iproute2)"
    if done.returncode:
        return f"no network namespaces here: {done.stderr.strip()}"
    done = ip("-n", NAMES[0], "link", "add", "x", "type", "veth", "peer", "name", "y", check=False)
    ip("netns", "del", NAMES[0])
    return f"no veth pairs here: {done.stderr.strip()}" if done.returncode else None


@pytest.fixture
def link():
    """Two namespaces, NAMES, each with an end `wire` of one link, at the addresses HOSTS."""
    if reason := why_not():
        pytest.skip(reason)
    try:
        for name in NAMES:
            ip("netns", "add", name)
        ip("-n", NAMES[0], "link", "add", "wire", "type", "veth", "peer", "wire", "netns", NAMES[1])
        for name, host in zip(NAMES, HOSTS, strict=True):
            ip("-n", name, "addr", "add", f"{host}/24", "dev", "wire")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "wire", "up")
        yield
    finally:
        for name in NAMES:
            ip("netns", "del", name, check=False)


def start(folder, *options, restarts=0):
    """One process on each host, joined through torchrun's rendezvous on the first."""
    processes = []
    for rank, (name, host) in enumerate(zip(NAMES, HOSTS, strict=True)):
        torchrun = [
            *("ip", "netns", "exec", name, BIN / "torchrun", "--nnodes", "2", "--nproc_per_node"),
            *("1", "--rdzv_backend", "c10d", "--rdzv_id", "run", "--local_addr", host),
            *("--rdzv_endpoint", f"{HOSTS[0]}:29411", "--rdzv_conf", f"is_host={1 - rank}"),
            *("--max-restarts", str(restarts)),
        ]
        with open(folder / f"out{rank}", "a") as file:
            processes.append(
                subprocess.Popen(
                    [*torchrun, "train.py", *RUN, *options, "--save_dir", folder],
                    cwd=ROOT,
                    env=ENV | {"GLOO_SOCKET_IFNAME": "wire"},
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
    return processes


def training(name):
    """The processes of a namespace that are train.py, not torchrun."""
    found = []
    for pid in ip("netns", "pids", name).stdout.split():
        with contextlib.suppress(FileNotFoundError):  # it has just ended
            found += [pid] * (b"-u\0train.py" in Path(f"/proc/{pid}/cmdline").read_bytes())
    return found


def end(processes):
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


class OnHost:
    """The process moves to a namespace; its watch is a quick one."""

    def __init__(self, name):
        self.name = name

    def __call__(self):
        with open(f"/var/run/netns/{self.name}") as file:
            assert ctypes.CDLL(None).setns(file.fileno(), 0x40000000) == 0  # CLONE_NEWNET
        quick_watch()


class Forked:
    """One process on each host by variables set by hand, as quick to start as a test needs."""

    def __init__(self, folder, *options):
        self.runs = [
            Run(
                [*RUN, *options, "--save_dir", folder], folder / f"out{rank}",
                OnHost(name), BY_HAND | {"RANK": str(rank)},
            )
            for rank, name in enumerate(NAMES)
        ]  # fmt: skip

    def alive(self):
        return [run for run in self.runs if run.process.exitcode is None]

    def statuses(self):
        return [run.wait()[0] for run in self.runs]

    def end(self):
        for run in self.runs:
            run.kill()


class Launched:
    """The same by torchrun's rendezvous."""

    def __init__(self, folder, *options):
        self.processes = start(folder, *options)

    def alive(self):
        """The processes that train; torchrun itself, cut off, may stay until it is ended."""
        return [pid for name in NAMES for pid in training(name)]

    def statuses(self):
        return [process.wait(600) for process in self.processes]

    def end(self):
        end(self.processes)


@pytest.mark.parametrize("kind", [Forked, pytest.param(Launched, marks=pytest.mark.slow)])
def test_a_link_is_cut(kind, link, tmp_path):
    """Both ends stop with a message in bounded time; with the link mended, both go on."""
    job = kind(tmp_path, "--num_epochs", "100000")
    try:
        deadline = time.monotonic() + 600
        while not saved_step(tmp_path / "test"):
            assert time.monotonic() < deadline, (tmp_path / "out0").read_text()[-3000:]
            time.sleep(0.1)
        ip("-n", NAMES[1], "link", "set", "wire", "down")
        cut = time.monotonic()
        noticed = {}
        while len(noticed) < 2 and time.monotonic() < cut + 300:
            for rank in range(2):
                if f"rank {rank}: error: " in (tmp_path / f"out{rank}").read_text():
                    noticed.setdefault(rank, time.monotonic() - cut)
            time.sleep(0.1)
        assert len(noticed) == 2, [(tmp_path / f"out{r}").read_text()[-3000:] for r in range(2)]
        while job.alive():
            assert time.monotonic() < cut + 300
            time.sleep(0.1)
        print(f"noticed after {noticed[0]:.1f} and {noticed[1]:.1f} s")
    finally:
        job.end()
    texts = [(tmp_path / f"out{rank}").read_text() for rank in range(2)]
    assert re.search(
        rf"rank 0: error: (no step for {TIMEOUT} s|lost contact|no sign of life)", texts[0]
    )
    assert "rank 0: rank 1 is gone or hangs in step" in texts[0]
    assert "rank 1: rank 0, or the host it ran on," in texts[1]
    saved = check_latest(tmp_path / "test")

    ip("-n", NAMES[1], "link", "set", "wire", "up")
    epochs = str(saved // 13 + 1)
    job = kind(tmp_path, "--num_epochs", epochs)
    try:
        assert job.statuses() == [0, 0], (tmp_path / "out0").read_text()[-3000:]
    finally:
        job.end()
    assert "resuming from" in (tmp_path / "out0").read_text()
    assert check_latest(tmp_path / "test") == int(epochs) * 13


def wait_for(condition, processes, folder, seconds=600):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline and not any(p.poll() for p in processes), [
            (folder / f"out{rank}").read_text()[-3000:] for rank in range(2)
        ]
        time.sleep(0.1)


@pytest.mark.slow
def test_elastic_restarts_of_two_hosts(link, tmp_path):
    """A rank is killed on each host in turn: the agents need not count the same restarts."""
    folder = tmp_path / "test"
    processes = start(tmp_path, "--num_epochs", "100000", restarts=3)
    resumed = lambda: (tmp_path / "out0").read_text().count("resuming from")  # noqa: E731
    try:
        wait_for(lambda: saved_step(folder), processes, tmp_path)
        for times, name in enumerate(reversed(NAMES), start=1):
            [pid] = training(name)
            os.kill(int(pid), signal.SIGKILL)
            wait_for(lambda times=times: resumed() == times, processes, tmp_path)
            saved = saved_step(folder)
            wait_for(lambda saved=saved: saved_step(folder) > saved + 8, processes, tmp_path)
    finally:
        end(processes)
    assert resumed() == 2
