"""Where images go: an .npz, a folder, a grid; after a break, beside other programs' files."""

import fcntl
import json
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from fakes import arr_0, nearly_equal
from PIL import Image
from runs import ROOT, environment

import sample
from errors import UserError
from hps import get_hparams
from vae import VAE


def test_folder_of_pngs(run, tmp_path):
    run("samples --n 5 --out a.npz")
    run("samples --n 3 --out pngs --n_batch 2")
    assert sorted(p.name for p in (tmp_path / "pngs").iterdir()) == [
        "000000.png", "000001.png", "000002.png", "settings.json",
    ]  # fmt: skip
    run("samples --n 5 --out pngs --n_batch 2")  # more of them
    pngs = np.stack([np.asarray(Image.open(f"pngs/{i:06}.png")) for i in range(5)])[..., None]
    assert nearly_equal(pngs, arr_0("a.npz"))
    (tmp_path / "pngs" / "000001.png.partial").touch()  # of a kill
    run("samples --n 2 --out pngs --n_batch 2")  # fewer
    assert sorted(p.name for p in (tmp_path / "pngs").iterdir()) == [
        "000000.png", "000001.png", "settings.json",
    ]  # fmt: skip
    with pytest.raises(UserError, match="seed 0, not 1"):
        run("samples --n 5 --out pngs --seed 1")
    torch.save(VAE(get_hparams("digits")).state_dict(), tmp_path / "other.th")
    with pytest.raises(UserError, match="made with weights [0-9a-f]{64}, not [0-9a-f]{64}"):
        run("samples --n 5 --out pngs", weights="other.th")
    run("samples --n 5 --out pngs --seed 1 --force")
    assert np.asarray(Image.open("pngs/000000.png")).tolist() != pngs[0].tolist()


def test_force_removes_nothing_of_others(run, tmp_path):
    """A settings.json may be another program's, and other files may lie beside our own."""
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "settings.json").write_text("{}")
    with pytest.raises(UserError, match="holds other files"):
        run("samples --n 1 --out project --force")
    assert (tmp_path / "project" / "settings.json").read_text() == "{}"
    run("samples --n 2 --out pngs")
    (tmp_path / "pngs" / "notes.txt").write_text("mine")
    run("samples --n 1 --out pngs --seed 1 --force")
    assert sorted(p.name for p in (tmp_path / "pngs").iterdir()) == [
        "000000.png", "notes.txt", "settings.json",
    ]  # fmt: skip


def test_what_a_kill_or_another_program_has_left(run, tmp_path):
    (tmp_path / "pngs").mkdir()
    (tmp_path / "pngs" / "settings.json.partial").write_text('{"wei')
    run("samples --n 1 --out pngs")
    assert {p.name for p in (tmp_path / "pngs").iterdir()} == {"000000.png", "settings.json"}
    for content in (b"", b"[]", b'{"weights": "1', b"\xff"):
        (tmp_path / "pngs" / "settings.json").write_bytes(content)
        (tmp_path / "a.npz.part.json").write_bytes(content)
        for out, file in (("pngs", "pngs/settings.json"), ("a.npz", "a.npz.part.json")):
            with pytest.raises(UserError, match=f"{file} does not tell.*name another --out"):
                run(f"samples --n 1 --out {out}")
            assert (tmp_path / file).read_bytes() == content
    (tmp_path / "a.npz.part.json").unlink()
    (tmp_path / "a.npz.part").write_text("another program's")
    with pytest.raises(UserError, match="a.npz.part is there without a.npz.part.json"):
        run("samples --n 1 --out a.npz")
    assert (tmp_path / "a.npz.part").read_text() == "another program's"
    (tmp_path / "a.png.partial").write_text("half a picture")
    run("samples --n 1 --out a.png --force")
    assert not (tmp_path / "a.png.partial").exists()


def test_the_place_is_tried_before_anything_is_made(run, tmp_path, monkeypatch):
    """And a grid, unlike an .npz or a folder, begins anew: its message promises nothing else."""
    for name in ("forward_samples_set_latents", "forward_get_latents"):
        monkeypatch.setattr(VAE, name, lambda *args: pytest.fail("made before the door"))
    (tmp_path / "taken.png").touch()
    for line in ("samples", "reconstruct a.png", "progressive", "progressive a.png"):
        for out, words in (("no/such/g.png", "No such file.*--out$"), ("taken.png", "exists")):
            with pytest.raises(UserError, match=words):
                run(f"{line} --out {out}")
    for out in ("no/such/a.npz", "a.png/folder"):
        with pytest.raises(UserError, match="can't be written.*then goes on$"):
            run(f"samples --out {out}")
    with pytest.raises(UserError, match=r"No such file.*another --out$"):
        run("encode a.png --out no/such/a.npz")


