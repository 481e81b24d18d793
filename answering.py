"""How the page's requests are answered: values checked, passes watched, one after another.

Gradio's own checks of values are off: those here stand before every function, say what a value must
be in a sentence, and touch no file but an upload.
"""

import asyncio
import contextlib
import contextvars
import math
import os
import time
from functools import partial
from pathlib import Path

import torch

from errors import UserError
from watching import Stopped, Watch, watching

LARGEST = 20 * 2**20  # bytes of an upload

# ---- values --------------------------------------------------------------------------------


def _number(value):
    """A JSON number as int or float, NaN for what is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    return value


def whole(what, low, high):
    """A check: a whole number from low to high."""

    def check(value):
        number = _number(value)
        if not (low <= number <= high and number == int(number)):
            raise UserError(
                f"{what} is {_shown(value)}: it must be a whole number from {low:,} to {high:,}."
            )
        return int(number)

    return check


def real(what, low, high):
    """A check: a number from low to high."""

    def check(value):
        number = _number(value)
        if not low <= number <= high:
            raise UserError(
                f"{what} is {_shown(value)}: it must be a number from {low:g} to {high:g}."
            )
        return float(number)

    return check


def choice(what, values):
    """A check: one of the values, a dict of what the page shows → what is meant."""

    def check(value):
        if not isinstance(value, str | int) or value not in values:
            shown = ", ".join(map(str, values))
            raise UserError(f"{what} is {_shown(value)}: it must be one of {shown}.")
        return values[value]

    return check


def yes_or_no(what):
    """A check: true or false."""

    def check(value):
        if not isinstance(value, bool):
            raise UserError(f"{what} is {_shown(value)}: it must be true or false.")
        return value

    return check


def upload(what, folder):
    """A check: an upload, as Gradio describes it, which lies in the folder → its bytes."""
    folder = os.path.realpath(folder)

    def check(value):
        if value is None:
            raise UserError(f"{what} is missing: choose one first.")
        path = value.get("path") if isinstance(value, dict) else None
        if not isinstance(path, str) or not is_within(path, folder):
            raise UserError(f"{what} is no upload of this page: choose a picture's file.")
        try:
            if os.path.getsize(path) > LARGEST:
                raise UserError(f"{what} is larger than {LARGEST >> 20} MB: choose a smaller file.")
            data = Path(path).read_bytes()
            os.utime(path)  # for forget_oldest: it is in use
            return data
        except OSError:
            raise UserError(f"{what} is no longer here: choose it once more.") from None

    return check


def is_within(path, folder):
    """Whether a path is that of something below a folder, given by its real path, links followed.

    A path of a server's own is not told from one that does not exist.
    """
    try:
        return os.path.realpath(path).startswith(folder + os.sep)
    except (OSError, ValueError):  # such as one with a zero byte
        return False


def _shown(value):
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


# ---- files ---------------------------------------------------------------------------------


def forget_oldest(folder, n_files=4000, n_bytes=2**30, age=60):
    """Deletes of more files, or bytes, below a folder than these those longest out of use.

    An upload is in use whenever an answer reads it.

    Args:
        age: seconds in which a file stays whatever there is, for it may just be sent.
    """
    found, now = [], time.time()
    for place, _, names in os.walk(folder):
        for path in (os.path.join(place, name) for name in names):
            with contextlib.suppress(OSError):  # gone meanwhile
                status = os.lstat(path)
                found.append((status.st_ctime, status.st_size, path))
    for i, (when, size, path) in enumerate(sorted(found, reverse=True)):
        n_bytes -= size
        if now - when > age and (i >= n_files or n_bytes < 0):
            with contextlib.suppress(OSError):
                os.remove(path)
                os.rmdir(os.path.dirname(path))  # each has a folder of its own


# ---- answers -------------------------------------------------------------------------------


class Answers:
    """The requests in work, by visitor: at most one has its turn, any can be stopped."""

    def __init__(self):
        self._in_work = {}  # a visitor's session → the Watch of each of its requests

    def to(self, function, checks, n_layers=None):
        """function(**values) as what Gradio calls with {component: value} and awaits.

        It runs in a thread, so that the page goes on being served. What Gradio cancels stops before
        the next layer, and only then the next request has its turn.

        Args:
            checks: {name: (component, check)}.
            n_layers: values → how many layers the function passes through, of which the page
                shows how many are done.
        """
        import gradio  # slow to import, and not there where no page is made

        async def answer(given: dict, request: gradio.Request, progress=gradio.Progress()):  # noqa: B008  Gradio's way
            try:
                values = {name: check(given[part]) for name, (part, check) in checks.items()}
                total = n_layers(values) if n_layers else None
                tell = total and (lambda done: progress((done, total), unit="layers"))
                watch = Watch(tell)
                mine = self._in_work.setdefault(request.session_hash, set())
                mine.add(watch)
                try:
                    return await _in_a_thread(partial(function, **values), watch)
                finally:
                    mine.discard(watch)
            except UserError as error:
                raise gradio.Error(str(error), duration=None, print_exception=False) from None
            except Stopped:
                raise gradio.Error("stopped", print_exception=False) from None

        return answer

    def stop(self, session):
        """Stops what a visitor has in work, such as one who has closed the page."""
        for watch in self._in_work.pop(session, ()):
            watch.stop()


async def _in_a_thread(function, watch):
    """What function returns, its passes watched; cancelled, it ends before its next layer."""

    def run():
        with watching(watch), torch.inference_mode():
            return function()

    context = contextvars.copy_context()  # in which Gradio finds whose progress it is
    future = asyncio.get_running_loop().run_in_executor(None, context.run, run)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        watch.stop()
        await asyncio.gather(future, return_exceptions=True)
        raise
