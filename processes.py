"""How the processes of a run meet, then speak with each other."""

import datetime
import os
import queue
import socket
import threading
import time
import uuid

import torch
import torch.distributed as dist

from errors import UserError, reason_of
from launchers import port_of_job, world
from options import DEFAULTS

_store = None  # the processes' common table of keys and values, where there are several


def store():
    """The processes' common table of keys and values; None where there is one process."""
    return _store


def join_processes(device, port, timeout):
    """Joins the processes of the run into torch.distributed's default group (NCCL or gloo).

    Args:
        device: this process's, "cpu" or "cuda:<index>".
        port: where rank 0 listens; a free one if it is taken and the launcher can tell the others.
        timeout: seconds that a process waits for the others before it gives them up.

    Raises:
        UserError: if they do not meet: the port is taken, by another job perhaps, a host can't be
            reached, a rank does not come, or two ranks have the same GPU.
    """
    global _store
    me = world()
    if me.size == 1 or dist.is_initialized():
        return
    limit = datetime.timedelta(0, timeout)
    try:
        if me.launcher.serves_store(os.environ):
            place = me.launcher.meeting_point(os.environ)
            table, answer = _join_attempt(_connect(*place, me.size, limit))
        else:
            table, answer = _join_job(port, limit), None
        _await_all(table, device, timeout, answer)
        _store = table
        # The watch comes first: it says who is missing, where NCCL's own would abort the process.
        later = limit + datetime.timedelta(seconds=60)
        # With its device NCCL connects now, and no collective has to guess it.
        own = {} if device == "cpu" else {"device_id": torch.device(device)}
        backend = "nccl" if own else "gloo"
        dist.init_process_group(
            backend, store=table, rank=me.rank, world_size=me.size, timeout=later, **own
        )
    except (dist.DistError, RuntimeError) as error:
        raise UserError(
            f"rank {me.rank} of {me.size} could not join the others within {timeout:g} s "
            f"({reason_of(error)[:200]}): check that all ranks start, that their hosts reach each "
            f"other, and --port"
        ) from None


def _connect(host, port, size, limit):
    """The table that rank 0, or torchrun's agent, serves; nothing is written there."""
    deadline = time.monotonic() + limit.total_seconds()
    while True:  # the store's own attempts print a page for each that fails
        try:
            socket.create_connection((host, port), timeout=limit.total_seconds()).close()
            return _client(host, port, size, limit)
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"{host}, port {port}, does not answer within {limit.total_seconds():g} s "
                    f"({error.strerror or error}): check that rank 0 starts, that this host "
                    f"reaches it by that name, and --port"
                ) from None
            time.sleep(0.1)


def _client(host, port, size, limit):
    """A client of a store.

    Raises:
        TimeoutError: where what listens there is silent, for which the store itself has no limit.
    """
    result = queue.SimpleQueue()

    def connect():
        try:
            table = dist.TCPStore(host, port, size, False, limit, wait_for_workers=False)
            result.put((table, None))
        except Exception as error:
            result.put((None, error))

    threading.Thread(target=connect, daemon=True).start()
    try:
        table, error = result.get(timeout=limit.total_seconds() + 1)
    except queue.Empty:
        raise TimeoutError("it is silent: another program's perhaps") from None
    if error:
        raise error
    return table


def _listen(port, size, limit, else_free):
    """A new table, served on a port of all addresses.

    A port is tried for PORT_S: the processes of a run that has just ended may still hold it.
    """
    deadline = time.monotonic() + PORT_S
    while True:
        try:
            # By its own address: the name of the host need not be known to it.
            return dist.TCPStore("127.0.0.1", port, size, True, limit, wait_for_workers=False)
        except dist.DistNetworkError:
            if else_free:
                port = 0
            elif time.monotonic() > deadline:
                raise UserError(
                    f"port {port} is taken on {socket.gethostname()}: another job may use it; "
                    f"choose a free one with --port (or MASTER_PORT)"
                ) from None
            else:
                time.sleep(0.25)


PORT_S = 10  # seconds


def _join_job(port, limit):
    """The table of this job, served by its rank 0, in which each rank has taken its place.

    A process that meets another job's table writes nothing there.
    """
    me = world()
    job, launcher = me.job, me.launcher
    if place := launcher.meeting_point(os.environ):
        host, port = place
    else:
        host = launcher.host(os.environ)
        if port == DEFAULTS["port"]:  # none was given
            port = port_of_job(job, port)
    if me.rank == 0:
        table = _listen(port, me.size, limit, else_free=launcher.joins)
        table.set("job", job or "")
    if launcher.joins:
        mine = "127.0.0.1" if me.local_size == me.size else socket.gethostname()
        host, port = launcher.from_rank_0((mine, table.port) if me.rank == 0 else None)
    if me.rank != 0:
        table = _connect(host, port, me.size, limit)
        found = table.get("job").decode()
        if found != (job or ""):
            raise UserError(
                f"port {port} of {host} is that of another job ({found or 'without a name'}): "
                f"choose another with --port (or MASTER_PORT)"
            )
    nonce = uuid.uuid4().hex
    if table.compare_set(f"place/{me.rank}", "", nonce).decode() != nonce:
        raise UserError(
            f"port {port} of {host} is that of another job, which has a rank {me.rank} already: "
            f"choose another with --port (or MASTER_PORT)"
        )
    return table


def _join_attempt(table):
    """This attempt's part of the table of torchrun's agents, which has what earlier ones wrote.

    The agents' counts of restarts may differ, so rank 0 gives the attempt a name: to whoever asks
    with a word of its own, new in every attempt.

    Returns:
        (part of the table, on rank 0 a function that answers those who ask).
    """
    me, word = world(), uuid.uuid4().hex
    table.set(f"ask/{me.rank}", word)
    if me.rank:
        return dist.PrefixStore(table.get(f"answer/{word}").decode(), table), None
    name, answered = f"attempt {word}", set()

    def answer():
        for r in range(1, me.size):
            if table.check([f"ask/{r}"]) and (asked := table.get(f"ask/{r}").decode()):
                if asked not in answered:  # in an earlier attempt perhaps: then no one listens
                    answered.add(asked)
                    table.set(f"answer/{asked}", name)

    return dist.PrefixStore(name, table), answer


def _await_all(table, device, timeout, answer=None):
    """Waits until all ranks have come, each with a device of its own; meanwhile calls answer()."""
    me = world()
    table.set(f"device/{me.rank}", _identity_of(device))
    missing, deadline = set(range(me.size)), time.monotonic() + timeout
    while missing := {r for r in missing if not table.check([f"device/{r}"])}:
        if answer:
            answer()
        if time.monotonic() > deadline:
            raise UserError(
                f"no sign of rank {', '.join(map(str, sorted(missing)))} within {timeout:g} s: "
                f"check that all {me.size} processes start, or raise --timeout"
            )
        time.sleep(0.02)
    owners = {}
    for r in range(me.size):
        device = table.get(f"device/{r}").decode()
        if device and owners.setdefault(device, r) != r:
            raise UserError(
                f"ranks {owners[device]} and {r} have the same GPU ({device}): start as many "
                f"processes on a host as it has GPUs, or give each its own (CUDA_VISIBLE_DEVICES)"
            )


def _identity_of(device):
    """A GPU's UUID; nothing for the CPU, which several processes may share."""
    if device == "cpu":
        return ""
    return str(torch.cuda.get_device_properties(device).uuid)


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
