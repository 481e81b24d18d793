"""Which of how many processes this is, on which device: what its launcher tells."""

import dataclasses
import functools
import os
import re
import shutil
import subprocess
import warnings
import zlib

import torch

from errors import UserError


@dataclasses.dataclass(frozen=True)
class World:
    """Which of how many processes this is, and who started them.

    launcher is "torchrun" (or whatever else sets RANK), "mpi", "slurm" or None (a process on its
    own). job is the launcher's name of the job, the same in all its processes and in no other job,
    where it gives one.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    launcher: str | None = None
    job: str | None = None


def _int_from(env, name, default=None):
    text = env.get(name, default)
    try:
        return int(text)
    except (TypeError, ValueError):
        raise UserError(
            f"environment variable {name} is {text!r}: its launcher must set a whole number; "
            f"start through torchrun, mpiexec or srun, or unset it"
        ) from None


# What each kind of launcher sets: (its variables for rank and size, which come together; others).
# jsrun is LSF's; Open MPI, MVAPICH, then MPICH with Intel MPI; PMIx tells no size.
MPI_VARIABLES = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),
    ("JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
)


def find_world(env):
    """The World that the launcher's environment variables describe.

    mpi4py is imported only where an MPI launcher started the process.

    Raises:
        UserError: for variables that contradict each other or the MPI library in use, or are known
            by half.
    """
    if "TORCHELASTIC_RUN_ID" in env or {"RANK", "WORLD_SIZE"} <= env.keys():
        world = _torch_world(env)
    elif _in_slurm_step(env):
        world = _slurm_world(env)
    elif started := [size for rank, size in MPI_VARIABLES if size in env]:
        world = _mpi_world(_int_from(env, started[0]))
    elif "PMIX_RANK" in env:
        world = _mpi_world(None)
    else:
        _refuse_halves(env)
        return World()
    if not (0 <= world.rank < world.size and world.local_rank >= 0):
        raise UserError(
            f"the launcher's variables say rank {world.rank} of {world.size}, local rank "
            f"{world.local_rank}: a rank lies from 0 to size - 1; start through the launcher"
        )
    return world


def _torch_world(env):
    rank, size = (_int_from(env, name) for name in ("RANK", "WORLD_SIZE"))
    by_torchrun = "TORCHELASTIC_RUN_ID" in env
    # One process a host is what sets no LOCAL_RANK.
    local_rank = _int_from(env, "LOCAL_RANK", None if by_torchrun else 0)
    local_size = _int_from(env, "LOCAL_WORLD_SIZE", 1)
    return World(rank, size, local_rank, local_size, "torchrun")


def _in_slurm_step(env):
    """Whether srun started this process itself. A batch script on its own is no job step."""
    if "SLURM_PROCID" not in env or not {"SLURM_STEP_NUM_TASKS", "SLURM_STEP_ID"} & env.keys():
        return False
    # mpiexec within a job starts its proxies by srun: theirs are then SLURM's variables. srun that
    # speaks PMI itself gives both kinds, and they agree.
    theirs = env.get("SLURM_PROCID"), env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS"))
    others = [(env.get(rank), env[size]) for rank, size in MPI_VARIABLES if size in env]
    return all(other == theirs for other in others)


def _slurm_world(env):
    total = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
    rank, size = _int_from(env, "SLURM_PROCID"), _int_from(env, total, 1)
    # "2(x3),1": two tasks on each of three nodes, one on the fourth.
    per_node = re.match(r"\d+", env.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    local_size = int(per_node[0]) if per_node else 1
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    job = "slurm " + ".".join(env.get(name, "0") for name in names)
    job = job if "SLURM_JOB_ID" in env else None
    return World(rank, size, _int_from(env, "SLURM_LOCALID", 0), local_size, "slurm", job)


def _mpi_world(size):
    """That of the MPI library; size is what the launcher's variables say, or None (PMIx)."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of another MPI's variables, see below
            from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"started by mpiexec, but mpi4py does not import ({error}): "
            f"install mpi4py and an MPI, or use torchrun"
        ) from None
    comm = MPI.COMM_WORLD
    if comm.size != size and (size or comm.size == 1):
        started = f"mpiexec started {size} processes" if size else "PMIX_RANK is set"
        raise UserError(
            f"{started}, but the MPI library of mpi4py sees {comm.size}: "
            f"use the mpiexec of that library, or torchrun"
        )
    local = comm.Split_type(MPI.COMM_TYPE_SHARED)
    return World(comm.rank, comm.size, local.rank, local.size, "mpi")


def _refuse_halves(env):
    """Raises UserError where a launcher's variables are there by half: n runs would train alone."""
    for names in (("RANK", "WORLD_SIZE"), *MPI_VARIABLES, ("SLURM_PROCID", "SLURM_NTASKS")):
        there = [name for name in names if name in env]
        # A batch script of SLURM has its task's number, but is no job step; one process is alone.
        alone = env.get(names[1]) == "1" or names[0] == "SLURM_PROCID" and "SLURM_JOB_ID" in env
        if len(there) == 1 and not alone and there != ["SLURM_NTASKS"]:
            [missing] = set(names) - set(there)
            raise UserError(
                f"{there[0]} is set to {env[there[0]]!r} without {missing}: a launcher sets both; "
                f"start through torchrun, mpiexec or srun, or unset it to train alone"
            )


@functools.cache
def world():
    """This process's World, found once."""
    return find_world(os.environ)


def first_host(env):
    """The first host of the job: MASTER_ADDR, or the head of SLURM's list of nodes."""
    if env.get("MASTER_ADDR"):
        return env["MASTER_ADDR"]
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or "127.0.0.1"
    if "[" in nodes and shutil.which("scontrol"):
        argv = ["scontrol", "show", "hostnames", nodes]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=30)
        if names := done.stdout.split():
            return names[0]
    # "gpu-a[001-004,7]-ib,login": of every bracket the first number, up to a comma outside them.
    head = re.match(r"(?:[^\[,]|\[[^\]]*\])*", nodes)[0]
    return re.sub(r"\[\s*([^\],-]*)[^\]]*\]", r"\1", head).strip()


def lone_warning(env):
    """A line where one process trains alone though SLURM was asked for several, else None."""
    tasks = env.get("SLURM_NTASKS", "1")
    if world().launcher or tasks == "1" or "SLURM_PROCID" not in env:
        return None
    return f"WARNING: the job has {tasks} tasks, but srun did not start this one: it trains alone"


def port_of_job(job, default):
    """The port that a job's processes meet on: a function of its name, so that two jobs differ.

    From 10000 to 29999, below those that systems give to outgoing connections.
    """
    return 10000 + zlib.crc32(job.encode()) % 20000 if job else default


def resolve_device(name):
    """The torch device name of this process: "cpu", "cuda:<local rank>" or the GPU that is named.

    Args:
        name: "auto" or None (CUDA where there is one), "cpu", "cuda" or "cuda:1", also as a
            torch.device.

    Raises:
        UserError: if CUDA is asked for and missing, or has fewer devices than local ranks.
    """
    name = str(name or "auto")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return "cpu"
    if not torch.cuda.is_available():
        raise UserError(f"--device {name}: PyTorch finds no CUDA device here; use --device cpu")
    if name.startswith("cuda:"):
        return name
    local_rank, devices = world().local_rank, torch.cuda.device_count()
    if devices == 1:  # the launcher shows each process its own
        local_rank = 0
    if local_rank >= devices:
        raise UserError(
            f"local rank {local_rank} has no GPU of its own: this host has {devices}; start at "
            f"most {devices} processes on it, or use --device cpu"
        )
    return f"cuda:{local_rank}"
