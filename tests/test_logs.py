"""The lines of a log: what stands in them, where they go when a file is cut short, lost or full."""

import json
import os
import signal

import numpy as np
import pytest
from runs import SAVING, Run, Signal, figures, hashes

from logs import print_and_log
from utils import logger


def test_log_lines(tmp_path, capsys):
    log = logger(str(tmp_path / "log"))
    log("two", "words")
    log(type="train_loss", step=np.int64(3), elbo=float("nan"), pprint=True)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    text = (tmp_path / "log.txt").read_text().splitlines()
    assert len(lines) == len(text) == 2 and '"message": "two words"' in lines[0]
    assert all(line.startswith('{"time": ') for line in lines[:1]) and '"step": 3' in lines[1]
    assert text[0].startswith("time: ") and capsys.readouterr().out.splitlines() == text


def test_a_line_without_a_logger_is_in_the_log_of_this_process_alone(tmp_path, capsys):
    prefix, lines = str(tmp_path / "log"), tmp_path / "log.jsonl"
    lines.write_text("")  # another process's run
    print_and_log(prefix, "one")
    assert lines.read_text() == "" and capsys.readouterr().out == "one\n"
    logger(prefix)("begun")
    print_and_log(prefix, "two")
    assert json.loads(lines.read_text().splitlines()[1])["message"] == "two"
    assert capsys.readouterr().out.endswith("message: two\n")


RUN = [*SAVING, "--num_epochs", "2"]


@pytest.fixture(scope="module")
def whole(finished):
    """The folder of a run without a break."""
    return finished(RUN)


def test_a_run_whose_output_can_not_be_written_goes_on(whole, tmp_path):
    """As where stdout and stderr are files on a full disk."""
    run = Run([*RUN, "--save_dir", tmp_path], "/dev/full")
    run.process.join(600)
    assert run.process.exitcode == 0
    assert hashes(tmp_path / "test") == hashes(whole)
    assert figures(tmp_path / "test") == figures(whole)


def test_a_log_cut_short_or_lost(whole, tmp_path):
    options = [*RUN, "--save_dir", tmp_path]
    folder = tmp_path / "test"
    for mend in ("cut", "lost"):
        run = Run(
            options, tmp_path / "o", Signal(signal.SIGTERM, "step", 9 if mend == "cut" else 3)
        )
        assert run.wait()[0] == 143
        if mend == "cut":
            for name in ("log.jsonl", "log.txt"):
                with open(folder / name, "r+b") as file:
                    file.truncate(os.path.getsize(folder / name) - 9)
        else:
            (folder / "log.jsonl").unlink()
    assert Run(options, tmp_path / "o").wait()[0] == 0
    assert hashes(folder) == hashes(whole)
    assert all(figures(whole)[key] == line for key, line in figures(folder).items())
    logger(str(tmp_path / "log"))("one")
    for name in ("log.jsonl", "log.txt"):
        with open(tmp_path / name, "r+b") as file:
            file.truncate(os.path.getsize(tmp_path / name) - 4)
    logger(str(tmp_path / "log"))("two")
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert len(lines) == 2 and json.loads(lines[1])["message"] == "two"
