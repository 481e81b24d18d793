"""Who this process is, by the launchers' variables; its device; runs of several processes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import utils
from hps import UserError
from utils import World, find_world, resolve_device

REPO = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent

SRUN = {"SLURM_PROCID": "3", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}  # fmt: skip
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}


@pytest.mark.parametrize(
    "env, world",
    [
        ({}, World()),
        ({"RANK": "3"}, World()),  # not torchrun's: it sets all of them
        (TORCHRUN, World(5, 8, 1, 4, "torchrun")),
        (SRUN, World(3, 4, 1, 2, "slurm")),
        (SRUN | TORCHRUN, World(5, 8, 1, 4, "torchrun")),  # torchrun inside srun
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, World()),  # a batch script, no job step
    ],
)
def test_world(env, world):
    assert find_world(env) == world


@pytest.mark.parametrize(
    "env, words",
    [
        (TORCHRUN | {"RANK": "8"}, ["rank 8 of 8"]),
        (TORCHRUN | {"RANK": "-1"}, ["rank -1 of 8"]),
        (TORCHRUN | {"WORLD_SIZE": "many"}, ["WORLD_SIZE", "'many'"]),
        (SRUN | {"SLURM_PROCID": ""}, ["SLURM_PROCID", "''"]),
        ({"PMI_SIZE": "x"}, ["PMI_SIZE", "'x'"]),
        ({"OMPI_COMM_WORLD_SIZE": "5"}, ["started 5", "sees 1", "torchrun"]),
    ],
)
def test_launchers_variables_that_make_no_sense(env, words):
    with pytest.raises(UserError) as error:
        find_world(env)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == resolve_device(None) == resolve_device("cpu") == "cpu"
    with pytest.raises(UserError, match="--device cuda.*--device cpu"):
        resolve_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(utils, "world", lambda: World(5, 8, 1, 4, "torchrun"))
    assert resolve_device("auto") == resolve_device("cuda") == "cuda:1"
    assert resolve_device("cpu") == resolve_device(torch.device("cpu")) == "cpu"
    assert resolve_device("cuda:0") == resolve_device(torch.device("cuda:0")) == "cuda:0"
    monkeypatch.setattr(utils, "world", lambda: World(6, 8, 2, 4, "torchrun"))
    with pytest.raises(UserError, match="local rank 2.*this host has 2"):
        resolve_device("auto")


# ---- several processes -----------------------------------------------------------------------

TINY = "--hps digits --num_epochs 1 --width 8 --zdim 2 --num_mixtures 2 --iters_per_print 10 \
--enc_blocks 8x1,8d2,4d4,1x1 --dec_blocks 1x1,4m1,8m4 --num_variables_visualize 1".split()


def environment(**extra):
    """This one's, one thread a process, without variables of launchers or of `make test`."""
    launchers = ("OMPI_", "PMI", "SLURM_", "TORCHELASTIC_", "RANK", "WORLD_SIZE", "LOCAL_RANK")
    others = (*launchers, "MAKE", "MFLAGS")
    env = {k: v for k, v in os.environ.items() if not k.startswith(others)}
    return env | {"OMP_NUM_THREADS": "1"} | extra


def launch(launcher, n, args, cwd, port):
    """The finished n processes of train.py: a list of CompletedProcess, one for all or one each."""
    script = [str(REPO / "train.py"), *args]
    if launcher == "slurm":
        script = [sys.executable, *script, "--port", str(port)]
        step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": str(n), "SLURM_STEP_NODELIST": "",
                "SLURM_STEP_TASKS_PER_NODE": str(n), "MASTER_ADDR": "127.0.0.1"}  # fmt: skip
        tasks = [
            subprocess.Popen(
                script,
                cwd=cwd,
                env=environment(**step, SLURM_PROCID=str(i), SLURM_LOCALID=str(i)),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for i in range(n)
        ]
        outputs = [task.communicate(timeout=120) for task in tasks]
        return [
            subprocess.CompletedProcess(script, task.returncode, *output)
            for task, output in zip(tasks, outputs, strict=True)
        ]
    if launcher == "mpiexec":
        command = [BIN / "mpiexec", "-n", str(n), sys.executable, *script, "--port", str(port)]
    else:
        command = [BIN / "torchrun", f"--nproc_per_node={n}", f"--master_port={port}", *script]
    done = subprocess.run(
        command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=120
    )
    return [done]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def log_of(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


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


def test_ranks_draw_different_noise(tmp_path):
    """And other noise at every step: the seeds of all steps on both ranks differ."""
    driver = tmp_path / "driver.py"
    driver.write_text(
        f"import sys\nsys.path.insert(0, {str(REPO)!r})\n"
        "import torch, train\n"
        "step = train.training_step\n"
        "def noted_step(*args):\n"
        "    with open(f'seeds-{train.mpi_rank()}', 'a') as file:\n"
        "        print(torch.initial_seed(), file=file)\n"
        "    return step(*args)\n"
        "train.training_step = noted_step\n"
        "train.run_command(train.main)\n"
    )
    command = [BIN / "mpiexec", "-n", "2", sys.executable, driver, *TINY]
    done = subprocess.run(
        [*command, "--port", str(free_port())],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seeds = [(tmp_path / f"seeds-{rank}").read_text().split() for rank in range(2)]
    assert len(seeds[0]) == len(seeds[1]) == 1397 // 2 // 32
    assert len({*seeds[0], *seeds[1]}) == 2 * len(seeds[0])


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
        command = [sys.executable, REPO / "train.py", *TINY, "--port", str(port)]
        done = subprocess.run(command, cwd=tmp_path, env=rank_0, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"port {port} is taken" in done.stderr and "--port" in done.stderr
    assert done.stderr.count("\n") == 1


def test_evaluation_agrees_for_any_batch_and_number_of_processes(tmp_path):
    [done] = launch("slurm", 1, TINY, tmp_path, 1)
    assert done.returncode == 0, done.stderr
    ema = str(tmp_path / "saved_models" / "test" / "latest-model-ema.th")
    figures = []
    for n, n_batch in [(1, 1), (1, 3), (1, 16), (2, 3), (3, 16)]:
        args = [*TINY, "--restore_ema_path", ema, "--test_eval", "--n_batch", str(n_batch)]
        [done] = launch("mpiexec" if n > 1 else "slurm", n, args, tmp_path, free_port())
        assert done.returncode == 0, done.stderr
        figures.append(log_of(tmp_path / "saved_models" / "test")[-1])
    for f in figures:
        assert f["type"] == "test_loss" and f["n_images"] == 200
        for name in ("elbo", "distortion", "rate", "bits_per_dim"):
            assert f[name] == pytest.approx(figures[0][name], rel=1e-5)
