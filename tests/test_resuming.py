"""A run that is stopped, killed and taken up again is the run that never was, bit for bit."""

import json
import math
import os
import random
import signal
import time

import numpy as np
import pytest
from runs import (
    SAVING,
    Run,
    Signal,
    assert_same,
    check_latest,
    command,
    events,
    figures,
    hashes,
    start,
)

from errors import UserError
from train_helpers import restore_log

RUN = SAVING


@pytest.fixture(scope="module")
def whole(finished):
    """The folder of a run without a break."""
    return finished(RUN)


def _kill_and_resume(folder, whole, kills, rng, longest):
    """One run to its end with SIGKILL at random moments; the number of kills."""
    done = 0
    while True:
        run = Run([*RUN, "--iters_per_save", "1", "--save_dir", folder], folder / "out")
        # The first steps come after some tenths of a second; kills before them count as well.
        run.process.join(rng.uniform(0, longest) if done < kills else 120)
        if run.process.exitcode is not None:
            assert run.wait()[0] == 0, run.output.read_text()
            assert_same(folder / "test", whole)
            return done
        run.kill()
        done += 1
        check_latest(folder / "test")


@pytest.mark.parametrize("kills", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_sigkill_at_random_moments(kills, whole, tmp_path):
    rng, done, runs = random.Random(kills), 0, 0
    start = time.monotonic()
    while done < kills:
        runs += 1
        folder = tmp_path / str(runs)
        folder.mkdir()
        done += _kill_and_resume(folder, whole, kills - done, rng, longest=1.5)
    print(f"{done} kills in {runs} runs, {time.monotonic() - start:.0f} s")


def test_sigkill_of_the_command(whole, tmp_path):
    """The plain `python train.py`, killed when its log has reached a step."""
    process = command([*RUN, "--save_dir", tmp_path])
    for line in process.stdout:
        if "step: 20," in line:
            break
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert check_latest(tmp_path / "test")
    process = command([*RUN, "--save_dir", tmp_path])
    assert "resuming from" in process.communicate()[0] and process.returncode == 0
    assert_same(tmp_path / "test", whole)


def test_resume_after_skipped_steps(tmp_path):
    """The streak of skips, the window of figures and the early log lines go on too."""
    options = [*RUN, "--skip_threshold", "0.27", "--skip_streak", "4", "--iters_per_print", "30"]
    for folder, wrap in (("whole", None), ("broken", Signal(signal.SIGTERM, "step", 19))):
        status, text = Run([*options, "--save_dir", tmp_path / folder], tmp_path / "o", wrap).wait()
        assert status == (143 if wrap else 0), text
    status, text = Run([*options, "--save_dir", tmp_path / "broken"], tmp_path / "o").wait()
    assert status == 0, text
    assert_same(tmp_path / "broken" / "test", tmp_path / "whole" / "test")
    skipped = [
        json.loads(t)["skipped_updates"] for t in figures(tmp_path / "whole" / "test").values()
        if "skipped_updates" in t
    ]  # fmt: skip
    assert 0 < max(skipped) < 30


def test_max_skips_ends_every_start_until_something_changes(tmp_path):
    options = [*RUN, "--skip_threshold", "1e-9", "--max_skips", "3", "--save_dir", tmp_path]
    for step in (3, 4):
        status, text = Run(options, tmp_path / "o").wait()
        assert status == 2 and f"{step} updates in a row were skipped" in text.splitlines()[-1]
        assert check_latest(tmp_path / "test") == step


def test_resume_with_own_images_and_a_loader_worker(tmp_path):
    """In the middle of an epoch; a kill in the next one; the record of the images stays."""
    rng = np.random.RandomState(0)
    np.save(tmp_path / "own.npy", rng.randint(0, 256, (70, 8, 8, 3), dtype=np.uint8))
    options = [*RUN, "--dataset", "images", "--data_root", tmp_path / "own.npy", "--n_batch", "10",
               "--num_workers", "1", "--num_epochs", "2"]  # fmt: skip
    status, text = Run([*options, "--save_dir", tmp_path / "whole"], tmp_path / "o").wait()
    assert status == 0, text
    whole, broken = tmp_path / "whole" / "test", tmp_path / "broken" / "test"
    options += ["--save_dir", broken.parent]
    for wrap, wanted in ((Signal(signal.SIGTERM, "step", 4), 143),
                         (Signal(signal.SIGKILL, "step", 7), -9), (None, 0)):  # fmt: skip
        status, text = Run(options, tmp_path / "o", wrap).wait()
        assert status == wanted and "Traceback" not in text, text
        assert (broken / "images.json").read_bytes() == (whole / "images.json").read_bytes()
    assert f"resuming from {broken}/sets/000004-iter-10" in text
    assert hashes(broken) == hashes(whole) and figures(broken) == figures(whole)


def test_resume_with_two_processes_and_then_one(tmp_path):
    """The same bits after SIGTERM and --resume; then one process goes on, and says so."""
    options = [*RUN, "--n_batch", "50", "--num_epochs", "2"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    sigterm = Signal(signal.SIGTERM, "step", 16)
    for folder, wrap, wanted in ((whole, None, 0), (broken, sigterm, 143), (broken, None, 0)):
        folder.mkdir(exist_ok=True)
        for run in start(2, options, folder, wrap):
            status, text = run.wait()
            assert status == wanted, text
        assert check_latest(folder / "test") == (16 if wrap else 26)
    assert "resuming from" in (broken / "out0").read_text()
    assert hashes(broken / "test") == hashes(whole / "test")
    assert figures(broken / "test") == figures(whole / "test")
    more = [*options, "--save_dir", broken, "--num_epochs", "3"]
    status, text = Run(more, tmp_path / "o").wait()
    assert status == 0
    assert "WARNING: mpi_size is 1 now; the run had 2" in text and "not bit for bit" in text


def test_changed_options_are_named_and_those_of_the_network_refused(whole, tmp_path):
    os.system(f"cp -r {whole} {tmp_path}/test")
    before = (tmp_path / "test" / "log.jsonl").read_bytes()
    resume = [*RUN, "--save_dir", tmp_path]
    for option, value in (("--width", "16"), ("--dec_blocks", "1x2,8m1"), ("--zdim", "3")):
        status, text = Run([*resume, option, value], tmp_path / "o").wait()
        last = text.splitlines()[-1]
        assert status == 2 and option[2:] in last and value in last and "set it back" in last
    assert (tmp_path / "test" / "log.jsonl").read_bytes() == before
    status, text = Run([*resume, "--lr", "0.1", "--num_epochs", "4"], tmp_path / "o").wait()
    assert status == 0 and "WARNING: lr is 0.1 now; the run had 0.002" in text
    assert [e["step"] for e in events(tmp_path / "test") if e.get("type") == "eval_loss"][-1] == 52


def test_a_damaged_set_is_passed_over_with_its_reason(whole, tmp_path):
    os.system(f"cp -r {whole} {tmp_path}/test")
    folder = tmp_path / "test"
    sets = sorted((folder / "sets").glob("0*"))
    with open(folder / "latest-opt.th", "r+b") as file:
        file.truncate(1000)
    (sets[-2] / "state.json").write_text("{")
    status, text = Run([*RUN, "--save_dir", tmp_path], tmp_path / "o").wait()
    assert status == 0 and f"{sets[-1]} is damaged (opt.th is not what was written)" in text
    assert f"{sets[-2]} is damaged" in text and f"resuming from {sets[-3]}" in text
    assert_same(folder, whole)
    for path in (folder / "sets").glob("0*/model.th"):
        path.write_bytes(b"")
    status, text = Run([*RUN, "--save_dir", tmp_path], tmp_path / "o").wait()
    assert status == 2 and "no older checkpoint is whole" in text.splitlines()[-1]


def test_restore_options_and_resume_together(whole, tmp_path):
    """A first start restores what the options name; later ones go on from the run's own files."""
    start = [*RUN, "--save_dir", tmp_path, "--num_epochs", "4"]
    for option, name in (("", "model.th"), ("_ema", "model-ema.th"), ("_optimizer", "opt.th"),
                         ("_log", "log.jsonl")):  # fmt: skip
        start += [f"--restore{option}_path", whole / f"iter-20-{name}"]
    status, text = Run(start, tmp_path / "o").wait()
    assert status == 0 and "continuing from step 20, epoch 1" in text
    first = next(e for e in events(tmp_path / "test") if e.get("type") == "train_loss")
    assert first["step"] == 21 and first["lr"] == 2e-3  # no second warm-up
    status, text = Run(start, tmp_path / "o").wait()
    assert status == 0 and "nothing left to do" in text and "continuing" not in text


def test_step_and_epoch_come_from_the_log(tmp_path):
    path = tmp_path / "log.jsonl"
    lines = [
        {"type": "hparam", "key": "step", "value": 9},
        {"type": "train_loss", "step": 1000, "epoch": 3},
        {"type": "eval_loss", "step": 1000, "epoch": 3, "elbo": 2.5},
        {"message": "plain"},
        {"type": "train_loss", "step": 2000, "epoch": 6},
        {"type": "eval_loss", "step": 2000, "epoch": 6, "elbo": 2.6},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert restore_log(str(path), 0, 1) == (2.5, 2000, 6)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines[1:2]))
    assert restore_log(str(path), 0, 1) == (math.inf, 1000, 3)
    for text in ("", "{}\n", "no json\n", '{"type": "train_loss"}\n', "[1]\n"):
        path.write_text(text)
        with pytest.raises(UserError, match="no log.jsonl"):
            restore_log(str(path), 0, 1)
    with pytest.raises(UserError, match="can't be read"):
        restore_log(str(tmp_path / "absent"), 0, 1)
