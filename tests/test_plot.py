"""plot.py on logs of ours, of the original code, and on what is no log."""

import json
import subprocess
import sys
import time

import imageio.v3 as imageio
import matplotlib.figure
import matplotlib.text
import numpy as np
import pytest
from runs import ROOT, environment

import plot
from errors import UserError
from pictures import draw_curves


def write_log(path, events, start=1.8e9):
    with open(path, "w") as file:
        for i, event in enumerate(events):
            print(json.dumps({"time": time.ctime(start + 60 * i), **event}), file=file)


def steps(numbers, elbo=2.0, **more):
    """train_loss lines as the original code writes them, an eval_loss after the last."""
    base = {"type": "train_loss", "elbo": elbo, "elbo_filtered": elbo, "grad_norm": 3.0,
            "skipped_updates": 5.0}  # fmt: skip
    lines = [base | {"step": step} | more for step in numbers]
    return [*lines, {"type": "eval_loss", "elbo": 1.5, "filtered_elbo": 1.5, "step": numbers[-1]}]


def test_command(tmp_path):
    (tmp_path / "a").mkdir()
    write_log(tmp_path / "a" / "log.jsonl", steps(range(100, 2000, 100), skip_rate=0.05))
    write_log(tmp_path / "b.jsonl", steps(range(100, 1500, 100), elbo=2.5))
    argv = [sys.executable, ROOT / "plot.py", "a", "b.jsonl", "--out", "c"]  # .png is added
    done = subprocess.run(argv, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout == "c.png: a, b.jsonl\n"
    picture = imageio.imread(tmp_path / "c.png")[..., :3]
    assert picture.shape == (880, 1320, 3)
    for color in ((31, 119, 180), (255, 127, 14)):  # the first two of matplotlib: both runs
        assert (abs(picture.astype(int) - color).max(axis=-1) < 3).sum() > 50


def test_what_is_read(tmp_path):
    hparam = {"type": "hparam", "key": "iters_per_print", "value": 100}
    write_log(tmp_path / "log", [hparam, *steps([10, 500]), {"message": "words"}])
    train, evals = plot.read_log(tmp_path / "log")
    assert train["step"].tolist() == [10, 500] and evals["step"].tolist() == [500]
    assert train["skip_rate"].tolist() == [5 / 10, 5 / 100]  # a window of 100 steps at most
    assert train["bits"] == pytest.approx(2.0 / np.log(2))
    assert evals["hours"].tolist() == [3 / 60]


def test_a_mean_that_is_infinite_is_drawn_without_what_was(tmp_path):
    """elbo counts infinite losses, elbo_filtered and filtered_elbo don't."""
    write_log(tmp_path / "log", [{**e, "elbo": np.inf} for e in steps([10, 20])])
    train, evals = plot.read_log(tmp_path / "log")
    assert train["bits"] == pytest.approx(2.0 / np.log(2))
    assert evals["bits"] == pytest.approx(1.5 / np.log(2))


def test_steps_that_a_restored_run_took_again_are_drawn_once(tmp_path):
    write_log(tmp_path / "log", [*steps([10, 20, 30], elbo=9.0), *steps([20, 30, 40])])
    train, evals = plot.read_log(tmp_path / "log")
    assert train["step"].tolist() == [10, 20, 30, 40] and evals["step"].tolist() == [40]
    assert train["bits"][1:] == pytest.approx(2.0 / np.log(2))


def test_lines_that_a_kill_cut_short_are_passed_over(tmp_path):
    """One in the middle, after which the run went on, and the last."""
    write_log(tmp_path / "log", steps([10, 20, 30]))
    first, second, *rest = (tmp_path / "log").read_text().splitlines(keepends=True)
    (tmp_path / "log").write_text("".join([first, second[:50], "\n", *rest])[:-20])
    train, evals = plot.read_log(tmp_path / "log")
    assert train["step"].tolist() == [10, 30] and not len(evals["step"])
    plot.draw_curves(tmp_path / "c.png", {"a": (train, evals)})


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "can't be read"),
        ("no json", "no train_loss"),
        ('{"message": "no time"}', "no log.jsonl"),
        (json.dumps({"time": "Tue Nov 24 20:39:12 2026", "message": "a"}), "has logged a step"),
    ],
)
def test_errors(tmp_path, content, words):
    path = tmp_path / "log"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=words) as error:
        plot.read_log(path)
    assert "\n" not in str(error.value)


def test_whether_labels_were_told_is_said(tmp_path, monkeypatch):
    events = steps([10, 20])
    write_log(tmp_path / "log", [*events[:-1], events[-1] | {"labels": "given"}])
    train, evals = plot.read_log(tmp_path / "log")
    assert evals["labels"] == "given"
    written, text = [], matplotlib.text.Text.set_text
    monkeypatch.setattr(
        matplotlib.text.Text, "set_text", lambda self, s: written.append(s) or text(self, s)
    )
    draw_curves(tmp_path / "c.png", {"run": (train, evals)})
    assert "run (labels: given)" in written


@pytest.mark.parametrize("highest", [3.5, 2e4])
def test_ticks_of_gradient_norms_are_numbers(highest, tmp_path, monkeypatch):
    """Of a fraction of a decade, of several."""
    numbers = [3.0, highest]
    events = [e | {"grad_norm": n} for e, n in zip(steps([10, 20]), numbers, strict=False)]
    write_log(tmp_path / "log", events)
    drawn = []
    monkeypatch.setattr(
        matplotlib.figure.Figure,
        "savefig",
        lambda self, *_, **__: (self.canvas.draw(), drawn.append(self)),
    )
    draw_curves(tmp_path / "c.png", {"run": plot.read_log(tmp_path / "log")})
    axis = drawn[0].axes[2].yaxis
    shown = [t.get_text() for t in axis.get_ticklabels() + axis.get_ticklabels(minor=True)]
    ticks = [float(text) for text in shown if text]
    assert ticks and len(set(ticks)) == len(ticks)
