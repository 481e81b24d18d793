"""Small tools that know no VAE: processes and ranks, reductions, logs, pictures, downloads."""

import contextlib
import dataclasses
import datetime
import functools
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
import urllib.error
import urllib.request
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

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


_store = None  # the processes' common table of keys and values, where there are several


def init_processes(device_type, port, timeout):
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
            store = _listen(host, port, me.size, retry=True) if me.rank == 0 else None
            address = (host, store.port) if store else None
            host, port = MPI.COMM_WORLD.bcast(address, root=0)
        else:
            # The first host of a list such as "node[001-004,7],login".
            nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get(
                "SLURM_JOB_NODELIST", ""
            )
            first = re.match(r"([^\[,]+)(?:\[(\d+))?", nodes)
            host = os.environ.get("MASTER_ADDR") or ("".join(first.groups("")) if first else "")
            host = host or "127.0.0.1"
            store = _listen(host, port, me.size, retry=False) if me.rank == 0 else None
        if me.rank != 0:
            store = dist.TCPStore(host, port, me.size, is_master=False, timeout=limit)
        _store = store
    # The watch comes first: it says who is missing, where NCCL's own would abort the process.
    later = limit + datetime.timedelta(seconds=2)
    dist.init_process_group(backend, store=_store, rank=me.rank, world_size=me.size, timeout=later)
    threading.Thread(target=_watch, args=(timeout,), daemon=True).start()


def _listen(host, port, size, retry):
    try:
        return dist.TCPStore(host, port, size, is_master=True, wait_for_workers=False)
    except dist.DistNetworkError:
        if retry:
            return dist.TCPStore(host, 0, size, is_master=True, wait_for_workers=False)
        raise UserError(f"port {port} is taken on {host}: choose a free one with --port") from None


def describe_processes():
    """One line a process: its rank, number and host, by which a launcher's report is read."""
    mine, lines = f"process {os.getpid()} on {socket.gethostname()}", [None] * mpi_size()
    if mpi_size() == 1:
        return []
    dist.all_gather_object(lines, mine)
    return [f"rank {r} is {line}" for r, line in enumerate(lines)]


def from_rank_0(function):
    """What function() returns on rank 0, on all ranks; its UserError is raised on all."""
    box = [None, None]
    if mpi_rank() == 0:
        try:
            box = [function(), None]
        except UserError as error:
            box = [None, error]
    if mpi_size() > 1:
        dist.broadcast_object_list(box, src=0)
    result, error = box
    if error:
        raise error
    return result


# ---- how a run ends ------------------------------------------------------------------------
# A process that fails, or finds the others silent, writes "ending" into the store. Every other
# process has a thread that looks there, answers with what it was doing, and says which ranks did
# not: those are gone, or stopped as a whole.

ANSWER_S = 5  # seconds that the others have to answer: their threads look twice a second

_last_sign = None  # time of this process's last sign of progress; None before its first step
_left = threading.Event()  # set when all has gone well and no process is missed any more
_ending = threading.Lock()  # held by whichever thread ends the process


def heartbeat(step=None):
    """Tells the watch, and with a step the other processes too, that this process goes on."""
    global _last_sign
    _last_sign = time.monotonic()
    if _store is not None and step is not None:
        _store.set(f"step/{mpi_rank()}", str(step))


def _watch(timeout):
    """Ends this process if another is ending, or if its own last step is too long ago."""
    while not _left.wait(0.5):
        try:
            ending = _store.check(["ending"])
        except dist.DistError:
            ending = True
        silent = _last_sign is not None and time.monotonic() - _last_sign > timeout
        if (ending or silent) and not _left.is_set():
            text = f"no step for {timeout:g} s" if silent else "another process has ended"
            _end_process(1, text, lost=True)


def _roll_call(what):
    """Tells the others what this process does, and asks them: lines of text on who is to blame."""
    me, to_blame, others = world(), [], []

    def wait_for(key, ranks):
        missing, deadline = set(ranks), time.monotonic() + ANSWER_S
        while missing and time.monotonic() < deadline:
            missing = {r for r in missing if not _store.check([f"{key}/{r}"])}
            time.sleep(0.1)
        return missing

    def ask():
        _store.set(f"here/{me.rank}", what)
        _store.set("ending", "1")
        missing = wait_for("here", range(me.size))
        steps = {
            r: int(_store.get(f"step/{r}")) for r in range(me.size) if _store.check([f"step/{r}"])
        }
        for r in range(me.size):
            said = "" if r in missing else _store.get(f"here/{r}").decode()
            line = f"rank {r} {said or 'is gone or hangs'} in step {steps.get(r, 'none')}"
            behind = steps.get(r, 0) < max(steps.values(), default=0)
            if r in missing or said.startswith("raised ") or behind:
                to_blame.append(line)
            else:
                others.append(line)
        _store.set(f"heard/{me.rank}", "1")
        if me.rank == 0:  # with it goes the store
            wait_for("heard", set(range(me.size)) - missing)

    def ask_and_excuse():
        try:
            ask()
        except dist.DistError:
            to_blame.append("rank 0, or the host it ran on, is gone or can't be reached")

    # In a thread of its own: over a dead link an answer may never come.
    asking = threading.Thread(target=ask_and_excuse, daemon=True)
    asking.start()
    asking.join(2 * ANSWER_S + 2)
    return to_blame or others or ["rank 0, or the host it ran on, can't be reached"]


def _place():
    """Where the main thread is, in words."""
    frame = sys._current_frames()[threading.main_thread().ident]
    place = traceback.extract_stack(frame)[-1]
    return f"stood in {place.name} ({os.path.basename(place.filename)}:{place.lineno})"


