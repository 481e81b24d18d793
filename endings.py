"""How a run ends, whatever ends it: a signal, an error, another process that is lost.

A process that fails, or finds the others silent, writes "ending" into the store. Every other
process has a thread that looks there, answers with what it was doing, and says which ranks did
not: those are gone, or stopped as a whole.
"""

import contextlib
import os
import signal
import sys
import threading
import time
import traceback

import torch.distributed as dist

from errors import UserError
from launchers import World, world
from logs import print_line
from processes import store

ANSWER_S = 5  # seconds that the others have to answer: their threads look twice a second

_last_sign = None  # time of this process's last sign of progress; None before its first step
_left = threading.Event()  # set when all has gone well and no process is missed any more
_ending = threading.Lock()  # held by whichever thread ends the process


# ---- the watch -----------------------------------------------------------------------------


def heartbeat(step=None):
    """Tells the watch, and with a step the other processes too, that this process goes on."""
    global _last_sign
    _last_sign = time.monotonic()
    if store() is not None and step is not None:
        store().set(f"step/{world().rank}", str(step))


def start_watch(timeout):
    """Starts the thread that ends this process if another is ending or this one takes no step.

    Args:
        timeout: seconds without a step after which this process is given up.
    """
    if store() is not None:
        threading.Thread(target=_watch, args=(timeout,), daemon=True).start()


def _watch(timeout):
    """Ends this process if another is ending, or if its own last step is too long ago."""
    while not _left.wait(0.5):
        try:
            ending = store().check(["ending"])
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
            missing = {r for r in missing if not store().check([f"{key}/{r}"])}
            time.sleep(0.1)
        return missing

    def ask():
        store().set(f"here/{me.rank}", what)
        store().set("ending", "1")
        missing = wait_for("here", range(me.size))
        steps = {
            r: int(store().get(f"step/{r}")) for r in range(me.size) if store().check([f"step/{r}"])
        }
        for r in range(me.size):
            said = "" if r in missing else store().get(f"here/{r}").decode()
            line = f"rank {r} {said or 'is gone or hangs'} in step {steps.get(r, 'none')}"
            behind = steps.get(r, 0) < max(steps.values(), default=0)
            if r in missing or said.startswith("raised ") or behind:
                to_blame.append(line)
            else:
                others.append(line)
        store().set(f"heard/{me.rank}", "1")
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


# ---- signals -------------------------------------------------------------------------------


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
        if self.signal and store() is not None:
            store().set("stop", "1")
        return bool(self.signal) or (store() is not None and store().check(["stop"]))


stop = _StopRequest()


# ---- the end of the process ----------------------------------------------------------------


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

    def print_ranked(text):
        if me.size > 1:
            text = "\n".join(f"rank {me.rank}: {line}" for line in text.splitlines())
        print_line(text, sys.stderr)

    if lost:
        print_ranked("\n".join([f"error: {text}", *_roll_call(_place())]))
    elif status == 1:
        print_ranked(text)
        if store() is not None:
            _roll_call(f"raised {text.splitlines()[-1]}")
    else:
        if store() is not None:
            _roll_call(f"raised {text}")
        if me.rank:
            # Where all ranks fail alike, rank 0 speaks and ends the run while the others wait.
            time.sleep(1)
        print_ranked(text)
    if me.launcher == "mpi":
        from mpi4py import MPI

        MPI.COMM_WORLD.Abort(status)
    _exit(status)


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
            if world().rank == 0:
                print_line(error, sys.stderr)
        _leave(status)
    except UserError as error:
        _end_process(2, f"error: {error}")
    except KeyboardInterrupt:
        _end_process(130, "interrupted")
    except Exception as error:
        if store() is not None and (isinstance(error, dist.DistError) or "gloo" in str(error)):
            _end_process(1, "lost contact with another process", lost=True)
        _end_process(1, traceback.format_exc().rstrip())
