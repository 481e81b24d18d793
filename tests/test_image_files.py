"""Pictures cut and enlarged, .npy files read image by image, and refused."""

import io
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from fakes import Hostile, assert_refused, noise, run_H, sparse_npy
from PIL import Image

from data import set_up_data
from image_files import NpyImages, read_image, read_images


def test_pictures_are_their_middle_square(tmp_path):
    """Of the model's own size it stays as it is; a smaller one is enlarged."""
    pixels = np.random.RandomState(0).randint(0, 256, (8, 8, 3), dtype=np.uint8)
    wide = np.concatenate([np.zeros_like(pixels), pixels, np.zeros_like(pixels)], axis=1)
    for name, image in (("own", pixels), ("wide", wide), ("tall", wide.swapaxes(0, 1))):
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    own, wide, tall = read_images([tmp_path / f"{n}.png" for n in ("own", "wide", "tall")], 8)
    assert np.array_equal(own, pixels) and np.array_equal(wide, pixels)
    assert np.array_equal(tall, pixels.swapaxes(0, 1))
    assert read_image(tmp_path / "own.png", 20).shape == (20, 20, 3)


def npy_bytes(n, size):
    np.save(data := io.BytesIO(), noise(n, size))
    return data.getvalue()


BAD_NPY = {
    "order": (lambda path: np.save(path, np.asfortranarray(noise(9, 8))), "(9, 8, 8, 3) (Fortran)"),
    "type": (lambda path: np.save(path, np.zeros((2, 8), np.float32)), "holds float32 (2, 8), not"),
    "short": (lambda path: (np.save(path, noise(9, 8)), os.truncate(path, 500)), "500 bytes"),
    "long": (lambda path: path.write_bytes(npy_bytes(9, 8) * 2), "1,856 bytes follow"),
    "page": (lambda path: path.write_bytes(b"<html>sign in</html>"), "magic string"),
    "empty": (lambda path: path.touch(), "0 bytes"),
    "archive": (lambda path: np.savez(open(path, "wb"), noise(2, 8)), "magic string"),
    "objects": (lambda path: np.save(path, np.array([Hostile("ran")])), "no complete .npy"),
    "folder": (lambda path: path.mkdir(), "Is a directory"),
}


@pytest.mark.parametrize("case", BAD_NPY)
def test_a_bad_npy_file_is_refused(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    write, message = BAD_NPY[case]
    path = tmp_path / "ffhq-256.npy"
    write(path)
    found, expected = (path, message), "uint8 (70000, 256, 256, 3)"
    assert_refused(lambda: set_up_data(run_H(tmp_path, "ffhq_256")), *found, expected)
    assert not Path("ran").exists()


def test_an_npy_file_is_pickled_as_its_path(tmp_path):
    sparse_npy(tmp_path / "big.npy", (100_000, 64, 64, 3), {77_777: noise(1, 64)[0]})
    images = NpyImages(tmp_path / "big.npy")
    data = pickle.dumps(images)
    assert len(data) < 1000
    assert np.array_equal(pickle.loads(data)[[77_777]], noise(1, 64))
