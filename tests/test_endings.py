"""Signals end a run: after the step, with all saved; the second at once."""

import itertools
import os
import signal
import time

import pytest
from runs import SAVING, Run, Signal, assert_same, check_latest

RUN = SAVING


@pytest.fixture(scope="module")
def whole(finished):
    """The folder of a run without a break."""
    return finished(RUN)


@pytest.mark.parametrize(
    "number, where, n, saved_at", [(signal.SIGTERM, "step", 18, 18), (signal.SIGINT, "eval", 2, 13)]
)
def test_a_signal_saves_and_ends(number, where, n, saved_at, whole, tmp_path):
    options = [*RUN, "--save_dir", tmp_path]
    status, text = Run(options, tmp_path / "out", Signal(number, where, n)).wait()
    assert status == 128 + number and text.splitlines()[-1].startswith("stopped")
    assert number.name in text and "Traceback" not in text
    assert check_latest(tmp_path / "test") == saved_at
    status, text = Run(options, tmp_path / "out").wait()
    assert status == 0 and "resuming from" in text
    assert_same(tmp_path / "test", whole)


def test_a_second_interrupt_ends_at_once(tmp_path):
    """Unless it comes within two seconds, when it is a launcher's copy of the first."""
    status, _ = Run([*RUN, "--save_dir", tmp_path], tmp_path / "o", _signals_in_a_long_step).wait()
    assert status == 130
    assert check_latest(tmp_path / "test") == 4


def _signals_in_a_long_step():
    import train

    original, calls = train.training_step, itertools.count(1)

    def wrapped(*args):
        if next(calls) == 6:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(2.1)
            os.kill(os.getpid(), signal.SIGINT)
        return original(*args)

    train.training_step = wrapped
