"""The best evaluation's EMA beside the latest files, and --patience."""

import json
import signal

import numpy as np
import pytest
import torch
from runs import SMALL, Run, Signal, check_latest, events, hashes

from presets import get_hparams
from resuming import Progress
from weights import load_model

# Its bits/dim first falls, then at this learning rate jumps about.
ROUGH = [*SMALL, "--lr", "0.13", "--ema_rate", "0.1", "--warmup_iters", "3", "--num_epochs", "10"]


def evaluations(folder):
    return {e["step"]: e["elbo"] for e in events(folder) if e.get("type") == "eval_loss"}


def best(folder):
    state = json.loads((folder / "best-state.json").read_text())
    return state["best"], (folder / "best-model-ema.th").read_bytes()


@pytest.fixture(scope="module")
def rough(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rough")
    argv = [*ROUGH, "--save_dir", folder, "--iters_per_ckpt", "13"]
    assert Run(argv, folder / "out").wait()[0] == 0
    return folder / "test"


def test_the_best_is_that_of_the_lowest_elbo(rough):
    found = evaluations(rough)
    step = min(found, key=found.get)
    assert step != max(found)  # else it would be the latest
    assert best(rough)[0] == {"elbo": found[step], "step": step}
    assert best(rough)[1] == (rough / f"iter-{step}-model-ema.th").read_bytes()
    assert sorted(p.name for p in rough.glob("best-*")) == ["best-model-ema.th", "best-state.json"]
    assert load_model(rough / "best-model-ema.th", device="cpu").H.dataset == "digits"


def test_patience_ends_the_run_and_is_remembered(rough, tmp_path):
    found = list(evaluations(rough).values())
    stale = 0
    for count, elbo in enumerate(found, 1):
        stale = 0 if elbo < min(found[: count - 1], default=9) else stale + 1
        if stale == 2:
            break
    assert stale == 2 and count < len(found)
    argv = [*ROUGH, "--save_dir", tmp_path, "--patience", "2", "--resume"]
    # A break in the evaluation that would have ended it, before it is counted.
    wrap = Signal(signal.SIGTERM, "eval", 2 * count)
    assert Run(argv, tmp_path / "o", wrap).wait()[0] == 143
    status, text = Run(argv, tmp_path / "o").wait()
    assert status == 0 and "--patience 2: 2 evaluations brought nothing below" in text
    assert check_latest(tmp_path / "test") == 13 * count
    assert hashes(tmp_path / "test") == hashes(rough, f"iter-{13 * count}")
    status, text = Run(argv, tmp_path / "o").wait()
    assert status == 0 and "nothing left to do: --patience 2" in text
    assert check_latest(tmp_path / "test") == 13 * count
    status, text = Run([*argv, "--patience", "99"], tmp_path / "o").wait()
    assert status == 0 and hashes(tmp_path / "test") == hashes(rough)
    assert best(tmp_path / "test") == best(rough)  # kept over the breaks


def test_resume_never_goes_on_from_the_best(rough, tmp_path):
    """Killed between its first evaluation and its first save, a folder holds the best alone."""
    argv = [*SMALL, "--save_dir", tmp_path, "--resume"]
    wrap = Signal(signal.SIGKILL, "step", 15)
    assert Run(argv, tmp_path / "o", wrap).wait()[0] == -9
    assert best(tmp_path / "test")[0]["step"] == 13 and not check_latest(tmp_path / "test")
    status, text = Run(argv, tmp_path / "o").wait()
    assert status == 0 and "nothing to resume" in text and check_latest(tmp_path / "test") == 39


def test_progress_counts_evaluations(tmp_path):
    H = get_hparams("digits", save_dir=str(tmp_path))
    at = Progress(H, 5, 0, lowest=2.0)
    for step, elbo, stale in ((6, 2.5, 1), (7, np.nan, 2), (8, 1.5, 0), (9, 1.5, 1)):
        at.step = step
        at.judge(elbo)
        assert at.stale == stale
    assert at.best == {"elbo": 1.5, "step": 8}
    H.resumed = json.loads(json.dumps(at.record()))
    again = Progress(H, 9, 0)
    assert (again.best, again.stale) == (at.best, 1)
    assert Progress(get_hparams("digits"), 0, 0).record()["best"] is None  # no Infinity in JSON


def test_a_run_that_went_back_does_not_spoil_a_better_file(tmp_path):
    """On a GPU the steps between the last save and a kill are not repeated bit for bit."""
    H = get_hparams("digits", save_dir=str(tmp_path))
    H.resumed = {"best": {"elbo": 3.0, "step": 1}}
    (tmp_path / "best-state.json").write_text('{"best": {"elbo": 2.5, "step": 9}}')
    assert Progress(H, 5, 0).saved_best == 2.5
    assert Progress(get_hparams("digits", save_dir=str(tmp_path)), 5, 0).saved_best > 1e9
    starts_anew = get_hparams("digits", save_dir=str(tmp_path), resume=True)  # its others deleted
    assert Progress(starts_anew, 0, 0).saved_best == 2.5
    assert torch.isfinite(torch.tensor(Progress(H, 5, 0).best["elbo"]))
