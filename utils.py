"""Small tools that know no VAE: processes and ranks, reductions, logs, pictures, downloads."""

import dataclasses
import functools
import json
import os
import re
import socket
import sys
import time
import traceback
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from hps import Hyperparams, UserError  # noqa: F401  Hyperparams: imported from here by programs

# ---- processes -----------------------------------------------------------------------------


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


def mpi_size():
    """Number of processes of the run, however they were started."""
    return world().size


def mpi_rank():
    """Number of this process, 0 to mpi_size() - 1."""
    return world().rank


def local_mpi_rank():
    """Number of this process among those on its host."""
    return world().local_rank


def resolve_device(name):
    """The torch device name of this process: "cpu" or "cuda:<local rank>".

    Args:
        name: "auto" or None (CUDA where there is one), "cpu", "cuda", or a result of this.

    Raises:
        UserError: if CUDA is asked for and missing, or has fewer devices than local ranks.
    """
    if name == "cpu" or (name in ("auto", None) and not torch.cuda.is_available()):
        return "cpu"
    if not torch.cuda.is_available():
        raise UserError(f"--device {name}: PyTorch finds no CUDA device here; use --device cpu")
    local_rank, devices = world().local_rank, torch.cuda.device_count()
    if local_rank >= devices:
        raise UserError(
            f"local rank {local_rank} has no GPU of its own: this host has {devices}; start at "
            f"most {devices} processes on it, or use --device cpu"
        )
    return f"cuda:{local_rank}"


def init_processes(device_type, port):
    """Joins the processes of the run into torch.distributed's default group (NCCL or gloo).

    Rank 0 listens on `port`, or under MPI on a free one that it then tells the others.

    Raises:
        UserError: if the port is taken and there is no way to agree on another.
    """
    me = world()
    if me.size == 1 or dist.is_initialized():
        return
    backend = "nccl" if device_type == "cuda" else "gloo"
    if me.launcher == "torchrun":
        dist.init_process_group(backend)
        return
    if me.launcher == "mpi":
        from mpi4py import MPI

        host = "127.0.0.1" if me.local_size == me.size else socket.gethostname()
        store = _listen(host, port, me.size, retry=True) if me.rank == 0 else None
        address = (host, store.port) if store else None
        host, port = MPI.COMM_WORLD.bcast(address, root=0)
    else:
        # The first host of a list such as "node[001-004,7],login".
        nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "")
        first = re.match(r"([^\[,]+)(?:\[(\d+))?", nodes)
        host = os.environ.get("MASTER_ADDR") or ("".join(first.groups("")) if first else "")
        host = host or "127.0.0.1"
        store = _listen(host, port, me.size, retry=False) if me.rank == 0 else None
    if me.rank != 0:
        store = dist.TCPStore(host, port, me.size, is_master=False)
    dist.init_process_group(backend, store=store, rank=me.rank, world_size=me.size)


def _listen(host, port, size, retry):
    try:
        return dist.TCPStore(host, port, size, is_master=True, wait_for_workers=False)
    except dist.DistNetworkError:
        if retry:
            return dist.TCPStore(host, 0, size, is_master=True, wait_for_workers=False)
        raise UserError(f"port {port} is taken on {host}: choose a free one with --port") from None


def run_command(main):
    """Runs an entry point and ends the process, and the others of its run, as the outcome says.

    Status 0: done; 2: a UserError, printed in one line; 130: interrupted; 1: any other
    exception, with its traceback.
    """
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
            if world().launcher == "mpi":
                from mpi4py import MPI

                MPI.Finalize()
            _exit(0)
        return
    except UserError as error:
        status, text = 2, f"error: {error}"
    except KeyboardInterrupt:
        status, text = 130, "interrupted"
    except Exception:
        status, text = 1, traceback.format_exc().rstrip()
    try:
        me = world()
    except UserError:  # the very thing to report: the launcher's variables make no sense
        me = World()
    if me.rank:
        # Where all ranks fail alike, rank 0 speaks and ends the run while the others wait.
        time.sleep(1)
    if me.size > 1:
        text = "\n".join(f"rank {me.rank}: {line}" for line in text.splitlines())
    print(text, file=sys.stderr, flush=True)
    if me.launcher == "mpi":
        from mpi4py import MPI

        MPI.COMM_WORLD.Abort(status)
    _exit(status)


