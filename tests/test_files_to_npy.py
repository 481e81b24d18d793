"""files_to_npy.py on real folders and tars: values, order, refusals, interruption, memory."""

import io
import os
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
from PIL import Image
from runs import ENV, ROOT

from errors import UserError
from files_to_npy import files_to_npy

SCRIPT = ROOT / "files_to_npy.py"


def png(pixels, mode=None, kind="png"):
    """The bytes of a PNG of an array, converted to a PIL mode where one is given."""
    image, data = Image.fromarray(pixels), io.BytesIO()
    (image.convert(mode) if mode else image).save(data, kind)
    return data.getvalue()


def noise(seed, size=8):
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def write_tar(path, files):
    """A plain tar with these {name: bytes}, in their order."""
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_folder(path, files):
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


# Neither this order nor that of the numbers is the order of the names.
NAMES = ["b/10.png", "c.JPEG.png", "b/9.png", "a.png", "b-1.png"]
IMAGES = {name: noise(i) for i, name in enumerate(NAMES)}
FILES = {name: png(pixels) for name, pixels in IMAGES.items()}
SORTED = np.stack([IMAGES[name] for name in sorted(NAMES)])  # (5, 8, 8, 3)


@pytest.mark.parametrize("write", [write_folder, write_tar])
def test_command_sorts_by_name_and_says_what_it_left_out(tmp_path, write):
    source = write(tmp_path / "source", {**FILES, "b/LICENSE.txt": b"x"})
    out = tmp_path / "out.npy"
    command = [sys.executable, SCRIPT, source, out, "--expect", "5"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""  # piped: no progress bar
    assert "left out: 1 other file: 1 .txt" in done.stdout
    array = np.load(out)
    assert array.dtype == np.uint8 and np.array_equal(array, SORTED)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.npy", "source"]

    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 2 and again.stderr.startswith(f"error: {out} exists")
    assert again.stderr.count("\n") == 1


def test_a_name_that_is_no_text_is_printed_all_the_same(tmp_path):
    source = write_folder(tmp_path / "source", FILES)
    (source / os.fsdecode(b"x.\xfe")).touch()
    command = [sys.executable, SCRIPT, source, tmp_path / "out.npy"]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}  # as most locales have it
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "1 .\\udcfe" in done.stdout


def test_returns_the_shape_of_what_numpy_maps(tmp_path):
    source, out = write_folder(tmp_path / "source", FILES), tmp_path / "out.npy"
    assert files_to_npy(source, out) == np.load(out, mmap_mode="r").shape == (5, 8, 8, 3)


