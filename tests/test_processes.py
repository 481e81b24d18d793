"""Runs of several processes: how they meet."""

import socket
import subprocess
import sys

import pytest
from runs import ROOT, TINY, environment, free_port, launch, log_of


@pytest.mark.parametrize("launcher", ["mpiexec", "torchrun", "slurm"])
def test_two_processes_train(launcher, tmp_path):
    for done in launch(launcher, 2, TINY, tmp_path, free_port()):
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


def test_mpiexec_finds_another_port_where_its_own_is_taken(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        [done] = launch("mpiexec", 2, TINY, tmp_path, s.getsockname()[1])
    assert done.returncode == 0, done.stderr
    assert log_of(tmp_path / "saved_models" / "test")


def test_slurm_names_a_port_that_is_taken(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        port = s.getsockname()[1]
        [done] = launch("slurm", 1, TINY, tmp_path, port)
        assert done.returncode == 0  # one task needs no port
        rank_0 = environment(
            SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_STEP_ID="0", SLURM_STEP_NUM_TASKS="2",
            MASTER_ADDR="127.0.0.1",
        )  # fmt: skip
        command = [sys.executable, ROOT / "train.py", *TINY, "--port", str(port)]
        done = subprocess.run(command, cwd=tmp_path, env=rank_0, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"port {port} is taken" in done.stderr and "--port" in done.stderr
    assert done.stderr.count("\n") == 1
