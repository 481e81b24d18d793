"""How a run ends, whatever ends it: a signal, an error, another process that is lost.

A process that fails, or finds the others silent, writes "ending" into the store. Every other
process has a thread that looks there, answers with what it was doing, and says which ranks did
not: those are gone, or stopped as a whole.
"""

import contextlib
import ctypes
import itertools
import os
import signal
import sys
import threading
import time
import traceback

import torch.distributed as dist

from errors import UserError, one_line
from interrupts import hand_over
from launchers import World, world
from logs import open_outputs, print_line, show_log
from processes import store

ANSWER_S = 4  # seconds that the others have to answer: their threads look twice a second
ALIVE_S = 2  # seconds between signs of life
LOOK_S = 0.5  # seconds between looks at them
SILENT_S = 5  # without a sign of life for so long, a rank is lost
START_S = 60  # the same before the first step: a long import may hold all threads
ASLEEP_S = 4  # a thread that did not run for so long was suspended with its process, or its host

_last_step = None  # time of this process's last sign of progress; None before its first step
_began = 0.0  # time of its first
_left = threading.Event()  # set when all has gone well and no process is missed any more
_ending = threading.Lock()  # held by whichever thread ends the process


# ---- the watch -----------------------------------------------------------------------------


def heartbeat(step=None):
    """Tells the watch, and with a step the other processes too, that this process goes on."""
    global _last_step, _began
    _began = time.monotonic() if _last_step is None else _began
    _last_step = time.monotonic()
    if store() is not None and step is not None:
        store().set(f"step/{world().rank}", str(step))


class _Watch:
    """Two threads that end this process if another is ending, is lost, or this one takes no step.

    One speaks with the table through a connection of its own, which may hang with the host that
    serves it; the other looks at what came of it. A rank lives as long as its count goes up; that
    its main thread hangs, it notices by itself.
    """

    def __init__(self, table, timeout):
        self.table, self.timeout = table.clone(), timeout
        self.ending = self.lost = False
        self.signs = {}  # rank → (its count, when that was new)
        self.answered = self.looked = time.monotonic()
        for function in (self.speak, self.look):
            threading.Thread(target=function, daemon=True).start()

    def speak(self):
        """Counts up in the table, and reads there how far the others have counted."""
        try:
            for count in itertools.count():
                if count % round(ALIVE_S / LOOK_S) == 0:
                    self.table.set(f"alive/{world().rank}", str(count))
                    self.read_signs()
                self.ending = self.ending or self.table.check(["ending"])
                self.answered = time.monotonic()
                if _left.wait(LOOK_S):
                    return
        except (dist.DistError, RuntimeError):
            self.lost = True

    def read_signs(self):
        """Notes which ranks have counted up; those that have not begun are not missed."""
        ranks = range(world().size)
        begun = [r for r in ranks if r in self.signs or self.table.check([f"alive/{r}"])]
        counts = self.table.multi_get([f"alive/{r}" for r in begun]) if begun else []
        for r, count in zip(begun, counts, strict=True):
            if count != self.signs.get(r, (None,))[0]:
                self.signs[r] = count, time.monotonic()

    def patience(self):
        """Seconds without a sign of life after which a rank is lost."""
        return START_S if _last_step is None else SILENT_S

    def long_ago(self, when):
        """Whether what was heard last at that time has been silent for longer than patience.

        Which begins anew with the first step: another rank's start may have held its threads.
        """
        return time.monotonic() - max(when, _began) > self.patience()

    def silent(self):
        """The ranks that gave no sign of life for so long."""
        return [r for r, (_, when) in list(self.signs.items()) if self.long_ago(when)]

    def unanswered(self):
        """Whether the table itself is gone, or has not answered for so long."""
        return self.lost or self.long_ago(self.answered)

    def look(self):
        """Ends this process where that is called for."""
        while not _left.wait(LOOK_S):
            now = time.monotonic()
            if now - self.looked > ASLEEP_S:  # all of the job may have been: count anew
                self.answered = now
                self.signs = {r: (sign, now) for r, (sign, _) in self.signs.items()}
            self.looked = now
            stuck = _last_step is not None and now - _last_step > self.timeout
            if self.ending or self.lost:
                text = "another process has ended"
            elif stuck:
                text = f"no step for {self.timeout:g} s"
            elif self.unanswered() or self.silent():
                text = f"no sign of life from another process for {self.patience()} s"
            else:
                continue
            if not _left.is_set():
                _end_process(1, text, lost=True)