def test_grey_palette_and_alpha_become_rgb(tmp_path):
    grey, rgb = noise(0)[..., 0], noise(1)
    rgba = np.concatenate([rgb, noise(2)[..., :1]], axis=2)
    palette, colours = Image.fromarray(grey // 4), noise(3).reshape(64, 3)
    palette.putpalette(colours.tobytes())  # the image is now of mode P
    source = write_folder(
        tmp_path / "source",
        {
            "0.png": png(grey),
            "1.png": png((grey > 127).astype(np.uint8) * 255, "1"),
            "3.png": png(rgba),
        },
    )
    palette.save(source / "2.png")
    files_to_npy(source, tmp_path / "out.npy")
    array = np.load(tmp_path / "out.npy")
    assert np.array_equal(array[0], np.stack([grey] * 3, axis=2))
    assert np.array_equal(array[1], np.stack([(grey > 127) * 255] * 3, axis=2))
    assert np.array_equal(array[2], colours[grey // 4])
    alpha = rgba[..., 3:] / 255
    laid = rgb * alpha + 255 * (1 - alpha)  # on white
    assert np.abs(array[3] - laid).max() <= 1


BAD_IMAGES = {
    "odd size": (png(noise(0, 9)), "bad.png is 9x9, the first image, a.png, is 8x8"),
    "cut off": (FILES["a.png"][:-60], "bad.png cannot be decoded"),
    "no image": (b"<html>", "bad.png cannot be decoded"),
    "empty": (b"", "bad.png cannot be decoded"),
    "deep": (
        png(noise(0)[..., 0].astype(np.float32), kind="tiff"),
        "bad.png has 32 bits a channel",
    ),
}


@pytest.mark.parametrize("write", [write_folder, write_tar])
@pytest.mark.parametrize("case", BAD_IMAGES)
def test_a_bad_image_is_named_and_nothing_is_left(tmp_path, case, write):
    data, message = BAD_IMAGES[case]
    source = write(tmp_path / "source", {**FILES, "bad.png": data})
    out = tmp_path / "out.npy"
    out.write_bytes(b"old")
    with pytest.raises(UserError, match=message) as error:
        files_to_npy(source, out, force=True)
    assert "\n" not in str(error.value)
    assert out.read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.npy", "source"]


def test_force_replaces(tmp_path):
    source, out = write_folder(tmp_path / "source", FILES), tmp_path / "out.npy"
    out.write_bytes(b"old")
    with pytest.raises(UserError, match="--force"):
        files_to_npy(source, out)
    assert out.read_bytes() == b"old"
    files_to_npy(source, out, force=True)
    assert np.array_equal(np.load(out), SORTED)


def linked(path):
    with tarfile.open(write_tar(path, FILES), "a") as tar:
        member = tarfile.TarInfo("z.png")
        member.type, member.linkname = tarfile.SYMTYPE, "a.png"
        tar.addfile(member)


def compressed(path):
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.png"))


def damaged(path):
    """A tar whose third header is overwritten; tarfile by itself takes that for the end."""
    write_tar(path, FILES)
    with tarfile.open(path) as tar:
        third = tar.getmembers()[2].offset
    with open(path, "r+b") as file:
        file.seek(third)
        file.write(b"\xff" * 512)


def cut_between_members(path):
    write_tar(path, FILES)
    with tarfile.open(path) as tar:
        third = tar.getmembers()[2].offset
    os.truncate(path, third)


def cut_inside_a_member(path):
    write_tar(path, FILES)
    with tarfile.open(path) as tar:
        third = tar.getmembers()[2].offset_data
    os.truncate(path, third + 10)


BAD_SOURCES = {
    "absent": (lambda path: None, "neither a folder nor a plain tar"),
    "no tar": (lambda path: path.write_bytes(b"x" * 2000), "neither a folder nor a plain tar"),
    "compressed": (compressed, "unpack a compressed tar"),
    "damaged": (damaged, "damaged or cut off at byte"),
    "cut between members": (cut_between_members, "damaged or cut off at byte"),
    "cut inside a member": (cut_inside_a_member, "unexpected end of data"),
    "link": (linked, "z.png in .* is no plain file"),
    "no images": (lambda path: write_tar(path, {"a.txt": b"x"}), "holds no image"),
    "empty folder": (lambda path: path.mkdir(), "holds no image"),
    "too few": (lambda path: write_tar(path, {"a.png": FILES["a.png"]}), "1 images where 5 are"),
}


@pytest.mark.parametrize("case", BAD_SOURCES)
def test_a_bad_source_is_refused(tmp_path, case):
    write, message = BAD_SOURCES[case]
    write(tmp_path / "source")
    with pytest.raises(UserError, match=message):
        files_to_npy(tmp_path / "source", tmp_path / "out.npy", expect=5)
    assert not (tmp_path / "out.npy").exists() and not (tmp_path / "out.npy.part").exists()


def write_npz(path, images, **other):
    np.savez_compressed(path, data=images.transpose(0, 3, 1, 2).reshape(len(images), -1), **other)
    return str(path)


def test_npz_files_follow_one_another(tmp_path):
    images = np.concatenate([SORTED] * 500)  # (2500, 8, 8, 3): more than one read
    parts = [
        write_npz(tmp_path / f"train_data_batch_{i}.npz", part, labels=np.zeros(3), mean=part[0])
        for i, part in enumerate((images[:2300], images[2300:]), 9)
    ]
    command = [sys.executable, SCRIPT, *parts, tmp_path / "out.npy", "--expect", "2500"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    assert np.array_equal(np.load(tmp_path / "out.npy"), images)

    command[2] = tmp_path  # a folder and an .npz
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "only .npz files can be several" in done.stderr


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def bad_zip(path):
    write_npz(path, np.random.default_rng(0).integers(0, 256, (100, 8, 8, 3), dtype=np.uint8))
    data = bytearray(path.read_bytes())
    data[-2000] ^= 255  # in the last compressed levels
    path.write_bytes(data)


BAD_NPZ = {
    "absent": (lambda path: None, "No such file"),
    "no zip": (lambda path: path.write_bytes(b"x" * 1000), "not a zip file"),
    "cut off": (
        lambda path: (write_npz(path, SORTED), os.truncate(path, path.stat().st_size - 30)),
        "not a zip file",
    ),
    "damaged": (bad_zip, "is damaged"),
    "no data": (lambda path: np.savez(path, labels=SORTED), "There is no item named 'data.npy'"),
    "floats": (lambda path: np.savez(path, data=np.zeros((2, 12))), "float64 .2, 12., not uint8"),
    "no square": (lambda path: np.savez(path, data=np.zeros((2, 15), np.uint8)), "uint8 .2, 15."),
    "flat": (lambda path: np.savez(path, data=np.zeros(12, np.uint8)), "uint8 .12,., not"),
    "pickle": (lambda path: np.savez(path, data=np.array([[Hostile()]])), "object .1, 1."),
    "other size": (lambda path: write_npz(path, SORTED[:, :4, :4]), "bad.npz holds images of .4"),
}


@pytest.mark.parametrize("case", BAD_NPZ)
def test_a_bad_npz_is_refused(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    write, message = BAD_NPZ[case]
    write(tmp_path / "bad.npz")
    good = write_npz(tmp_path / "good.npz", SORTED)
    with pytest.raises(UserError, match=message) as error:
        files_to_npy([good, str(tmp_path / "bad.npz")], tmp_path / "out.npy")
    assert "bad.npz" in str(error.value) and "\n" not in str(error.value)
    assert not set(os.listdir()) & {"out.npy", "out.npy.part", "ran"}


def test_a_side_is_held(tmp_path):
    source = write_folder(tmp_path / "source", FILES)
    with pytest.raises(UserError, match="8x8, not 32x32"):
        files_to_npy(source, tmp_path / "out.npy", side=32)
    assert files_to_npy(source, tmp_path / "out.npy", side=8) == (5, 8, 8, 3)


def test_an_out_that_cannot_be_written_is_refused(tmp_path):
    source = write_folder(tmp_path / "source", FILES)
    with pytest.raises(UserError, match="cannot write .*No such file or directory"):
        files_to_npy(source, tmp_path / "absent" / "out.npy")
    with pytest.raises(UserError, match="exists"):
        files_to_npy(source, tmp_path, force=True)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_after_a_kill_the_next_run_starts_cleanly(tmp_path, how):
    source, out = write_folder(tmp_path / "source", FILES), tmp_path / "out.npy"
    part, waiting = tmp_path / "out.npy.part", tmp_path / "waiting"
    (source / "z.png").write_bytes(FILES["a.png"])
    # The conversion waits for ever at its sixth image.
    code = (
        "import pathlib, sys, time, files_to_npy\n"
        "waiting = pathlib.Path(sys.argv.pop())\n"
        "decode, seen = files_to_npy.decode_noting, []\n"
        "def wait(*args):\n"
        "    seen.append(1)\n"
        "    if len(seen) == 6:\n"
        "        waiting.touch()\n"
        "        time.sleep(1000)\n"
        "    return decode(*args)\n"
        "files_to_npy.decode_noting = wait\n"
        "files_to_npy.run_command(files_to_npy.main)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, source, out, waiting],
        env=ENV,
        stderr=subprocess.DEVNULL,
        # A shell's background job, such as these tests may be, is started with SIGINT ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 300
    while not waiting.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(how)
    assert process.wait(300) == {signal.SIGKILL: -signal.SIGKILL, signal.SIGINT: 130}[how]
    assert not out.exists()
    assert part.exists() == (how == signal.SIGKILL)  # which nobody can tidy up after

    if part.exists():
        part.write_bytes(b"x" * 100_000)  # longer than the result
    (source / "z.png").unlink()
    files_to_npy(source, out)
    assert np.array_equal(np.load(out), SORTED)
    assert not part.exists()


def peak_megabytes(*command):
    """Runs a Python command; its peak resident memory in MB."""
    pid = os.spawnv(os.P_NOWAIT, sys.executable, [sys.executable, *map(str, command)])
    _, status, usage = os.wait4(pid, 0)
    assert status == 0
    return usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


@pytest.mark.slow
def test_memory_is_that_of_the_names(tmp_path):
    """The docstring's 200 bytes an image; the 1,281,149 of ImageNet then take under 300 MB."""
    data = png(noise(0, 32) // 64)
    body = data + bytes(-len(data) % 512)
    peaks = {}
    for count in (1_000, 100_000):
        source = tmp_path / f"{count}.tar"
        with open(source, "wb") as file:  # tarfile's addfile would take longer than the test
            for i in reversed(range(count)):
                member = tarfile.TarInfo(f"train_32x32/{i:07d}.png")
                member.size = len(data)
                file.write(member.tobuf(tarfile.USTAR_FORMAT) + body)
            file.write(bytes(1024))
        peaks[count] = peak_megabytes(SCRIPT, source, tmp_path / f"{count}.npy", "--expect", count)
    assert (tmp_path / "100000.npy").stat().st_size == 128 + 100_000 * 32 * 32 * 3
    assert peaks[100_000] < 500
    assert (peaks[100_000] - peaks[1_000]) * 2**20 / 99_000 < 200