def test_a_killed_run_goes_on_where_it_stopped(run, tmp_path):
    """SIGKILL in the middle; then the same command, and the file is that of a run in one go."""
    line = "samples --n 40 --n_batch 4 --out killed.npz"
    code = (
        "import os, signal, outputs, sample\n"
        "write, batches = outputs.NpzFile.write, []\n"
        "def write_two(self, rows):\n"
        "    write(self, rows)\n"
        "    batches.append(rows)\n"
        "    if len(batches) == 2:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "outputs.NpzFile.write = write_two\n"
        "sample.main()\n"
    )
    argv = [sys.executable, "-c", code, "--restore_ema_path", "ema.th", *line.split()]
    env = environment(PYTHONPATH=str(ROOT))
    assert subprocess.run(argv, env=env, cwd=tmp_path).returncode == -signal.SIGKILL
    part = tmp_path / "killed.npz.part"
    assert not (tmp_path / "killed.npz").exists() and part.stat().st_size == 2 * 4 * 8 * 8
    part.write_bytes(part.read_bytes()[: 8 * 8 * 4] + b"in the middle of an image")
    kept = part.read_bytes()[: 8 * 8 * 4]
    settings = part.with_name("killed.npz.part.json").read_bytes()
    with pytest.raises(UserError, match="temperature 1.0, not 0.5"):
        run(f"{line} --temperature 0.5")
    with_option = json.loads(settings) | {"dec_blocks": "1x2,4m1,8m4"}
    part.with_name("killed.npz.part.json").write_text(json.dumps(with_option))
    with pytest.raises(UserError, match="dec_blocks 1x2,4m1,8m4, not None"):
        run(line)
    part.with_name("killed.npz.part.json").write_bytes(settings)
    with open(part, "rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="is being written by another process"):
            run(line)
    made, forward = [], VAE.forward_uncond_samples
    VAE.forward_uncond_samples = lambda self, n, *args, **more: (
        made.append(n) or forward(self, n, *args, **more)
    )
    try:
        run(line)
    finally:
        VAE.forward_uncond_samples = forward
    assert sum(made) == 36  # the first batch was there
    run("samples --n 40 --n_batch 4 --out whole.npz")
    assert (tmp_path / "killed.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()
    assert arr_0("killed.npz")[:4].tobytes() == kept
    # A run that was to make more was killed.
    part.write_bytes(arr_0("whole.npz").tobytes())
    part.with_name("killed.npz.part.json").write_bytes(settings)
    (tmp_path / "killed.npz").rename(tmp_path / "resumed.npz")
    run("samples --n 30 --n_batch 4 --out killed.npz")
    assert np.array_equal(arr_0("killed.npz"), arr_0("whole.npz")[:30])
    size = (tmp_path / "whole.npz").stat().st_size - 10 * 8 * 8
    assert (tmp_path / "killed.npz").stat().st_size == size
    assert not list(tmp_path.glob("*part*"))


def test_progressive_goes_on_with_the_same_columns_alone(run, monkeypatch, tmp_path):
    """The place of an image depends on how many there are in a row."""
    line, forming, calls = "progressive --n_batch 2 --out p.npz", sample.forming, []

    def stopped(*args, **how):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return forming(*args, **how)

    monkeypatch.setattr(sample, "forming", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(f"{line} --n 4")
    with pytest.raises(UserError, match="columns 4, not 6"):
        run(f"{line} --n 6")
    run(f"{line} --n 4")
    assert len(calls) == 3 + 4 and arr_0("p.npz").shape == (12, 8, 8, 1)


@pytest.mark.parametrize(
    "line, width, height",
    [
        ("samples --n 20 --out g.PNG", 8 * 132, 3 * 132),
        ("samples --n 400 --out g.png", 20 * 68, 20 * 68),
        ("reconstruct a.png b.jpg --out g.png", 2 * 132, 2 * 132),
        ("interpolate a.png b.jpg --steps 3 --out g.png", 5 * 132, 132),
        ("progressive a.png b.jpg --out g.png", 2 * 132, 4 * 132),
    ],
)
def test_grids(run, line, width, height):
    run(line)
    picture = Image.open(line.split()[-1])
    # Images of 8 pixels are enlarged to 128 or 64; beside and above them stand the words.
    assert width < picture.width < width + 250 and height < picture.height < height + 50
    pixels = np.asarray(picture)
    assert (pixels[: picture.height - height] < 128).any()


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_motion_has_a_frame_a_step(run, suffix):
    run(f"interpolate a.png b.jpg --steps 9 --out m.{suffix}")
    run("interpolate a.png b.jpg --steps 9 --out m.npz")
    run(f"progressive --n 3 --out p.{suffix} --n_batch 2")
    run("progressive --n 3 --out p.npz --n_batch 2")
    for name, n_frame in (("m", 1), ("p", 3)):
        images = arr_0(f"{name}.npz")
        images = images.reshape(-1, n_frame, *images.shape[1:])
        picture = Image.open(f"{name}.{suffix}")
        assert picture.n_frames == len(images) and picture.info["loop"] == 0
        total = 0
        for frame, row in enumerate(images):
            picture.seek(frame)
            picture.load()
            total += picture.info["duration"]
            pixels = np.asarray(picture.convert("RGB"))
            assert pixels.shape == (128, n_frame * 132 - 4, 3)
            for column, image in enumerate(row):
                small = pixels[8::16, column * 132 + 8 : column * 132 + 128 : 16]
                # A palette of 256 colours has all of 64 pixels.
                assert np.array_equal(small, np.broadcast_to(image, (8, 8, 3)))
        assert abs(total - 125 * len(images)) <= 5


def test_equal_frames_become_one_of_their_time(run):
    run("interpolate a.png a.png --mean --steps 2 --out m.gif")
    picture = Image.open("m.gif")
    assert picture.n_frames == 1 and abs(picture.info["duration"] - 2 * 125) <= 5


def test_other_commands_and_too_wide_a_row_make_no_motion(run):
    with pytest.raises(UserError, match="must not end in .gif; of interpolate, progressive also"):
        run("samples --out s.gif")
    with pytest.raises(UserError, match="pixels wide, a .webp has 16383 at most"):
        run("progressive --n 250 --out wide.webp")
