"""Runs of several processes: how they meet."""

import contextlib
import socket

import pytest
from runs import TINY, Run, free_port, launch, log_of

import processes


@contextlib.contextmanager
def taken_port():
    """A port on which another program listens."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        yield s.getsockname()[1]


@pytest.mark.parametrize("launcher", ["mpiexec", "torchrun", "slurm"])
def test_two_processes_train(launcher, tmp_path):
    """Under mpiexec on another port where its own is taken."""
    with contextlib.ExitStack() as stack:
        port = stack.enter_context(taken_port()) if launcher == "mpiexec" else free_port()
        for done in launch(launcher, 2, TINY, tmp_path, port):
            assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "saved_models" / "test"
    events = log_of(run)
    hparams = {e["key"]: e["value"] for e in events if e.get("type") == "hparam"}
    assert (hparams["mpi_size"], hparams["rank"]) == (2, 0)
    steps = 1397 // 2 // 32  # an epoch's full batches, each process its own half
    train_lines = [e for e in events if e.get("type") == "train_loss"]
    assert [e["step"] for e in train_lines] == [1, 8, 10, 16, 20][: len(train_lines)]
    [evaluation] = [e for e in events if e.get("type") == "eval_loss"]
    assert evaluation["n_images"] == 200 and evaluation["step"] == steps
    # Rank 0 alone writes: nothing is there twice.
    assert [e["message"] for e in events if "writing pictures" in e.get("message", "")] == [
        f"writing pictures to ./saved_models/test/samples-{i}.png" for i in (1, 8, 16, steps)
    ]


def _impatient():
    processes.PORT_S = 1


def test_slurm_names_a_port_that_is_taken(tmp_path):
    with taken_port() as port:
        [done] = launch("slurm", 1, TINY, tmp_path, port)
        assert done.returncode == 0  # one task needs no port
        rank_0 = {
            "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_ID": "0",
            "SLURM_STEP_NUM_TASKS": "2", "MASTER_ADDR": "127.0.0.1",
        }  # fmt: skip
        argv = [*TINY, "--port", str(port), "--save_dir", tmp_path]
        status, text = Run(argv, tmp_path / "out", _impatient, rank_0).wait()
    assert status == 2 and f"port {port} is taken" in text and "--port" in text
    assert text.count("\n") == 1
