"""The user's own images: packed, measured, split, remembered; runs on them."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from fakes import assert_refused, noise, open_all, own_H, parsed
from PIL import Image
from runs import BIN, ROOT, environment

from data import set_up_data
from image_files import fit
from own_images import keep_image_record
from vae import VAE


def write_photos(root, n=12, size=(40, 24), seed=0):
    """n PNG files of noise, (width, height), in nested folders; their names in order."""
    rng = np.random.default_rng(seed)
    names = []
    for i in range(n):
        name = f"{'abc'[i % 3]}/{i:03}.png"
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        imageio.imwrite(root / name, rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
        names.append(name)
    return sorted(names)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """No test writes to the cache of who runs it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "vdvae"


def everything(H):
    """All images of H's data set by number in the array, and the splits' numbers."""
    parts = open_all(H)
    return parts[0].array[np.arange(len(parts[0].array))], [part.indices for part in parts]


# ---- packed ----------------------------------------------------------------------------------


def test_every_kind_of_picture_becomes_rgb_resized_and_cut(tmp_path):
    root, size = tmp_path / "photos", 16
    (root / "deep" / "er").mkdir(parents=True)
    pixels = noise(1, 64)[0][:48]  # 64 wide, 48 high
    smooth = np.linspace(0, 255, 48 * 64 * 3).reshape(48, 64, 3).astype(np.uint8)
    rgb = Image.fromarray(pixels)
    grey, palette = Image.fromarray(pixels[..., 0]), rgb.convert("P")
    opaque = np.full((48, 64, 1), 255, np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6  # to be shown turned clockwise by 90 degrees
    pictures = {
        "0.png": (rgb, {}, rgb),
        "1.PNG": (grey, {}, grey.convert("RGB")),
        "2.png": (palette, {}, palette.convert("RGB")),
        "deep/3.png": (Image.fromarray(np.dstack([pixels, opaque])), {}, rgb),
        "deep/4.webp": (rgb, {"lossless": True}, rgb),
        "deep/er/5.jpg": (Image.fromarray(smooth), {"quality": 95}, Image.fromarray(smooth)),
        "deep/er/6.png": (rgb, {"exif": turned}, rgb.transpose(Image.Transpose.ROTATE_270)),
        "deep/er/7.jpeg": (Image.fromarray(smooth[..., 0]), {}, Image.fromarray(smooth[..., 0])),
    }
    for name, (picture, options, _) in pictures.items():
        picture.save(root / name, **options)
    for name in ("notes.txt", ".hidden.png", "deep/._3.png"):
        (root / name).write_text("no picture")

    array, _ = everything(own_H(root, size))
    assert array.shape == (8, size, size, 3) and array.dtype == np.uint8
    for image, (name, (_, _, wanted)) in zip(array, sorted(pictures.items()), strict=True):
        wide = wanted.width > wanted.height
        short = (21, 16) if wide else (16, 21)  # 64 : 48 = 21.3 : 16
        wanted = wanted.convert("RGB").resize(short, Image.Resampling.LANCZOS)
        wanted = np.asarray(wanted)[:, 2:18] if wide else np.asarray(wanted)[2:18]
        error = np.abs(image.astype(int) - wanted).max()
        assert error <= (8 if "jp" in name else 0), name
    # A picture of the right size stays as it is.
    assert np.array_equal(fit(Image.fromarray(pixels[:16, :16]), 16), pixels[:16, :16])


def test_a_second_start_packs_nothing_and_a_change_packs_anew(tmp_path, capsys):
    root = tmp_path / "photos"
    names = write_photos(root)
    H = own_H(root)
    first, splits = everything(H)
    assert "packed 12 images" in capsys.readouterr().out
    packed = root / ".vdvae" / "16.npy"
    before = packed.stat().st_ino
    manifest = json.loads(packed.with_suffix(".json").read_text())
    assert manifest["files"] == names and manifest["bad"] == {}
    again, _ = everything(H)
    assert capsys.readouterr().out == "" and packed.stat().st_ino == before
    assert np.array_equal(first, again)
    assert [len(part) for part in splits] == [10, 1, 1]
    assert sorted(np.concatenate(splits)) == list(range(12))

    os.utime(root / names[0], (1, 1))  # touched
    everything(H)
    (root / names[0]).chmod((root / names[0]).stat().st_mode ^ 0o020)  # made readable, maybe
    everything(H)
    (root / names[0]).unlink()  # removed
    assert len(everything(H)[0]) == 11
    imageio.imwrite(root / "z.png", noise(1, 30)[0])  # added
    assert len(everything(H)[0]) == 12
    assert capsys.readouterr().out.count("packed") == 4
    everything(own_H(root, 24))  # another size lies beside it
    assert {path.name for path in packed.parent.glob("*.npy")} == {"16.npy", "24.npy"}


@pytest.mark.parametrize("left", ["part", "npy"])
def test_a_packing_that_was_killed_is_repeated(tmp_path, left):
    """As a kill leaves it: before the array is whole, or between the array and its manifest."""
    root = tmp_path / "photos"
    write_photos(root)
    folder = root / ".vdvae"
    folder.mkdir()
    np.save(folder / "other.npy", noise(3, 16))
    (folder / "other.npy").rename(folder / ("16.npy.part" if left == "part" else "16.npy"))
    assert len(everything(own_H(root))[0]) == 12
    assert not (folder / "16.npy.part").exists()


def test_a_damaged_cache_is_named(tmp_path):
    root = tmp_path / "photos"
    write_photos(root)
    everything(own_H(root))
    os.truncate(root / ".vdvae" / "16.npy", 1000)
    refusal = "16.npy", "1,000 bytes", "to pack anew"
    assert_refused(lambda: set_up_data(own_H(root)), *refusal)
    (root / ".vdvae" / "16.json").write_text("{")
    assert_refused(lambda: set_up_data(own_H(root)), "16.json", "delete it")


def test_a_folder_that_cannot_be_written_is_packed_in_the_users_cache(tmp_path, cache):
    root = tmp_path / "photos"
    write_photos(root)
    (root / ".vdvae").touch()  # as good as a read-only folder, for whoever runs the test
    assert len(everything(own_H(root))[0]) == 12
    [packed] = cache.glob("*/16.npy")
    before = packed.stat().st_ino
    everything(own_H(root))
    assert packed.stat().st_ino == before and (root / ".vdvae").is_file()
    shutil.rmtree(cache)
    cache.touch()
    refusal = root / ".vdvae", cache, "XDG_CACHE_HOME"
    assert_refused(lambda: set_up_data(own_H(root)), *refusal)


def test_unusable_files_are_named_counted_and_refused_or_skipped(tmp_path, capsys):
    root = tmp_path / "photos"
    write_photos(root)
    good, _ = everything(own_H(root))
    imageio.imwrite(root / "a" / "small.png", noise(1, 15)[0])
    (root / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    Image.fromarray(np.zeros((32, 32), np.float32)).save(root / "deep.tif")
    (root / "d.png").write_bytes((root / "a" / "000.png").read_bytes()[:-100])
    (root / "b" / "empty.webp").touch()
    (root / "e.png").symlink_to("nothing")
    (root / "z.png").write_text("<html>")  # whatever its name says
    H = own_H(root)
    refusal = "7 of 19 images", "a/small.png is 15 x 15 pixels, smaller than 16"
    refusal += "b/empty.webp cannot be decoded (it is empty)", "broken.jpg"
    refusal += "...", "16.json", "--bad_images skip"
    assert_refused(lambda: set_up_data(H), *refusal)
    capsys.readouterr()
    H.bad_images = "skip"
    assert np.array_equal(everything(H)[0], good)
    printed = capsys.readouterr().out
    assert "packed" not in printed  # the first, refused start did it
    assert "going on although 7 of 19 images" in printed and "a/small.png" in printed
    bad = json.loads((root / ".vdvae" / "16.json").read_text())["bad"]
    names = "a/small.png", "b/empty.webp", "broken.jpg", "d.png", "deep.tif", "e.png", "z.png"
    assert tuple(bad) == names
    assert "32 bits" in bad["deep.tif"] and "No such file" in bad["e.png"]


def test_own_images_that_are_none(tmp_path):
    root = tmp_path / "photos"
    assert_refused(lambda: set_up_data(own_H(root)), root, "is no folder")
    root.mkdir()
    assert_refused(lambda: set_up_data(own_H(root)), root, "holds no image", ".webp")
    (root / "a.png").write_bytes(b"x")
    assert_refused(lambda: set_up_data(own_H(root)), "none of 1 images", "a.png cannot be decoded")
    assert_refused(lambda: set_up_data(own_H(root, None)), "--image_size")
    write_photos(root, n=2)
    (root / "a.png").unlink()
    assert_refused(lambda: set_up_data(own_H(root)), "2 images", "needs 3 images")
    np.save(tmp_path / "black.npy", np.zeros((5, 8, 8, 3), np.uint8))
    assert_refused(lambda: set_up_data(own_H(tmp_path / "black.npy", 8)), "deviation 0")


def test_too_little_room_is_refused_before_packing(tmp_path, monkeypatch):
    write_photos(tmp_path / "photos")
    usage = shutil.disk_usage(tmp_path)._replace(free=5000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    refusal = "12 images of 16 x 16 need 9,216 bytes", "5,000 free"
    assert_refused(lambda: set_up_data(own_H(tmp_path / "photos")), *refusal)


def test_own_npy(tmp_path):
    path, images = tmp_path / "mine.npy", noise(40, 8)
    np.save(path, images)
    H = own_H(path, None)
    array, splits = everything(H)
    assert H.image_size == 8 and np.array_equal(array, images)
    assert [len(part) for part in splits] == [36, 2, 2]
    assert np.isclose(H.image_mean, images[splits[0]].mean())
    assert np.isclose(H.image_std, images[splits[0]].std())
    assert_refused(lambda: set_up_data(own_H(path, 16)), "(40, 8, 8, 3), not uint8 (40, 16, 16, 3)")
    for bad in (images.astype(np.int16), images[..., :2], images[:, :4], images[0, 0, 0]):
        np.save(path, bad)
        assert_refused(lambda: set_up_data(own_H(path, None)), path, str(bad.dtype), bad.shape)
    path.write_bytes(b"x")
    assert_refused(lambda: set_up_data(own_H(path, None)), path, "no complete .npy file")


# ---- measured, remembered --------------------------------------------------------------------


def test_statistics_are_of_images_from_the_whole_tree(tmp_path):
    """As where the names of a first folder fill 10,000 images: half of these are black."""
    levels = np.arange(30000) // 15000 * 255
    np.save(tmp_path / "mine.npy", np.tile(levels[:, None, None, None], (2, 2, 3)).astype(np.uint8))
    H = own_H(tmp_path / "mine.npy", 2)
    train = everything(H)[1][0]
    assert abs(H.image_mean - levels[train].mean()) < 2 and abs(H.image_std - 127.5) < 1


def test_a_run_keeps_its_statistics_and_split(tmp_path):
    root, run = tmp_path / "photos", tmp_path / "run"
    write_photos(root, n=50)
    H = own_H(root, run=run)
    array, (train, valid, test) = everything(H)
    assert not list(run.iterdir())  # until the run trains
    keep_image_record(H)
    record = json.loads((run / "images.json").read_text())
    assert np.isclose(record["mean"], array[train].mean()) and record["mean"] == H.image_mean
    assert np.isclose(record["std"], array[train].std()) and record["std"] == H.image_std
    assert (record["valid"], record["test"]) == (valid.tolist(), test.tolist())
    assert (record["n_images"], record["image_size"]) == (50, 16)

    # What is stored holds, not what would be measured or split today.
    record |= {"mean": 1.0, "std": 2.0, "valid": [0, 1, 2], "test": [3, 4]}
    (run / "images.json").write_text(json.dumps(record))
    for restored in (own_H(root, run=run), own_H(root, run=tmp_path / "new")):
        restored.restore_ema_path = str(run / "latest-model-ema.th")
        splits = everything(restored)[1]
        assert (restored.image_mean, restored.image_std) == (1.0, 2.0)
        assert [part.tolist() for part in splits] == [list(range(5, 50)), [0, 1, 2], [3, 4]]
        keep_image_record(restored)
        assert json.loads((Path(restored.logdir).parent / "images.json").read_text()) == record
    batch = [torch.full((1, 16, 16, 3), 7, dtype=torch.uint8)]
    assert float(set_up_data(restored)[3](batch)[0].mean()) == 3.0  # (7 - 1) / 2

    # Other images: the run's folder refuses them, weights restored from it lend mean and std.
    (root / "a" / "000.png").unlink()
    refusal = run / "images.json", "50 other images", "the 49 of 16", "--desc"
    assert_refused(lambda: set_up_data(own_H(root, run=run)), *refusal)
    fine_tuned = own_H(root, run=tmp_path / "tuned", restore_path=run / "latest-model.th")
    splits = everything(fine_tuned)[1]
    assert (fine_tuned.image_mean, fine_tuned.image_std) == (1.0, 2.0)
    assert [len(part) for part in splits] == [45, 2, 2]
    keep_image_record(fine_tuned)
    everything(fine_tuned)  # again
    # Nor does a run's own file outrank the restored weights', or get lost to it.
    other = own_H(root, run=tmp_path / "other")
    everything(other)
    keep_image_record(other)
    clash = own_H(root, run=tmp_path / "other", restore_path=run / "latest-model.th")
    refusal = tmp_path / "other" / "images.json", "another mean", "--desc"
    assert_refused(lambda: set_up_data(clash), *refusal)

    (run / "images.json").write_text("{}")
    assert len(everything(own_H(root, run=run))[0]) == 49  # an empty object is as good as none
    (run / "images.json").write_text('{"mean": 1}')
    assert_refused(lambda: set_up_data(own_H(root, run=run)), run / "images.json", "lacks one of")


# ---- runs ------------------------------------------------------------------------------------


TINY = "--width 8 --zdim 2 --n_batch 4 --num_epochs 1 --enc_blocks 16x1,16d4,4x1 --warmup_iters 0 "
TINY += "--dec_blocks 4x1,16m4 --no_bias_above 16 --bottleneck_multiple 0.5 --num_images_visualize "
TINY += "1 --num_variables_visualize 0 --num_temperatures_visualize 1 --image_size 16"


def command(tmp_path, root, *options, launcher=()):
    """(status, stdout, stderr) of a train.py on own images; its run is tmp_path/runs/own."""
    args = ["--hps", "images32", *TINY.split(), "--data_root", root, "--desc", "own"]
    args += ["--save_dir", tmp_path / "runs", "--device", "cpu", *options]
    done = subprocess.run(
        [*launcher, sys.executable, ROOT / "train.py", *map(str, args)],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=600,
    )
    return done.returncode, done.stdout, done.stderr


def test_two_processes_train_on_a_folder_that_one_packs_and_evaluate_its_test_set(tmp_path):
    root, run = tmp_path / "photos", tmp_path / "runs" / "own"
    write_photos(root, n=130)
    status, stdout, stderr = command(tmp_path, root, launcher=(BIN / "mpiexec", "-n", "2"))
    assert status == 0, stderr
    assert stdout.count("packed 130 images") == 1
    weights = run / "latest-model-ema.th"
    status, stdout, stderr = command(tmp_path, root, "--test_eval", "--restore_ema_path", weights)
    assert status == 0 and "packed" not in stdout, stderr
    events = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    [tested] = [event for event in events if event.get("type") == "test_loss"]
    assert tested["n_images"] == 6 and math.isfinite(tested["bits_per_dim"])

    (root / "broken.png").touch()
    status, stdout, stderr = command(tmp_path, root, "--desc", "other")
    assert status == 2 and stderr.count("\n") == 1 and "broken.png cannot be decoded" in stderr


# name: pixels, parameters, stochastic layers
OWN_PRESETS = {
    "images32": (32, 15_044_068, 36),
    "images64": (64, 16_247_876, 42),
    "images128": (128, 27_341_812, 47),
    "images256": (256, 42_486_228, 49),
}


def test_presets_for_own_images_have_the_stated_size():
    """The table of docs/data.md, hps.py's comments."""
    for name, (size, parameters, layers) in OWN_PRESETS.items():
        H = parsed("--hps", name)
        assert (H.dataset, H.image_size) == ("images", size)
        H.image_channels = 3
        with torch.device("meta"):
            vae = VAE(H)
        assert sum(p.numel() for p in vae.parameters()) == parameters, name
        assert len(vae.decoder.dec_blocks) == layers, name
