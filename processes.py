"""How the processes of a run meet, then speak with each other."""

import datetime
import os
import socket

import torch.distributed as dist

from errors import UserError
from launchers import first_host, world

_store = None  # the processes' common table of keys and values, where there are several


def store():
    """The processes' common table of keys and values; None where there is one process."""
    return _store


def join_processes(device_type, port, timeout):
    """Joins the processes of the run into torch.distributed's default group (NCCL or gloo).

    Rank 0 listens on `port`, or under MPI on a free one that it then tells the others. `timeout`,
    in seconds, is how long a process waits for the others before it gives them up.

    Raises:
        UserError: if the port is taken and there is no way to agree on another, or the launcher's
            variables name no meeting point.
    """
    global _store
    me = world()
    if me.size == 1 or dist.is_initialized():
        return
    backend, limit = "nccl" if device_type == "cuda" else "gloo", datetime.timedelta(0, timeout)
    if me.launcher == "torchrun":
        try:
            _store, _, _ = next(dist.rendezvous("env://", timeout=limit))
        except (ValueError, dist.DistError) as error:
            raise UserError(
                f"the launcher's variables lead to no meeting point of the {me.size} processes "
                f"({str(error).splitlines()[0]}): start through torchrun"
            ) from None
    else:
        if me.launcher == "mpi":
            from mpi4py import MPI

            host = "127.0.0.1" if me.local_size == me.size else socket.gethostname()
            table = _listen(host, port, me.size, retry=True) if me.rank == 0 else None
            address = (host, table.port) if table else None
            host, port = MPI.COMM_WORLD.bcast(address, root=0)
        else:
            host = first_host(os.environ)
            table = _listen(host, port, me.size, retry=False) if me.rank == 0 else None
        if me.rank != 0:
            table = dist.TCPStore(host, port, me.size, is_master=False, timeout=limit)
        _store = table
    # The watch comes first: it says who is missing, where NCCL's own would abort the process.
    later = limit + datetime.timedelta(seconds=2)
    dist.init_process_group(backend, store=_store, rank=me.rank, world_size=me.size, timeout=later)


def _listen(host, port, size, retry):
    try:
        return dist.TCPStore(host, port, size, is_master=True, wait_for_workers=False)
    except dist.DistNetworkError:
        if retry:
            return dist.TCPStore(host, 0, size, is_master=True, wait_for_workers=False)
        raise UserError(f"port {port} is taken on {host}: choose a free one with --port") from None


def describe_processes():
    """One line a process: its rank, number and host, by which a launcher's report is read."""
    mine, lines = f"process {os.getpid()} on {socket.gethostname()}", [None] * world().size
    if world().size == 1:
        return []
    dist.all_gather_object(lines, mine)
    return [f"rank {r} is {line}" for r, line in enumerate(lines)]


def from_rank_0(function):
    """What function() returns on rank 0, on all ranks; its UserError is raised on all."""
    box = [None, None]
    if world().rank == 0:
        try:
            box = [function(), None]
        except UserError as error:
            box = [None, error]
    if world().size > 1:
        dist.broadcast_object_list(box, src=0)
    result, error = box
    if error:
        raise error
    return result


def allreduce(x, average):
    """The sum of x over all processes, or their mean; x itself where there is one process."""
    if world().size > 1:
        dist.all_reduce(x)
        if average:
            x = x / world().size
    return x