def _exit(status):
    """Ends the process at once, not by sys.exit.

    With a peer gone, the destructors of the communication library may wait for ever, and even
    after a run that went well they now and then abort the process.
    """
    sys.stdout.flush()
    os._exit(status)


# ---- reductions ----------------------------------------------------------------------------


def allreduce(x, average):
    """The sum of x over all processes, or their mean; x itself where there is one process."""
    if mpi_size() > 1:
        dist.all_reduce(x)
        if average:
            x = x / mpi_size()
    return x


def get_cpu_stats_over_ranks(stat_dict):
    """Means over all processes of a dict of scalars (0-dim tensors or numbers), as floats.

    All of them travel in one vector: one reduction and one device synchronisation.
    """
    device = next((v.device for v in stat_dict.values() if torch.is_tensor(v)), None)
    values = [
        torch.as_tensor(v, dtype=torch.float32, device=device).detach() for v in stat_dict.values()
    ]
    return dict(zip(stat_dict, allreduce(torch.stack(values), average=True).tolist(), strict=True))


def noise_seed(*key):
    """A 63-bit seed that is a function of the whole key, a few integers of at least 0."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


# ---- logs and pictures ---------------------------------------------------------------------


def _plain(value):
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    return value


def logger(log_prefix):
    """A function log(*args, pprint=False, **kwargs) that prints, and appends to two files.

    One event is one line: key-value pairs, `time` first, args joined as `message`, of
    log_prefix.txt and one JSON object of log_prefix.jsonl (pprint: keys in alphabetical order).
    Ranks other than 0 say nothing.
    """

    def log(*args, pprint=False, **kwargs):
        if mpi_rank() != 0:
            return
        event = {"time": time.ctime()}
        if args:
            event["message"] = " ".join(str(arg) for arg in args)
        event |= {key: _plain(value) for key, value in kwargs.items()}
        if pprint:
            event = dict(sorted(event.items()))
        text = ", ".join(
            f"{k}: {v:.5g}" if isinstance(v, float) else f"{k}: {v}" for k, v in event.items()
        )
        print(text, flush=True)
        for path, line in ((f"{log_prefix}.txt", text), (f"{log_prefix}.jsonl", json.dumps(event))):
            with open(path, "a") as file:
                file.write(line + "\n")

    return log


def tile_images(images, d1=4, d2=4, border=1):
    """d1 rows of d2 pictures (each uint8 (h, w, c)) on white, `border` pixels around each.

    Returns uint8 (d1 * (h + border) + border, d2 * (w + border) + border, c).

    Raises:
        ValueError: if there are not d1 * d2 pictures.
    """
    if len(images) != d1 * d2:
        raise ValueError(f"{len(images)} pictures do not fill {d1} rows of {d2}")
    h, w, c = images[0].shape
    tiled = np.full(
        (d1 * (h + border) + border, d2 * (w + border) + border, c), 255, dtype=np.uint8
    )
    for index, image in enumerate(images):
        row, column = divmod(index, d2)
        top, left = border + row * (h + border), border + column * (w + border)
        tiled[top : top + h, left : left + w] = image
    return tiled


# ---- files ---------------------------------------------------------------------------------


def maybe_download(path, filename=None):
    """A local path for `path`: itself, or for an http(s) URL the file it is fetched to, once.

    Raises:
        UserError: if the URL can't be fetched.
    """
    if not path.startswith(("http://", "https://")):
        return path
    filename = filename or os.path.basename(path)
    if not os.path.exists(filename):
        partial = f"{filename}.part{os.getpid()}"
        try:
            urllib.request.urlretrieve(path, partial)
        except (OSError, urllib.error.ContentTooShortError) as error:
            Path(partial).unlink(missing_ok=True)
            raise UserError(f"{path} can't be fetched ({error}): download it by hand") from None
        os.replace(partial, filename)
    return filename
