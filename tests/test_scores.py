"""sample.py score: a row a picture, by the noise of an evaluation."""

import csv

import numpy as np
import pytest
import torch
from fakes import RGB_RUN, noise
from PIL import Image
from runs import Run

import scores
from batches import of_channels, preprocess
from data import load_digits
from errors import UserError
from hps import Hyperparams, get_hparams
from image_sets import channels_of
from noise import EVALUATION, image_generators, noise_of_images
from pictures import picture_of
from scores import scores_of
from vae import VAE
from weights import load_model


def table(path="scores.csv"):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def column(rows, name):
    return np.array([float(row[name]) for row in rows])


def test_a_row_a_picture_in_their_order(run, tmp_path):
    Image.fromarray(noise(1, 8)[0]).save(tmp_path / "eight.png")
    (tmp_path / "bad,\n.png").write_text("no picture")
    (tmp_path / "pngs").mkdir()
    (tmp_path / "bad,\n.png").rename(tmp_path / "pngs" / "bad,\n.png")
    with pytest.raises(UserError, match="1 of 5 images have no figures in scores.csv.*it is text"):
        run("score b.jpg pngs eight.png a.png b.jpg --n_batch 2")
    rows = table()
    assert [row["name"] for row in rows] == [
        "b.jpg", "pngs/bad,\n.png", "eight.png", "a.png", "b.jpg",
    ]  # fmt: skip
    assert list(rows[0]) == (
        "name bits_per_dim distortion rate rate_1 rate_4 rate_8 width height resized error".split()
    )
    assert rows[1]["bits_per_dim"] == rows[1]["width"] == "" and "it is text" in rows[1]["error"]
    good = [rows[i] for i in (0, 2, 3, 4)]
    assert [(r["width"], r["height"], r["resized"], r["error"]) for r in good] == [
        ("30", "20", "1", ""), ("8", "8", "0", ""), ("30", "20", "1", ""), ("30", "20", "1", ""),
    ]  # fmt: skip
    bits, distortion, rate = (column(good, k) for k in ("bits_per_dim", "distortion", "rate"))
    assert bits * np.log(2) == pytest.approx(distortion + rate)
    parts = [column(good, f"rate_{r}") for r in (1, 4, 8)]
    assert sum(parts) == pytest.approx(rate) and all(part.min() > 0 for part in parts)
    assert bits[0] == pytest.approx(bits[3], rel=0.2) and bits[0] != bits[3]  # another noise
    run("score b.jpg --out one.csv")
    assert column(table("one.csv"), "bits_per_dim") == pytest.approx(bits[:1])
    run("score b.jpg --out seed.csv --seed 3 --iw_samples 4")
    [row] = table("seed.csv")
    assert float(row["bits_per_dim"]) != bits[0]
    assert list(row)[7] == "iw_bits_per_dim"
    assert float(row["iw_bits_per_dim"]) != float(row["bits_per_dim"])
    run("score b.jpg --out iw1.csv --iw_samples 1")
    [row] = table("iw1.csv")
    assert float(row["iw_bits_per_dim"]) == pytest.approx(float(row["bits_per_dim"]))


def test_rows_are_written_as_they_are_computed(run, tmp_path, monkeypatch):
    lines, rows_of = [], scores.rows_of

    def looking(*args):
        lines.append(len((tmp_path / "scores.csv.partial").read_text().splitlines()))
        return rows_of(*args)

    monkeypatch.setattr(scores, "rows_of", looking)
    run("score a.png b.jpg a.png --n_batch 1")
    assert lines[1:] == [2, 3] and len(table()) == 3  # the first of them names the columns


def test_over_a_test_set_the_mean_is_that_of_an_evaluation(run, tmp_path):
    _, _, test = load_digits(Hyperparams(image_channels=1))
    (tmp_path / "test").mkdir()
    for i in range(len(test)):
        picture_of(test[i][0].numpy()).save(tmp_path / "test" / f"{i:03}.png")
    torch.manual_seed(0)
    torch.save(VAE(get_hparams("digits")).state_dict(), tmp_path / "initial.th")
    run("score test --n_batch 50 --iw_samples 2", "initial.th")
    argv = ["--hps", "digits", "--device", "cpu", "--test_eval", "--iw_samples", 2]
    argv += ["--label", "none"]
    argv += ["--restore_ema_path", tmp_path / "initial.th", "--save_dir", tmp_path / "runs"]
    status, text = Run(argv, tmp_path / "out").wait()
    assert status == 0, text
    line = next(line for line in text.splitlines() if "type: test_loss" in line)
    said = dict(part.split(": ", 1) for part in line.split(", ") if ": " in part)
    for name in ("bits_per_dim", "distortion", "rate", "iw_bits_per_dim"):
        assert column(table(), name).mean() == pytest.approx(float(said[name]), rel=1e-4), line


def test_scores_under_labels(run, tmp_path):
    run("score a.png b.jpg a.png --from_label 3,8 --out l.csv")
    rows = table("l.csv")
    assert [row["label"] for row in rows] == ["3", "8", "3"]
    (tmp_path / "bad.png").write_text("no picture")
    with pytest.raises(UserError, match="1 of 3 images have no figures"):
        run("score bad.png a.png b.jpg --from_label 3,8 --out b.csv")
    assert [row["label"] for row in table("b.csv")] == ["", "8", "3"]
    run("score a.png b.jpg --out n.csv")
    assert "label" not in table("n.csv")[0]
    assert abs(column(rows, "rate")[0] - column(table("n.csv"), "rate")[0]) > 1e-6


@pytest.mark.parametrize("weights, layers", [("ema.th", 7), (RGB_RUN / "latest-model-ema.th", 2)])
def test_figures_of_arrays(folder, weights, layers):
    model = load_model(folder / weights, device="cpu")
    images = of_channels(noise(5, 8), channels_of(model.H))
    figures = scores_of(model, images, range(5))
    assert figures["rates"].shape == (layers, 5)
    # Those of the model itself under that noise, per level of a pixel.
    with noise_of_images(image_generators(range(5), 0, EVALUATION)):
        stats = model(*preprocess(images, model.H), per_image=True)
    for name in ("distortion", "rate"):
        assert np.allclose(figures[name], stats[name], rtol=1e-4)
    last = scores_of(model, images[3:], range(3, 5))
    assert np.allclose(last["bits_per_dim"], figures["bits_per_dim"][3:], rtol=1e-4)


def test_nothing_is_replaced(run, tmp_path):
    (tmp_path / "scores.csv").write_text("mine")
    for line, words in (
        ("score a.png", "scores.csv exists already.*--force"),
        ("score a.png --out s.txt", "scores go to NAME.csv"),
    ):
        with pytest.raises(UserError, match=words):
            run(line)
    assert (tmp_path / "scores.csv").read_text() == "mine"
    run("score a.png --force")
    assert len(table()) == 1