_watch = None  # of this process, where there are several


def start_watch(timeout):
    """Starts the watch over this process and the others of its run.

    Args:
        timeout: seconds without a step after which this process is given up.
    """
    global _watch
    if store() is not None and _watch is None:
        _watch = _Watch(store(), timeout)


def _roll_call(what):
    """Tells the others what this process does, and asks them: lines of text on who is to blame."""
    me, table, to_blame, others = world(), store(), [], []
    gone = ["rank 0, or the host it ran on, is gone or can't be reached"]

    def wait_for(key, ranks):
        missing, deadline = set(ranks), time.monotonic() + ANSWER_S
        while missing and time.monotonic() < deadline:
            missing = {r for r in missing if not table.check([f"{key}/{r}"])}
            time.sleep(0.1)
        return missing

    def ask():
        table.set(f"here/{me.rank}", one_line(what))
        table.set("ending", "1")
        silent = set(_watch.silent())
        missing = wait_for("here", set(range(me.size)) - silent)
        missing |= {r for r in silent if not table.check([f"here/{r}"])}
        steps = {
            r: int(table.get(f"step/{r}")) for r in range(me.size) if table.check([f"step/{r}"])
        }
        for r in range(me.size):
            said = "" if r in missing else table.get(f"here/{r}").decode()
            line = f"rank {r} {said or 'is gone or hangs'} in step {steps.get(r, 'none')}"
            behind = steps.get(r, 0) < max(steps.values(), default=0)
            if r in missing or said.startswith("raised ") or behind:
                to_blame.append(line)
            else:
                others.append(line)
        table.set(f"heard/{me.rank}", "1")
        if me.rank == 0:  # with it goes the table
            wait_for("heard", set(range(me.size)) - missing)

    def ask_and_excuse():
        try:
            ask()
        except (dist.DistError, RuntimeError):
            to_blame.extend(gone)

    if _watch is None or _watch.unanswered():
        return gone
    # In a thread of its own: over a dead link an answer may never come.
    asking = threading.Thread(target=ask_and_excuse, daemon=True)
    asking.start()
    deadline = time.monotonic() + 2 * ANSWER_S + 1
    while asking.is_alive() and time.monotonic() < deadline and not _watch.unanswered():
        asking.join(LOOK_S)
    return to_blame or others or gone


def _place():
    """Where the main thread is, in words."""
    frame = sys._current_frames()[threading.main_thread().ident]
    place = traceback.extract_stack(frame)[-1]
    return f"stood in {place.name} ({os.path.basename(place.filename)}:{place.lineno})"


# ---- signals -------------------------------------------------------------------------------


# What schedulers send before a limit, or may be asked to send: all that end a process and tell of
# no fault. One that is ignored stays so.
SIGNALS = [
    getattr(signal, f"SIG{name}")
    for name in "TERM INT HUP USR1 USR2 XCPU URG PWR QUIT ALRM VTALRM PROF IO STKFLT".split()
    if hasattr(signal, f"SIG{name}")
]

# A profiler's, or a network library's, where it has taken them before the run begins.
TIMERS = {getattr(signal, f"SIG{name}", None) for name in ("ALRM", "VTALRM", "PROF", "IO")}


