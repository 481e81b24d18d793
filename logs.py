"""The lines of a run's log: printed, written to files, buffered until the run begins."""

import contextlib
import json
import os
import sys
import time

import numpy as np
from tqdm import tqdm


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


def buffer_log():
    """Keeps the lines of all logs back, so that a run refused at the door leaves none."""
    global _buffer
    _buffer = []


def is_buffered():
    """Whether the lines of logs are buffered."""
    return _buffer is not None


def flush_log():
    """Writes what was buffered, and from now on each line at once.

    Raises:
        OSError: if it can't be written.
    """
    global _buffer
    lines, _buffer = _buffer or [], None
    for path, line in lines:
        _append(path, line)


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
    event = {"time": time.ctime()}
    if args:
        event["message"] = " ".join(str(arg) for arg in args)
    event |= {key: _plain(value) for key, value in figures.items()}
    if pprint:
        event = dict(sorted(event.items()))
    text = ", ".join(
        f"{k}: {v:.5g}" if isinstance(v, float) else f"{k}: {v}" for k, v in event.items()
    )
    if event.get("type") != "hparam":
        print_line(text)
    for path, line in ((f"{log_prefix}.jsonl", json.dumps(event)), (f"{log_prefix}.txt", text)):
        try:
            _append(path, line)
        except OSError as error:
            print_line(f"WARNING: {path} lacks this line ({error.strerror})", sys.stderr)
