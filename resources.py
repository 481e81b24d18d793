"""What the machine runs short of, in one line with the remedy."""

import contextlib
import errno
import multiprocessing.queues
import os
import re
import signal
import sys
import traceback

import torch

from errors import UserError

# What an exception's message says → (what is short, what helps). The first that fits.
SHORTAGES = (
    (r"out of memory|can't allocate memory|Cannot allocate memory|Unable to allocate .*array",
     "memory is short",
     "lower --n_batch or --num_workers, or add --grad_accum or --checkpoint_activations"),
    (r"Too many open files|ancdata|exit code 24\b",
     "the limit on open files is too low", "raise it with ulimit -n, or add --num_workers 0"),
    (r"start new thread|Resource temporarily unavailable",
     "no further process or thread may be started",
     "raise the limit (ulimit -u, or the container's on processes), or add --num_workers 0"),
    (r"Bus error|shared memory|/dev/shm|</torch_|No space left on device",
     "the shared memory of the processes that load images is too small",
     "enlarge /dev/shm (Docker: --shm-size 1g), or add --num_workers 0"),
    (r"DataLoader worker .*killed by signal: Killed",
     "a process that loads images was killed, as the system does where memory is short",
     "lower --num_workers or give more memory, then go on with --resume"),
    (r"DataLoader worker \(pid",
     "a process that loads images has ended before its time",
     "add --num_workers 0 to see why, then go on with --resume"),
)  # fmt: skip

# Exit status of a loader worker that could not hand over a batch.
NOT_HANDED_OVER = 24


def shortage(error, remedy=None):
    """A line on what an exception says the machine is short of; None where it says no such thing.

    Of an OSError, which may be about any file, what it says of processes, files and memory.
    """
    if isinstance(error.__cause__, RuntimeError):  # of a worker that has ended: by what signal
        error = error.__cause__
    text = str(error).strip() or type(error).__name__
    if isinstance(error, MemoryError):
        text = f"out of memory: {text}"
    elif isinstance(error, OSError) and error.errno in _SHORT:
        text = os.strerror(error.errno)
    elif isinstance(error, OSError) and _of_semaphore(error):
        text = f"no shared memory: {error.strerror or error}"
    elif not re.search(r"DataLoader|memory|ancdata|new thread|</torch_|open files", text):
        return None
    for pattern, what, helps in SHORTAGES:
        if re.search(pattern, text):
            # A worker's error arrives with its traceback put before it.
            lines = text.splitlines()
            reason = lines[-1] if lines[0].startswith("Caught") else lines[0]
            reason = reason.partition(". Details are lost")[0]
            return f"{what} ({reason.strip()[:200]}): {remedy or helps}"
    return None


def _of_semaphore(error):
    """Whether multiprocessing could not make one of its locks, which lie in /dev/shm."""
    places = traceback.extract_tb(error.__traceback__)
    return bool(places) and places[-1].filename.endswith("synchronize.py")


_SHORT = (errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM)


@contextlib.contextmanager
def naming_shortages(remedy=None):
    """Turns what the body raises for want of memory, files or processes into a UserError.

    remedy: what helps, in place of a run's options.
    """
    try:
        yield
    except (OSError, RuntimeError, MemoryError) as error:
        if line := shortage(error, remedy):
            raise UserError(line) from None
        raise


def fail_quietly():
    """In a loader worker: what fails in it is told by its parent, in one line."""
    # PyTorch's own handlers print a line of their own.
    for number in (signal.SIGBUS, signal.SIGSEGV):
        signal.signal(number, signal.SIG_DFL)

    # By default the threads that hand batches over print a traceback, and the parent waits on.
    def give_up(error, _=None):
        os._exit(NOT_HANDED_OVER if getattr(error, "errno", 0) == errno.EMFILE else 1)

    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(give_up)
    sys.excepthook = lambda _, error, __: give_up(error)


# ---- the compiler --------------------------------------------------------------------------


def try_compiler(device):
    """Compiles a line by torch.compile, as --compile will.

    Raises:
        UserError: where that fails, as without a compiler of C++.
    """
    try:
        torch.compile(lambda x: (x + 1) * 2)(torch.zeros(3, device=device))
    except Exception as error:  # of half a dozen kinds
        lines = str(error).strip().splitlines() or [type(error).__name__]
        named = [line for line in lines if re.search(r"compiler|Error|not found|denied", line)]
        reason = (named or lines)[0].strip()[:200]
        raise UserError(
            f"--compile: torch.compile can't compile for {device} here ({reason}): install a C++ "
            f"compiler (g++, or one that CXX names), or leave --compile out"
        ) from None
