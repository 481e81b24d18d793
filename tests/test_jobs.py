"""Jobs that start: what each launcher tells, two jobs side by side, processes that do not meet."""

import ctypes
import datetime
import os
import socket
import subprocess
import time

import pytest
import torch
from faulty_train import Fault
from runs import (
    BIN,
    ENV,
    ROOT,
    SMALL,
    Run,
    check_latest,
    command,
    events,
    free_port,
    hashes,
    saved_step,
    start,
)
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import endings
import launchers
import processes
from errors import UserError
from launchers import (
    HANDS,
    MPIEXEC,
    SLURM,
    World,
    find_world,
    first_host,
    port_of_job,
    resolve_device,
)

STEP = {"SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "localhost"}
LONG = [*SMALL, *"--n_batch 50 --num_epochs 100000 --iters_per_save 4 --timeout 20".split()]
SHORT = [*SMALL, "--n_batch", "50", "--num_epochs", "1", "--timeout", "20"]


def slurm(rank, size, job=None):
    env = STEP | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
    env |= {"SLURM_STEP_NUM_TASKS": str(size), "SLURM_STEP_TASKS_PER_NODE": str(size)}
    return env | ({"SLURM_JOB_ID": job} if job else {})


def hands(rank, size, port):
    env = {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    return env | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def job(argv, folder, environments, wrap=None):
    folder.mkdir()
    return [
        Run([*argv, "--save_dir", folder], folder / f"out{rank}", wrap, env)
        for rank, env in enumerate(environments)
    ]


def wait_until_saved(folder, runs):
    deadline = time.monotonic() + 6000
    while not saved_step(folder / "test"):
        assert time.monotonic() < deadline and all(r.process.exitcode is None for r in runs), (
            folder / "out0"
        ).read_text()[-2000:]
        time.sleep(0.05)


# ---- what launchers tell ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "env, world",
    [
        (slurm(3, 4), World(3, 4, 3, 4, SLURM)),
        (slurm(1, 2, "77"), World(1, 2, 1, 2, SLURM, "slurm 77.0.0")),
        (slurm(1, 2, "7") | {"SLURM_RESTART_COUNT": "2"},
         World(1, 2, 1, 2, SLURM, "slurm 7.0.2")),
        # srun that speaks PMI itself
        (slurm(1, 2) | {"PMI_RANK": "1", "PMI_SIZE": "2"}, World(1, 2, 1, 2, SLURM)),
        (slurm(1, 2) | {"PMIX_RANK": "1"}, World(1, 2, 1, 2, SLURM)),
        # set by hand, one process a host
        ({"RANK": "1", "WORLD_SIZE": "2"}, World(1, 2, 0, 1, HANDS)),
        ({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
         World(1, 4, 1, 2, HANDS)),
        ({"WORLD_SIZE": "1"}, World()),
        ({"SLURM_PROCID": "0", "SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}, World()),  # a script
        ({"SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}, World()),  # salloc's shell
    ],
)  # fmt: skip
def test_world(env, world):
    assert find_world(env) == world


@pytest.mark.parametrize(
    "variables",
    [
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
        ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),
        ("JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE"),
        ("PMI_RANK", "PMI_SIZE"),
        ("PMIX_RANK",),
    ],
)
def test_world_of_mpi_is_that_of_its_library(variables, monkeypatch):
    """Which, in this test, knows three processes: where there is one, the library is another's."""
    asked = []
    monkeypatch.setattr(
        launchers, "_mpi_world", lambda size: asked.append(size) or World(2, 3, 0, 1, MPIEXEC)
    )
    env = dict(zip(variables, ("2", "3"), strict=False))
    # within a job of SLURM, whose variables are then those of mpiexec's proxy
    for more in ({}, slurm(0, 1)):
        assert find_world(env | more).launcher is (SLURM if more and len(env) == 1 else MPIEXEC)
    assert asked[0] == (3 if len(variables) == 2 else None)


@pytest.mark.parametrize(
    "env, words",
    [
        ({"RANK": "1"}, ["RANK", "'1'", "without WORLD_SIZE"]),
        ({"WORLD_SIZE": "2"}, ["WORLD_SIZE", "'2'", "without RANK"]),
        ({"OMPI_COMM_WORLD_RANK": "1"}, ["without OMPI_COMM_WORLD_SIZE"]),
        ({"MV2_COMM_WORLD_RANK": "1"}, ["without MV2_COMM_WORLD_SIZE"]),
        ({"PMI_RANK": "0"}, ["without PMI_SIZE"]),
        ({"SLURM_PROCID": "1"}, ["SLURM_PROCID", "without SLURM_NTASKS"]),
        ({"PMIX_RANK": "1"}, ["PMIX_RANK", "sees 1"]),
        ({"LOCAL_RANK": "1"}, ["LOCAL_RANK", "without WORLD_SIZE"]),
        ({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, ["LOCAL_RANK", "without WORLD_SIZE"]),
        ({"FLUX_TASK_RANK": "0", "FLUX_JOB_SIZE": "4"}, ["FLUX_TASK_RANK", "not known here"]),
        ({"PALS_RANKID": "1"}, ["PALS_RANKID", "without PMI_SIZE"]),
        ({"SLURM_PROCID": "0", "SLURM_STEP_ID": "0"}, ["SLURM_NTASKS is not set"]),
        (slurm(0, 2) | {"SLURM_LOCALID": ""}, ["SLURM_LOCALID", "''"]),
        ({"MV2_COMM_WORLD_RANK": "1", "MV2_COMM_WORLD_SIZE": "5"}, ["started 5", "sees 1"]),
    ],
)
def test_what_is_known_by_half_is_refused(env, words):
    with pytest.raises(UserError) as error:
        find_world(env)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "visible, local_rank, per_task, device",
    [(1, 3, None, "cuda:0"), (1, 0, None, "cuda:0"), (4, 3, None, "cuda:3"),
     (8, 2, None, "cuda:2"), (2, 2, None, None), (2, 2, "1", None),
     (2, 3, "2", "cuda:0"), (2, 1, "a100:2", "cuda:0"), (4, 3, "1", "cuda:3")],
)  # fmt: skip
def test_devices(visible, local_rank, per_task, device, monkeypatch):
    """per_task GPUs are a task's own, unless the job was asked to show all of them to each."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    env = slurm(local_rank, 8) | ({"SLURM_GPUS_PER_TASK": per_task} if per_task else {})
    monkeypatch.setattr(launchers, "world", lambda: find_world(env))
    if device:
        assert resolve_device("auto") == device
    else:
        with pytest.raises(UserError, match="local rank 2 has no GPU of its own: this host has 2"):
            resolve_device("auto")


def test_two_ranks_on_one_gpu_are_named(monkeypatch):
    table = torch.distributed.HashStore()
    monkeypatch.setattr(processes, "_identity_of", lambda device: f"GPU-{device}")
    ranks = {"cuda:0": 0, "cuda:1": 1}
    for device, rank in ranks.items():
        monkeypatch.setattr(processes, "world", lambda rank=rank: World(rank, 3, rank, 3, SLURM))
        table.set(f"device/{rank}", f"GPU-{device}")
    monkeypatch.setattr(processes, "world", lambda: World(2, 3, 2, 3, SLURM))
    with pytest.raises(UserError, match="ranks 0 and 2 have the same GPU"):
        processes._await_all(table, "cuda:0", 1)
    processes._await_all(table, "cuda:2", 1)


@pytest.mark.parametrize(
    "nodes, first",
    [
        ("localhost", "localhost"), ("a,b", "a"), ("gpu-a[1,3]-ib", "gpu-a1-ib"),
        ("node[001-004,7],login", "node001"), ("rack[1-2]n[01-03]-x,y", "rack1n01-x"),
        ("n[0-10:2]", "n0"), ("n[010-100:5]b[7]c", "n010b7c"), ("login[2],n[3-4]", "login2"),
        ("cn-0001", "cn-0001"), ("a-[07,09]", "a-07"),
    ],
)  # fmt: skip
def test_the_first_host(nodes, first, monkeypatch, tmp_path):
    assert first_host({"SLURM_STEP_NODELIST": nodes, "SLURM_JOB_NODELIST": "other"}) == first
    assert first_host({"SLURM_JOB_NODELIST": nodes}) == first
    assert first_host({"MASTER_ADDR": "m", "SLURM_JOB_NODELIST": nodes}) == "m"
    scontrol = tmp_path / "scontrol"  # knows more than we do
    scontrol.write_text('#!/bin/sh\necho "$3-of-scontrol"\necho second\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    expected = f"{nodes}-of-scontrol" if "[" in nodes else first
    assert first_host({"SLURM_STEP_NODELIST": nodes}) == expected
    for broken in ("#!/bin/sh\nexit 1\n", "no program"):
        scontrol.write_text(broken)
        assert first_host({"SLURM_STEP_NODELIST": nodes}) == first


def test_ports_follow_from_jobs():
    ports = {port_of_job(f"slurm {i}.0.0", 29500) for i in range(100)}
    assert len(ports) > 95 and all(10000 <= port < 30000 for port in ports)
    assert port_of_job(None, 29500) == 29500


# ---- jobs side by side -----------------------------------------------------------------------


def test_two_jobs_of_slurm_never_meet(tmp_path):
    """Neither has a --port: both go on, and each stops by itself."""
    jobs = {}
    for name in ("41", "42"):
        jobs[name] = job(LONG, tmp_path / name, [slurm(r, 2, name) for r in range(2)])
        wait_until_saved(tmp_path / name, jobs[name])
    for name, runs in jobs.items():
        assert all(run.process.exitcode is None for run in runs)
        runs[1].process.terminate()
        assert [run.wait()[0] for run in runs] == [143, 143], (tmp_path / name / "out0").read_text()


def _impatient():
    """It asks for a port that is taken no longer than a test needs."""
    processes.PORT_S = 1


@pytest.mark.parametrize("kind", ["slurm without a job's number", "hands", "slurm"])
def test_a_second_job_on_the_port_of_the_first_ends_alone(kind, tmp_path, monkeypatch):
    port = free_port()
    argv = ["--port", str(port)] if "slurm" in kind else []

    def environments(name):
        if kind == "hands":
            return [hands(r, 2, port) for r in range(2)]
        return [slurm(r, 2, name if kind == "slurm" else None) for r in range(2)]

    first = job([*LONG, *argv], tmp_path / "first", environments("1"))
    wait_until_saved(tmp_path / "first", first)
    second = job([*SHORT, *argv], tmp_path / "second", environments("2"), _impatient)
    for rank, run in enumerate(second):
        status, text = run.wait()
        [line] = [line for line in text.splitlines() if "error" in line]
        assert status == 2 and str(port) in line and "--port" in line, text
        assert ("is taken" if rank == 0 else "is that of another job") in line
    assert not (tmp_path / "second" / "test").exists()
    saved = saved_step(tmp_path / "first" / "test")
    deadline = time.monotonic() + 600
    while saved_step(tmp_path / "first" / "test") == saved:  # it goes on
        assert time.monotonic() < deadline
        time.sleep(0.05)
    first[0].process.terminate()
    assert [run.wait()[0] for run in first] == [143, 143]


def _tells_with_whom_it_ends():
    import train

    original = train.set_up_data

    def wrapped(H):
        number = ctypes.c_int()
        ctypes.CDLL(None).prctl(2, ctypes.byref(number), 0, 0, 0)  # PR_GET_PDEATHSIG
        print(f"it gets signal {number.value} when its parent ends", flush=True)
        return original(H)

    train.set_up_data = wrapped


def test_without_a_local_rank_two_processes_are_one_run(tmp_path):
    """Whose shells may end, as those of nohup do."""
    environments = [hands(r, 2, port) for port in [free_port()] for r in range(2)]
    for env in environments:
        del env["LOCAL_RANK"]
    runs = job(SHORT, tmp_path / "run", environments, _tells_with_whom_it_ends)
    for run in runs:
        status, text = run.wait()
        assert status == 0 and "it gets signal 0 when" in text, text
    assert any("x 2 processes" in e.get("message", "") for e in events(tmp_path / "run" / "test"))


@pytest.mark.parametrize("missing", [0, 1])
def test_a_rank_that_does_not_come(missing, tmp_path):
    environments = [slurm(r, 2, "9") | {"MASTER_ADDR": "127.0.0.1"} for r in range(2)]
    argv = [*SHORT, "--port", str(free_port()), "--timeout", "1"]
    [run] = job(argv, tmp_path / "run", [environments[1 - missing]])
    began = time.monotonic()
    status, text = run.wait()
    [line] = [line for line in text.splitlines() if "error" in line]
    assert status == 2 and "within 1 s" in line and time.monotonic() - began < 200, text
    assert missing == 0 or "no sign of rank 1" in line


def test_a_port_on_which_something_else_is_silent_is_named():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        port = s.getsockname()[1]
        with pytest.raises(UserError, match=rf"port {port}, does not answer .*it is silent"):
            processes._connect("127.0.0.1", port, 2, datetime.timedelta(seconds=0.2))


def test_a_host_that_can_not_be_resolved(tmp_path):
    nodes = {"SLURM_STEP_NODELIST": "no-such-host-[1-2].invalid"}
    runs = job([*SHORT, "--port", str(free_port()), "--timeout", "2"], tmp_path / "run",
               [slurm(r, 2, "9") | nodes for r in range(2)])  # fmt: skip
    began = time.monotonic()
    for run in runs:
        status, text = run.wait()
        assert status == 2 and sum("error" in line for line in text.splitlines()) == 1, text
    assert time.monotonic() - began < 200


def beside(kind, name, argv, folder):
    """A function that waits for the end of a job: [(status, output)]. No job has a --port."""
    argv = [*argv, "--save_dir", folder]
    if kind in ("slurm", "hands"):
        environments = [
            slurm(r, 2, name) if kind == "slurm" else hands(r, 2, 29500) for r in range(2)
        ]
        runs = job(argv, folder, environments)
        return lambda: [run.wait(600) for run in runs]
    words = {"mpiexec": ("-n", "2"), "torchrun": ("--nproc_per_node", "2")}[kind]
    output = folder.with_suffix(".out")
    process = command(argv, (BIN / kind, *words), stdout=open(output, "w"))
    return lambda: [(process.wait(600), output.read_text())]


@pytest.mark.slow
@pytest.mark.parametrize(
    "kinds",
    ["slurm slurm", "mpiexec mpiexec", "torchrun torchrun", "hands slurm", "hands mpiexec",
     "hands torchrun", "slurm mpiexec hands torchrun"],
)  # fmt: skip
def test_jobs_side_by_side(kinds, tmp_path):
    """On the ports that each launcher has by default: all train to their end."""
    kinds = kinds.split()
    argv = [*SHORT, "--num_epochs", "8", "--timeout", "60"]
    waits = [beside(kind, str(i), argv, tmp_path / str(i)) for i, kind in enumerate(kinds)]
    for i, wait in enumerate(waits):
        for status, text in wait():
            assert status == 0, (kinds[i], text[-3000:])
        assert check_latest(tmp_path / str(i) / "test") == 8 * (1397 // 2 // 50)
    spans = [
        [e["time"] for e in events(tmp_path / str(i) / "test") if "time" in e]
        for i in range(len(kinds))
    ]
    spans = [[time.mktime(time.strptime(t)) for t in (s[0], s[-1])] for s in spans]
    assert max(begin for begin, _ in spans) <= min(end for _, end in spans), "one after the other"


# ---- elastic restarts ------------------------------------------------------------------------

ELASTIC = {
    "default": [],
    "standalone": ["--standalone"],
    "c10d": ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"],
    "static": ["--master-port", "PORT"],
}


# Two epochs: 26 steps.
TWICE = [*SMALL, "--n_batch", "50", "--num_epochs", "2", "--iters_per_save", "4", "--resume"]


def elastic(form, kind, folder):
    """torchrun's run of two ranks in which rank 1 fails once, in the first attempt."""
    words = [str(free_port()) if w == "PORT" else w for w in ELASTIC[form]]
    words = [BIN / "torchrun", "--nproc_per_node", "2", "--max-restarts", "2", *words]
    script = [ROOT / "tests" / "faulty_train.py", kind, "1", "6", *TWICE, "--save_dir", folder]
    script += ["--timeout", "6"] if kind in ("stop", "hang") else []
    done = subprocess.run(
        [*words, *script], cwd=ROOT, env=ENV | {"FIRST_ATTEMPT_ALONE": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=600,
    )  # fmt: skip
    return done.returncode, done.stdout


def _work(kind):
    """In a worker of the agent below, which waits for it to return."""
    import train

    endings._exit = lambda status: os._exit(status) if status else None
    Fault(kind, 1, 6)()
    train.run_command(train.main)


class Agent:
    """torchrun's agent in the run's place, with c10d; its two workers are forked, not started."""

    def __init__(self, kind):
        self.kind = kind

    def __call__(self):
        config = LaunchConfig(
            1, 1, 2, run_id="run", rdzv_backend="c10d", rdzv_endpoint="localhost:0",
            max_restarts=2, monitor_interval=0.1, start_method="fork",
        )  # fmt: skip
        elastic_launch(config, _work)(self.kind)
        os._exit(0)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    for run in start(2, TWICE, folder):
        assert run.wait()[0] == 0
    return folder / "test"


def check_restarted(status, output, folder, unbroken):
    """One restart, one resume, and the files of a run that nothing broke."""
    assert status == 0, output[-4000:]
    assert output.count("resuming from") == 1, output[-4000:]
    assert hashes(folder / "test") == hashes(unbroken)


def test_a_restart_by_torchruns_agent_resumes(unbroken, tmp_path):
    argv = [*TWICE, "--save_dir", tmp_path]
    run = Run(argv, tmp_path / "out", Agent("kill"), {"FIRST_ATTEMPT_ALONE": "1"})
    check_restarted(*run.wait(), tmp_path, unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kill", "raise", "stop", "hang"])
@pytest.mark.parametrize("form", ELASTIC)
def test_an_elastic_restart_resumes(form, kind, unbroken, tmp_path):
    check_restarted(*elastic(form, kind, tmp_path), tmp_path, unbroken)