def _end_process(status, text, lost=False):
    """Prints why and ends the process, and under MPI the others, whatever other threads do.

    lost: the reason is another process, and text what this one noticed.
    """
    if not _ending.acquire(blocking=False):
        time.sleep(60)  # the thread that holds it ends the process
    try:
        me = world()
    except UserError:  # the very thing to report: the launcher's variables make no sense
        me = World()

    def speak(text):
        if me.size > 1:
            text = "\n".join(f"rank {me.rank}: {line}" for line in text.splitlines())
        say(text, sys.stderr)

    if lost:
        speak("\n".join([f"error: {text}", *_roll_call(_place())]))
    elif status == 1:
        speak(text)
        if _store is not None:
            _roll_call(f"raised {text.splitlines()[-1]}")
    else:
        if _store is not None:
            _roll_call(f"raised {text}")
        if me.rank:
            # Where all ranks fail alike, rank 0 speaks and ends the run while the others wait.
            time.sleep(1)
        speak(text)
    if me.launcher == "mpi":
        from mpi4py import MPI

        MPI.COMM_WORLD.Abort(status)
    _exit(status)


class Stopped(Exception):
    """A signal asked the run to stop, and all its processes have: `status` is 128 + its number."""

    def __init__(self, message):
        super().__init__(f"{message} ({signal.Signals(stop.signal or signal.SIGTERM).name})")
        self.status = 128 + (stop.signal or signal.SIGTERM)


class _StopRequest:
    """SIGTERM and SIGINT as a request to stop after the step, on all ranks alike.

    `signal` is the one that this process got, None without; `agreed` says that all ranks know of
    one, and in the same step.
    """

    signal = None
    agreed = False

    def listen(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number, _):
        if self.signal is None:
            self.signal, self.since = number, time.monotonic()
        # A launcher passes on what the terminal or scheduler has sent to all of its group: a
        # signal that comes with the first one is the same.
        elif time.monotonic() - self.since > 2:
            os._exit(128 + number)

    def requested(self):
        """Whether this process or another got a signal; between steps, as in an evaluation."""
        if self.signal and _store is not None:
            _store.set("stop", "1")
        return bool(self.signal) or (_store is not None and _store.check(["stop"]))


stop = _StopRequest()


def _leave(status):
    """Takes leave of the other processes, all having come to the end, and ends this one."""
    _left.set()
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        if world().launcher == "mpi":
            from mpi4py import MPI

            MPI.Finalize()
    _exit(status)


def _exit(status):
    """Ends the process at once, not by sys.exit.

    With a peer gone, the destructors of the communication library may wait for ever, and even
    after a run that went well they now and then abort the process.
    """
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(status)


def say(text, file=None):
    """Prints text above any progress bar; a full disk or a closed pipe costs it, not the run."""
    file = file or sys.stdout
    with contextlib.suppress(OSError):
        tqdm.write(str(text), file=file)
        file.flush()


def run_command(main):
    """Runs an entry point and ends the process, and the others of its run, as the outcome says.

    Status 0: done; 2: a UserError, printed in one line; 143 or 130: stopped by SIGTERM or SIGINT;
    1: another process is lost, or any other exception, with its traceback.
    """
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
    try:
        try:
            main()
            status = 0
        except Stopped as error:
            status = error.status
            if mpi_rank() == 0:
                say(error, sys.stderr)
        _leave(status)
    except UserError as error:
        _end_process(2, f"error: {error}")
    except KeyboardInterrupt:
        _end_process(130, "interrupted")
    except Exception as error:
        if _store is not None and (isinstance(error, dist.DistError) or "gloo" in str(error)):
            _end_process(1, "lost contact with another process", lost=True)
        _end_process(1, traceback.format_exc().rstrip())


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
    # torch.full makes a number on the device, where as_tensor would copy it there and wait.
    values = [
        v.detach().float() if torch.is_tensor(v) else torch.full((), float(v), device=device)
        for v in stat_dict.values()
    ]
    return dict(zip(stat_dict, allreduce(torch.stack(values), average=True).tolist(), strict=True))


def noise_seed(*key):
    """A 63-bit seed that is a function of the whole key, a few integers of at least 0."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


def image_generators(indices, *key):
    """One generator per image, a function of the key, a few integers, and the image's index."""
    return [torch.Generator().manual_seed(noise_seed(*key, i)) for i in indices]


# ---- logs and pictures ---------------------------------------------------------------------


def _plain(value):
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    return value


_held = None  # (path, line) of a run that has not begun to write, see hold_log


def hold_log():
    """Keeps the lines of all logs back, so that a run refused at the door leaves none."""
    global _held
    _held = []


def release_log():
    """Writes what was held back, and from now on each line at once.

    Raises:
        OSError: if it can't be written.
    """
    global _held
    lines, _held = _held or [], None
    for path, line in lines:
        _append(path, line)


def _append(path, line):
    """Appends a line to a text file whose last one a kill or a full disk may have cut short."""
    if _held is not None:
        _held.append((path, line))
        return
    with open(path, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else f"\n{line}"
        file.write(f"{line}\n".encode())


def logger(log_prefix):
    """A function log(*args, pprint=False, **kwargs) that prints, and appends to two files.

    One event is one line: key-value pairs, `time` first, args joined as `message`, of
    log_prefix.txt and one JSON object of log_prefix.jsonl (pprint: keys in alphabetical order).
    Ranks other than 0 say nothing. A line that can't be written is reported on stderr.
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
        say(text)
        for path, line in ((f"{log_prefix}.jsonl", json.dumps(event)), (f"{log_prefix}.txt", text)):
            try:
                _append(path, line)
            except OSError as error:
                say(f"WARNING: {path} lacks this line ({error.strerror})", sys.stderr)

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