def _caught():
    """The signals that this process catches: of one caught in C Python does not know (Linux)."""
    with contextlib.suppress(OSError, StopIteration), open("/proc/self/status") as file:
        bits = int(next(line for line in file if line.startswith("SigCgt")).split()[1], 16)
        return {number for number in range(1, 65) if bits >> (number - 1) & 1}
    return set()


class Stopped(Exception):
    """A signal asked the run to stop, and all its processes have: `status` is 128 + its number."""

    def __init__(self, message):
        number = stop.number()
        super().__init__(f"{message} ({signal.Signals(number).name})")
        self.status = 128 + number


class _StopRequest:
    """SIGNALS as a request to stop after the step, on all ranks alike.

    `signal` is the first that this process got, None without; `agreed` says that all ranks know of
    one, and in the same step.
    """

    signal = None
    agreed = False
    interrupted = None  # time of the first SIGINT

    def listen(self):
        caught = _caught()
        for number in SIGNALS:
            handler = signal.getsignal(number)
            taken = number in TIMERS and (number in caught or handler is not signal.SIG_DFL)
            if not taken and handler not in (signal.SIG_IGN, None):
                signal.signal(number, self._note)

    def _note(self, number, _):
        self.signal = self.signal or number
        if number == signal.SIGINT:
            # A terminal sends it to the whole group, and the launcher passes it on: one that comes
            # with the first is the same. The second is impatience.
            self.interrupted = self.interrupted or time.monotonic()
            if time.monotonic() - self.interrupted > 2:
                os._exit(128 + number)

    def announce(self):
        """Tells the other processes of this one's signal: 1.0 with one, 0.0 without."""
        if self.signal and store() is not None:
            store().set("stop", str(int(self.signal)))
        return float(self.signal is not None)

    def requested(self):
        """Whether this process or another got a signal; between steps, as in an evaluation."""
        return bool(self.announce()) or (store() is not None and store().check(["stop"]))

    def number(self):
        """The signal's number, this process's or another's."""
        if self.signal is None and store() is not None and store().check(["stop"]):
            return int(store().get("stop"))
        return int(self.signal or signal.SIGTERM)


stop = _StopRequest()


# ---- the end of the process ----------------------------------------------------------------


def _end_process(status, text, lost=False):
    """Prints why and ends the process, and the others if its launcher can, whatever threads do.

    lost: the reason is another process, and text what this one noticed.
    """
    if not _ending.acquire(blocking=False):
        time.sleep(60)  # the thread that holds it ends the process
    try:
        me = world()
    except UserError:  # the very thing to report: the launcher's variables make no sense
        me = World()
    if status == 1:  # else the one line is all there is to say
        show_log()

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
    me.launcher.end_others(status)
    _exit(status)


def _leave(status):
    """Takes leave of the other processes, all having come to the end, and ends this one.

    Until all have, the watch goes on: another may still fail, in its last save.
    """
    table, me = store(), world()
    if table is not None:
        everyone = range(me.size)
        table.set(f"done/{me.rank}", "1")
        while not all(table.check([f"done/{r}"]) for r in everyone):
            heartbeat()  # to wait for another's last save is no hanging
            time.sleep(0.05)
        _left.set()
        table.set(f"left/{me.rank}", "1")
        if me.rank == 0:  # with it goes the table
            deadline = time.monotonic() + ANSWER_S
            while time.monotonic() < deadline:
                if all(table.check([f"left/{r}"]) for r in everyone):
                    break
                time.sleep(0.02)
    if dist.is_initialized():
        dist.destroy_process_group()
        me.launcher.leave()
    _exit(status)


def die_with_parent(number=signal.SIGKILL):
    """Has the system send this process a signal when the one that started it ends (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(1, int(number), 0, 0, 0)  # PR_SET_PDEATHSIG


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

    Status 0: done; 2: a UserError, printed in one line; 128 + n: stopped by signal n;
    1: another process is lost, or any other exception, with its traceback.
    """
    hand_over()
    open_outputs()
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
