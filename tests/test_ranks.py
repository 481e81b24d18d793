"""Several processes of which one fails: the others end soon and say which; then all go on."""

import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faulty_train import Fault
from runs import BIN, ENV, ROOT, SMALL, Run, check_latest, events, hashes

TIMEOUT = 6
RUN = [*SMALL, "--n_batch", "40", "--num_epochs", "1", "--iters_per_print", "1",
       "--iters_per_save", "4", "--timeout", str(TIMEOUT), "--resume"]  # fmt: skip


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(size, folder, fault=None, **environ):
    """`size` processes as srun starts them, each with a file of what it prints."""
    port = free_port()
    return [
        Run(
            [*RUN, "--save_dir", folder, "--port", port],
            folder / f"out{rank}",
            fault,
            environ
            | {
                "SLURM_PROCID": str(rank),
                "SLURM_LOCALID": str(rank),
                "SLURM_STEP_ID": "0",
                "SLURM_STEP_NUM_TASKS": str(size),
                "SLURM_STEP_TASKS_PER_NODE": str(size),
                "MASTER_ADDR": "127.0.0.1",
            },
        )
        for rank in range(size)
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run of two processes without a fault."""
    folder = tmp_path_factory.mktemp("whole")
    for run in start(2, folder):
        assert run.wait()[0] == 0
    return folder / "test"


MESSAGES = {
    "kill": r"rank 1 is gone or hangs in step 5",
    "stop": r"rank 1 is gone or hangs in step 5",
    "hang": r"rank 1 stood in strike \(faulty_train.py:\d+\) in step 5",
    "raise": r"rank 1 raised ValueError: a fault of this rank alone in step 5",
}
NOTICED_S = {"kill": 10, "raise": 10, "stop": TIMEOUT + 10, "hang": TIMEOUT + 10}


@pytest.mark.parametrize(
    "size, kind",
    [(2, "kill"), (3, "stop"), (3, "hang"), (3, "raise"),
     pytest.param(3, "kill", marks=pytest.mark.slow),
     pytest.param(2, "stop", marks=pytest.mark.slow),
     pytest.param(2, "hang", marks=pytest.mark.slow)],
)  # fmt: skip
def test_one_rank_fails(size, kind, whole, tmp_path):
    """The others end in a time that depends on --timeout alone, and name it; --resume goes on.

    With two processes it goes on to the same bits. With three, the sum of three gradients may be
    rounded otherwise: after its first step, DistributedDataParallel lays them out anew.
    """
    runs = start(size, tmp_path, Fault(kind, 1, 6))
    try:
        failed = time.monotonic()
        while not (check_latest(tmp_path / "test") or runs[0].process.exitcode):
            failed = time.monotonic()
            time.sleep(0.05)
        for rank, run in enumerate(runs):
            if kind == "stop" and rank == 1:
                continue
            status, text = run.wait(60)
            assert status == (-signal.SIGKILL if (kind, rank) == ("kill", 1) else 1)
            if rank != 1:
                assert re.search(MESSAGES[kind], text), text[-1500:]
                assert f"rank {rank}: error:" in text and "Traceback" not in text
                assert "rank 2 is gone" not in text and "rank 0 is gone" not in text
            elif kind == "raise":
                assert "rank 1: ValueError: a fault of this rank alone" in text
        took = time.monotonic() - failed
    finally:
        runs[1].kill()
    print(f"{kind}, {size} processes: noticed and ended after {took:.1f} s")
    assert took < NOTICED_S[kind] + 30  # 30: for a machine that does other things too
    assert check_latest(tmp_path / "test") == 4
    for run in start(size, tmp_path):
        assert run.wait()[0] == 0
    if size == 2:
        assert hashes(tmp_path / "test") == hashes(whole)


def test_rank_0_fails(tmp_path):
    """With it goes the table where the others look."""
    runs = start(2, tmp_path, Fault("kill", 0, 6))
    assert runs[0].wait()[0] == -signal.SIGKILL
    status, text = runs[1].wait(60)
    assert status == 1 and "rank 1: rank 0, or the host it ran on, is gone" in text
    for run in start(2, tmp_path):
        assert run.wait()[0] == 0


def test_a_signal_to_one_rank_stops_all_at_the_same_step(whole, tmp_path):
    for run in start(2, tmp_path, Fault("sigterm", 1, 6)):
        status, text = run.wait()
        assert status == 143, text[-1500:]
    assert check_latest(tmp_path / "test") == 6
    for run in start(2, tmp_path):
        assert run.wait()[0] == 0
    assert hashes(tmp_path / "test") == hashes(whole)


@pytest.mark.parametrize(
    "size, kind",
    [(2, "nan_input"), (2, "inf_input"), (3, "inf_target"), (2, "inf_gradient"),
     (3, "nan_gradient")],
)  # fmt: skip
def test_what_is_not_finite_on_one_rank_reaches_no_weight_on_any(size, kind, tmp_path):
    """One decision for all: after each step, weights, EMA and optimizer are equal and finite."""
    (tmp_path / "hashes").mkdir()
    runs = start(size, tmp_path, Fault(kind, size - 1, 6), HASHES=str(tmp_path / "hashes"))
    for run in runs:
        status, text = run.wait()
        assert status == 0, text[-1500:]
    ranks = [(tmp_path / "hashes" / str(rank)).read_text().split() for rank in range(size)]
    assert len(ranks[0]) == 1397 // size // 40 and all(r == ranks[0] for r in ranks)
    same = [a == b for a, b in zip(ranks[0], ranks[0][1:], strict=False)]
    assert same.index(True) == 4 and same.count(True) == 1  # the sixth step changed nothing
    lines = [e for e in events(tmp_path / "test") if e.get("type") == "train_loss"]
    assert [e["step"] for e in lines if e["skipped_updates"]][0] == 6
    assert sum(e["skipped_updates"] for e in lines) == 1


@pytest.mark.parametrize(
    "launcher, size, kind",
    [("mpiexec", 3, "kill"), pytest.param("torchrun", 2, "raise", marks=pytest.mark.slow),
     pytest.param("mpiexec", 2, "stop", marks=pytest.mark.slow),
     pytest.param("torchrun", 3, "kill", marks=pytest.mark.slow),
     pytest.param("mpiexec", 2, "raise", marks=pytest.mark.slow)],
)  # fmt: skip
def test_one_rank_fails_under_a_launcher(launcher, size, kind, tmp_path):
    """The launcher ends, the message names the rank, and the same command resumes."""
    name = "-n" if launcher == "mpiexec" else "--nproc_per_node"
    port = [] if launcher == "mpiexec" else ["--master_port", str(free_port())]
    begin = [BIN / launcher, name, str(size), *port]
    begin += [sys.executable] if launcher == "mpiexec" else []
    script = [ROOT / "tests" / "faulty_train.py", kind, "1", "6", *RUN, "--save_dir", tmp_path]
    done = subprocess.run(
        [*begin, *script], cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=120
    )
    text = done.stdout[-3000:] + done.stderr
    assert done.returncode != 0
    if (launcher, kind) == ("mpiexec", "kill"):
        # MPICH kills all at once. It names the process, and the log the rank of each process.
        [process] = re.findall(r"PID (\d+) RUNNING AT .*\n.*EXIT CODE: 9", text)
        # (Of those it finds dead at the same time, it names one.)
        assert f"is process {process} on" in done.stdout
    elif kind == "raise":
        assert "rank 1: ValueError: a fault of this rank alone" in text, text
    else:
        assert MESSAGES["stop"] in text, text
    script[1:4] = ["none", "1", "1"]
    done = subprocess.run(
        [*begin, *script], cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and "resuming from" in done.stdout, done.stderr[-2000:]
    assert Path(tmp_path / "test" / "latest-state.json").exists()
