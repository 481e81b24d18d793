"""Which of how many processes this is, on which device: what its launcher tells."""

import dataclasses
import functools
import os
import re
import warnings

import torch

from errors import UserError


@dataclasses.dataclass(frozen=True)
class World:
    """Which of how many processes this is, and who started them.

    launcher is "torchrun", "mpi", "slurm" or None (a process on its own).
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    launcher: str | None = None


def _int_from(env, name, default=None):
    text = env.get(name, default)
    try:
        return int(text)
    except (TypeError, ValueError):
        raise UserError(
            f"environment variable {name} is {text!r}: its launcher must set a whole number; "
            f"start through torchrun, mpiexec or srun, or unset it"
        ) from None


def find_world(env):
    """The World that the launcher's environment variables describe.

    mpi4py is imported only where an MPI launcher started the process.

    Raises:
        UserError: for variables that contradict each other or the MPI library in use.
    """
    if "TORCHELASTIC_RUN_ID" in env or {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= env.keys():
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        rank, size, local_rank = (_int_from(env, name) for name in names)
        local_size = _int_from(env, "LOCAL_WORLD_SIZE", 1)
        world = World(rank, size, local_rank, local_size, "torchrun")
    elif "OMPI_COMM_WORLD_SIZE" in env or "PMI_SIZE" in env:
        open_mpi = "OMPI_COMM_WORLD_SIZE" in env
        size = _int_from(env, "OMPI_COMM_WORLD_SIZE" if open_mpi else "PMI_SIZE")
        world = _mpi_world(size)
    elif "SLURM_PROCID" in env and {"SLURM_STEP_NUM_TASKS", "SLURM_STEP_ID"} & env.keys():
        # Inside srun. A batch script on its own has SLURM_PROCID too, but is no job step.
        total = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
        rank, size = _int_from(env, "SLURM_PROCID"), _int_from(env, total, 1)
        # "2(x3),1": two tasks on each of three nodes, one on the fourth.
        per_node = re.match(r"\d+", env.get("SLURM_STEP_TASKS_PER_NODE", "1"))
        local_size = int(per_node[0]) if per_node else 1
        world = World(rank, size, _int_from(env, "SLURM_LOCALID", 0), local_size, "slurm")
    else:
        return World()
    if not (0 <= world.rank < world.size and world.local_rank >= 0):
        raise UserError(
            f"the launcher's variables say rank {world.rank} of {world.size}, local rank "
            f"{world.local_rank}: a rank lies from 0 to size - 1; start through the launcher"
        )
    return world


def _mpi_world(size):
    try:
        with warnings.catch_warnings(action="ignore"):  # of another MPI's variables, see below
            from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"started by mpiexec, but mpi4py does not import ({error}): "
            f"install mpi4py and an MPI, or use torchrun"
        ) from None
    comm = MPI.COMM_WORLD
    if comm.size != size:
        raise UserError(
            f"mpiexec started {size} processes, but the MPI library of mpi4py sees {comm.size}: "
            f"use the mpiexec of that library, or torchrun"
        )
    local = comm.Split_type(MPI.COMM_TYPE_SHARED)
    return World(comm.rank, comm.size, local.rank, local.size, "mpi")


@functools.cache
def world():
    """This process's World, found once."""
    return find_world(os.environ)


def first_host(env):
    """The host that the processes meet on, as MASTER_ADDR or SLURM's list of nodes tells."""
    # The first host of a list such as "node[001-004,7],login".
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "")
    first = re.match(r"([^\[,]+)(?:\[(\d+))?", nodes)
    return env.get("MASTER_ADDR") or ("".join(first.groups("")) if first else "") or "127.0.0.1"


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
    if local_rank >= devices:
        raise UserError(
            f"local rank {local_rank} has no GPU of its own: this host has {devices}; start at "
            f"most {devices} processes on it, or use --device cpu"
        )
    return f"cuda:{local_rank}"
