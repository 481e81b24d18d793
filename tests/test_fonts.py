"""Letters of every script, in grids and in charts."""

import warnings
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from fakes import noise, parsed, tiny_network
from matplotlib.ft2font import FT2Font
from PIL import Image

import fonts
from pictures import draw_curves, draw_rates, labelled_grid
from train import write_images
from vae import VAE

STIX = str(Path(matplotlib.get_data_path(), "fonts", "ttf", "STIXGeneral.ttf"))
RARE = "\u1d8d"  # a letter of STIX that DejaVu Sans lacks; none of the others here has it


@pytest.fixture
def installed(monkeypatch):
    """STIX as the only font of the system."""
    monkeypatch.setattr("matplotlib.font_manager.findSystemFonts", lambda *a, **k: [STIX])
    for cached in (fonts._installed, fonts._helper):
        cached.cache_clear()
    yield
    for cached in (fonts._installed, fonts._helper):
        cached.cache_clear()


def ink(text, size=40):
    canvas = Image.new("L", (int(fonts.Font(size).getlength(text)) + 4, 80), 255)
    from PIL import ImageDraw

    fonts.Font(size).draw(ImageDraw.Draw(canvas), (2, 10), text)
    return np.asarray(canvas) < 128


def test_every_letter_is_of_a_font_that_has_it(installed):
    dejavu = FT2Font(fonts.base_path()).get_charmap()
    assert ord(RARE) not in dejavu
    for letter in "aäЖ€ф→…ℵ":
        assert ord(letter) in dejavu and fonts.font_of(letter) == fonts.base_path()
    assert fonts.font_of(RARE) == STIX and fonts.font_of("猫") == fonts.base_path()
    # It is drawn, where a letter that no font has is a box.
    assert ink(RARE).any() and ink(RARE).shape != ink("猫").shape
    mixed = f"a{RARE}b"
    assert fonts.Font(40).getlength(mixed) == pytest.approx(
        sum(map(fonts.Font(40).getlength, mixed)), abs=1
    )


def test_lines_stand_where_their_anchor_says():
    from PIL import ImageDraw

    font = fonts.Font(20)
    for anchor, rows, columns in (
        ("la", slice(50, None), slice(50, None)),
        ("md", slice(None, 51), slice(20, 80)),
        ("rm", slice(30, 70), slice(None, 51)),
    ):
        canvas = Image.new("L", (100, 100), 255)
        font.draw(ImageDraw.Draw(canvas), (50, 50), "Жf", anchor)
        dark = np.asarray(canvas) < 128
        assert dark[rows, columns].sum() == dark.sum() > 50, anchor


def test_charts_have_the_letters_too(installed, tmp_path):
    style = fonts.chart_style([f"a{RARE}", "Ж"])
    assert style["font.family"] == ["DejaVu Sans", "STIXGeneral"]
    steps = np.arange(3.0)
    train = {key: steps for key in ("step", "hours", "bits", "grad_norm", "skip_rate")}
    evals = {key: steps for key in ("step", "hours", "bits")}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i, name in enumerate((f"Собаки {RARE}", "猫", "$a_$ $\\frac$", "\udcff\n")):
            draw_rates(tmp_path / f"r{i}.png", [1, 4], [0.1, 0.2], name)
            draw_curves(tmp_path / f"c{i}.png", {name: (train, evals)})
    pictures = [(tmp_path / f"r{i}.png").read_bytes() for i in range(4)]
    assert len(set(pictures)) == 4
    assert matplotlib.rcParams["text.parse_math"] is True  # a program's own settings stay


# ---- the samples picture of training ---------------------------------------------------------


@pytest.mark.parametrize("size, cell", [(8, 128), (256, 256)])
def test_the_pictures_of_training_have_their_rows_named(tmp_path, monkeypatch, size, cell):
    drawn = {}

    def note(rows, labels, *args, **kwargs):
        drawn.update(rows=rows, labels=labels, **kwargs)
        return labelled_grid(rows, labels, *args, **kwargs)

    monkeypatch.setattr("train.labelled_grid", note)
    H = parsed("--hps", "digits", *tiny_network(size), "--num_variables_visualize", "2",
               "--num_temperatures_visualize", "3", "--desc", "Жук")  # fmt: skip
    H.update(image_size=size, image_channels=3, dataset="images")
    originals = torch.from_numpy(noise(2, size))
    path = tmp_path / "samples-7.png"
    lines = []
    write_images(H, VAE(H), originals, originals.float() / 255, str(path), lines.append)
    assert list(drawn["labels"]) == [
        "originals", "1 of 3 layers", "2 of 3 layers", "samples t = 1.0", "samples t = 0.9",
        "samples t = 0.8",
    ]  # fmt: skip
    assert (drawn["rows"][0] == originals.numpy()).all() and drawn["title"] == "Жук samples-7"
    picture = Image.open(path)
    assert picture.format == "PNG" and lines == [f"writing pictures to {path}"]
    gap = max(4, cell // 32)
    assert 0 < picture.height - 6 * (cell + gap) < 60
    assert 0 < picture.width - 2 * (cell + gap) < 250  # words, however large the images
    pixels = np.asarray(picture)
    top, left = picture.height - 6 * (cell + gap), picture.width - 2 * (cell + gap)
    first = pixels[top : top + cell, left : left + cell][:: cell // size, :: cell // size]
    assert (first == originals[0].numpy()).all()
