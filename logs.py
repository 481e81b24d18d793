"""The lines of a run's log: printed, written to files, buffered until the run begins."""

import contextlib
import json
import os
import sys
import time

import numpy as np
from tqdm import tqdm

from errors import one_line
from launchers import world


def open_outputs():
    """Opens what the process was started without, standard output or error (`>&-`), as nowhere.

    Else a checkpoint might be given the number of one of them, and what libraries print.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            with contextlib.suppress(OSError):
                os.fstat(number)
                number = os.open(os.devnull, os.O_RDWR)  # a file has that number already
            if number < 3:
                while os.open(os.devnull, os.O_RDWR) < number:
                    pass
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text


def print_line(text, file=None):
    """Prints text above any progress bar; a full disk or a closed pipe costs it, not the run."""
    file = file or sys.stdout
    with contextlib.suppress(OSError):
        tqdm.write(str(text), file=file)
        file.flush()


def _plain(value):
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    return value


_buffer = None  # (path, line) of a run that has not begun to write, see buffer_log
_prefixes = set()  # of the logs that this process writes
_unshown = None  # texts that the terminal has not got yet, likewise


def buffer_log():
    """Keeps the lines of all logs back, so that a run refused at the door leaves one line: why.

    The terminal gets them with show_log, the files with flush_log.
    """
    global _buffer, _unshown
    _buffer, _unshown = [], []


def show_log():
    """Prints what was kept back from the terminal, and from now on each line at once."""
    global _unshown
    texts, _unshown = _unshown or [], None
    for text in texts:
        print_line(text)


def is_buffered():
    """Whether the lines of logs are buffered."""
    return _buffer is not None


def flush_log():
    """Writes what was buffered, and from now on each line at once.

    Raises:
        OSError: if it can't be written.
    """
    global _buffer
    show_log()
    lines, _buffer = _buffer or [], None
    for path, line in lines:
        _append(path, line)


def print_and_log(log_prefix, text):
    """A line of a run's start from rank 0's code that has no logger: as one of utils.logger.

    log_prefix: H.logdir; where this process has no log there, it is printed alone.
    """
    if world().rank:
        return
    if log_prefix and (is_buffered() or log_prefix in _prefixes):
        log_event(log_prefix, [text], False, {})
    else:
        print_line(one_line(text))


def _append(path, line):
    """Appends a line to a text file whose last one a kill or a full disk may have cut short."""
    if _buffer is not None:
        _buffer.append((path, line))
        return
    with open(path, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else f"\n{line}"
        file.write(f"{line}\n".encode())


def log_event(log_prefix, args, pprint, figures):
    """Prints an event, then appends it to log_prefix.txt and .jsonl, as utils.logger says.

    Hyperparameters go to the files alone: the terminal has the run's summary.
    """
    _prefixes.add(log_prefix)
    event = {"time": time.ctime()}
    if args:
        event["message"] = " ".join(str(arg) for arg in args)
    event |= {key: _plain(value) for key, value in figures.items()}
    if pprint:
        event = dict(sorted(event.items()))
    text = one_line(
        ", ".join(
            f"{k}: {v:.5g}" if isinstance(v, float) else f"{k}: {v}" for k, v in event.items()
        )
    )
    if event.get("type") != "hparam" and _unshown is not None:
        _unshown.append(text)
    elif event.get("type") != "hparam":
        print_line(text)
    for path, line in ((f"{log_prefix}.jsonl", json.dumps(event)), (f"{log_prefix}.txt", text)):
        try:
            _append(path, line)
        except OSError as error:
            print_line(f"WARNING: {path} lacks this line ({error.strerror})", sys.stderr)
