"""What stands where in the pictures: grids of images, bars of rates."""

import itertools

import matplotlib.figure
import numpy as np
import pytest
from PIL import ImageFont

from pictures import _wrapped, draw_rates, labelled_grid

COLORS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8)


def test_images_and_words_have_their_places():
    images = np.broadcast_to(COLORS[:, None, None], (3, 8, 8, 3))
    pixels = np.asarray(
        labelled_grid([images, images[1:]], ["one", "two"], ["a", "b", "c"], "title")
    )
    left, top = pixels.shape[1] - 3 * 132, pixels.shape[0] - 2 * 132
    for row, colors in enumerate((COLORS, COLORS[1:])):
        for column, color in enumerate(colors):
            y, x = top + row * 132, left + column * 132
            assert (pixels[y : y + 128, x : x + 128] == color).all()
    assert (pixels[top + 132 :, left + 2 * 132 :] == 255).all()  # the second row is shorter

    def dark(y, x):
        return (pixels[y, x] < 128).any()

    assert dark(slice(0, top // 2), slice(None))  # the title
    for i in range(3):
        assert dark(slice(top // 2, top), slice(left + i * 132, left + i * 132 + 128))
    for i in range(2):
        assert dark(slice(top + i * 132, top + i * 132 + 128), slice(0, left))


@pytest.mark.parametrize("size, n, cell", [(8, 12, 128), (8, 13, 64), (48, 2, 144), (200, 2, 200)])
def test_images_are_enlarged_by_a_whole_number(size, n, cell):
    grid = labelled_grid([np.zeros((n, size, size, 3), np.uint8)], ["x"])
    gap = max(4, cell // 32)
    black = (np.asarray(grid)[-gap - cell : -gap] == 0).all(axis=(0, 2)).sum()
    assert black == n * cell


def test_names_are_wrapped_and_at_last_shortened():
    font = ImageFont.load_default(13)
    for name in ("a.png", "IMG_20240131_123456.png", "x" * 60 + "middle" + "y" * 60):
        lines = _wrapped(name, font, 64).split("\n")
        assert len(lines) <= 3 and max(map(font.getlength, lines)) <= 64
        text = "".join(lines)
        start, _, end = text.partition("…")
        assert (text == name) == (len(name) < 30)
        assert name.startswith(start) and name.endswith(end) and len(text) > min(4, len(name) - 1)


def test_bars_are_bits_by_layer_and_resolution(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda self, *args, **kwargs: drawn.append(self)
    )
    draw_rates(tmp_path / "r.png", [1, 4, 4], np.log(2) * np.array([0.5, 0.25, 0.125]), "title")
    layers, sums = drawn[0].axes
    assert [bar.get_height() for bar in layers.patches] == pytest.approx([0.5, 0.25, 0.125])
    assert [bar.get_center()[0] for bar in layers.patches] == pytest.approx([0, 1, 2])
    assert [bar.get_width() for bar in sums.patches] == pytest.approx([0.5, 0.375])
    assert [t.get_text() for t in sums.get_yticklabels()] == ["1x1, 1 layer", "4x4, 2 layers"]
    assert "0.375 (43%)" in sums.texts[1].get_text() and "total 0.875" in sums.get_title()


def test_small_rates_are_legible_too(monkeypatch, tmp_path):
    """Those of a run's first evaluation: figures are not all zeros, ticks stand apart."""
    drawn, save = [], matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure,
        "savefig",
        lambda self, *args, **kwargs: drawn.append(self) or save(self, *args, **kwargs),
    )
    for scale in (1, 1e-3, 1e-6):
        draw_rates(tmp_path / "r.png", [1, 4, 8], scale * np.array([0.01, 0.1, 0.55]), "title")
        sums = drawn[-1].axes[1]
        assert float(sums.texts[0].get_text().split()[0]) == pytest.approx(
            scale * 0.01 / np.log(2), rel=0.01
        )
        low, high = sums.get_xlim()
        ticks = [t for t in sums.get_xticklabels() if low <= t.get_position()[0] <= high]
        boxes = [tick.get_window_extent() for tick in ticks]
        assert len(boxes) > 1 and all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes))
        assert all(t.get_window_extent().x1 < drawn[-1].bbox.x1 for t in sums.texts)
