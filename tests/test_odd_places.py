"""Names that are no text, shells that are no bash, Pythons that are too old, folders for files."""

import os
import pwd
import shutil
import stat
import subprocess

import numpy as np
import pytest
from fakes import arr_0, noise, open_all, own_H
from PIL import Image
from runs import ENV, ROOT, SMALL, Run, command, events

from errors import UserError, one_line
from files_to_npy import files_to_npy
from logs import log_event
from own_images import keep_image_record
from reports import with_tensorboard
from resuming import read_log

ODD = os.fsdecode(b"r\xff\xfe")  # bytes of no UTF-8


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """No test writes to the cache of who runs it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def photos(root, names):
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(1, 8, seed=i)[0]).save(root / name, "PNG")
    return root


# ---- names that are no text, or of several lines ---------------------------------------------


def test_a_run_in_a_folder_whose_name_is_no_text(tmp_path):
    options = ["--num_epochs", "1", "--epochs_per_eval", "1", "--iters_per_save", "5"]
    argv = [*SMALL, *options, "--save_dir", tmp_path / ODD, "--desc", "d\udcffs$x_{\n"]
    process = command(argv, env=ENV | {"PYTHONIOENCODING": "utf-8:strict"})
    text, _ = process.communicate(timeout=600)
    assert process.returncode == 0, text
    [folder] = (tmp_path / ODD).iterdir()
    found = events(folder)
    lines = (folder / "log.txt").read_text().splitlines()  # which is UTF-8
    assert len(lines) == len(found) and "\\udcff" in text
    assert {"train_loss", "eval_loss"} <= {event.get("type") for event in found}
    names = {path.name for path in folder.iterdir()}
    assert {"latest-model.th", "latest-state.json", "samples-13.png", "rates-13.png"} <= names
    process = command([*argv, "--resume", "--num_epochs", "2"])
    text, _ = process.communicate(timeout=600)
    assert process.returncode == 0 and "resuming" in text, text


def test_tensorboard_takes_no_such_name():
    pytest.importorskip("tensorboard")
    with pytest.raises(UserError, match=r"no UTF-8, such as r\\udcff.*--save_dir"):
        with_tensorboard(print, ODD)


def test_own_images_and_outputs_of_such_names(tmp_path, run, capsys):
    names = [f"{ODD}.png", "a\nb.png", "Кошка.png", *(f"{i}.png" for i in range(20))]
    root = photos(tmp_path / ODD, names)
    (root / os.fsdecode(b"x.\xfe")).touch()
    H = own_H(root, 8, tmp_path / "r\udcfe")
    parts = open_all(H)
    keep_image_record(H)
    assert sorted(H.image_record["files"]) == sorted(names) and sum(map(len, parts)) == 23
    assert open_all(own_H(root, 8, tmp_path / "r\udcfe"))[0].indices.tolist()
    (root / ".vdvae" / "8.json").unlink()
    shutil.rmtree(root / ".vdvae")
    (root / ".vdvae").touch()
    open_all(own_H(root, 8))  # packed in the user's cache
    assert files_to_npy(root, tmp_path / f"{ODD}.npy") == (23, 8, 8, 3)
    assert all(line.isprintable() for line in capsys.readouterr().out.splitlines())

    shutil.copytree(root, "in")
    os.rename("in", ODD + "2")
    run(f"encode '{ODD}2' --out {ODD}.npz")
    with np.load(f"{ODD}.npz") as arrays:
        assert len(arrays["images"]) == 23
    run(f"reconstruct '{ODD}2' --out {ODD}-dir --n_batch 8")
    assert len(os.listdir(f"{ODD}-dir")) == 24
    run(f"reconstruct '{ODD}2/{ODD}.png' '{ODD}2/a\nb.png' --out {ODD}.png")
    assert Image.open(f"{ODD}.png").width > 256
    assert all(line.isprintable() for line in capsys.readouterr().out.splitlines())


def test_every_error_and_every_line_of_a_log_is_one_line(tmp_path, capsys):
    name = "a\nb\x1b[31m\r.png"
    line = str(UserError(f"{name} can't be read"))
    assert line == r"a\nb\x1b[31m\r.png can't be read"
    assert one_line("Кошка 猫.png, 5 %") == "Кошка 猫.png, 5 %"
    log_event(str(tmp_path / "log"), (f"read {name}",), False, {"x\ny": "\udcff"})
    assert len((tmp_path / "log.txt").read_bytes().splitlines()) == 1
    assert len(capsys.readouterr().out.splitlines()) == 1
    root = photos(tmp_path / "photos", [f"{i}.png" for i in range(130)])
    (root / name).touch()
    argv = ["--hps", "images32", "--data_root", root, "--image_size", "8", "--save_dir", tmp_path]
    process = command(argv, stderr=subprocess.PIPE)  # two loader workers pack these
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 2 and errors.count("\n") == 1 and r"a\nb\x1b[31m\r.png" in errors


def test_a_worker_s_error_is_the_line_it_was():
    from batches import _Loader

    loader = _Loader(Failing(), num_workers=1)
    with pytest.raises(UserError) as error:
        next(iter(loader))
    assert str(error.value) == r"x\ny is cut off: fetch it anew"


class Failing:
    def __len__(self):
        return 1

    def __getitem__(self, i):
        raise UserError("x\ny is cut off: fetch it anew")


# ---- folders for files -----------------------------------------------------------------------


def test_sample_takes_folders_wherever_it_takes_images(run, tmp_path, capsys):
    photos(tmp_path / "in", ["b/2.png", "b/1.png", "a.png", "c.bmp"])
    (tmp_path / "in" / "notes.txt").touch()
    run("encode in a.png --out z.npz")
    with np.load("z.npz") as arrays:
        wanted = ["in/a.png", "in/b/1.png", "in/b/2.png", "in/c.bmp", "a.png"]
        assert arrays["images"].tolist() == wanted
    assert "in: left out: 1 other file: 1 .txt" in capsys.readouterr().out
    run("reconstruct in --out r.npz")
    run("reconstruct in/a.png in/b/1.png in/b/2.png in/c.bmp --out s.npz")
    assert (arr_0("r.npz") == arr_0("s.npz")).all()
    run("progressive in --out p.png")
    run("interpolate in/b --steps 3 --out i.npz")
    assert len(arr_0("i.npz")) == 3
    with pytest.raises(UserError, match="from one image to another, not 4"):
        run("interpolate in --out j.npz")
    os.mkfifo("l.npz")
    with pytest.raises(UserError, match="l.npz is a FIFO"):
        run("decode l.npz --out k.npz")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no image"):
        run("reconstruct empty --out k.npz")


def test_sample_lays_transparency_on_the_background(run, tmp_path):
    Image.new("RGBA", (8, 8), (1, 2, 3, 0)).save("clear.png")
    for name in ("white", "black"):
        Image.new("RGB", (8, 8), name).save(f"{name}.png")
        run(f"encode {name}.png --out {name}.npz")
        background = "" if name == "white" else f" --background {name}"
        run(f"encode clear.png --out clear-{name}.npz{background}")
        with np.load(f"{name}.npz") as a, np.load(f"clear-{name}.npz") as b:
            assert all((a[key] == b[key]).all() for key in a.files if key[0] in "zr")
    with pytest.raises(UserError, match="'#12'; it must be a colour's name or '#rrggbb'"):
        run("encode clear.png --out c.npz --background '#12'")


# ---- shells, Pythons -------------------------------------------------------------------------


@pytest.mark.parametrize("script", sorted(p.name for p in ROOT.glob("setup_*.sh")))
@pytest.mark.parametrize("argument", ["x", "-h", None])
def test_scripts_refuse_a_shell_that_is_no_bash(tmp_path, script, argument):
    shell = shutil.which("dash") or shutil.which("busybox") or pytest.skip("every shell is a bash")
    argv = [shell, *(["sh"] if "busybox" in shell else []), ROOT / script]
    done = subprocess.run(
        [*argv, *([argument] if argument else [])],
        cwd=tmp_path, env=ENV, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "bash" in done.stderr and done.stderr.startswith("error: ")
    assert list(tmp_path.iterdir()) == []


def fake_python(path, version):
    """A program that says it is a Python of a version, and makes a .venv of itself."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"""#!/bin/sh
case "$1 $2" in
  "--version ") echo Python {version} ;;
  "-c import sys; sys.exit(sys.version_info < (3, 11))") exit {int(version < "3.11")} ;;
  "-m venv") mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
  *) echo "$@" >> calls ;;
esac
"""
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def make(folder, *argv):
    done = subprocess.run(
        ["make", *argv], cwd=folder, env=ENV, capture_output=True, text=True, timeout=600
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make")
def test_the_makefile_names_the_python_it_needs_first(tmp_path):
    for name in ("Makefile", "requirements.txt", "requirements-dev.txt"):
        shutil.copy(ROOT / name, tmp_path)
    fake_python(tmp_path / "old" / "python", "3.10.4")
    status, out, errors = make(tmp_path, "test", "PYTHON=old/python")
    assert status != 0 and not (tmp_path / "calls").exists() and not (tmp_path / ".venv").exists()
    assert "error: Python 3.11 or newer is needed, old/python is Python 3.10.4" in errors

    # A .venv of the old one is no reason to go on with it; what lies in it is kept.
    fake_python(tmp_path / ".venv" / "bin" / "python", "3.10.4")
    (tmp_path / ".venv" / "mine").touch()
    fake_python(tmp_path / "new" / "python", "3.12.1")
    (tmp_path / ".venv" / "requirements-dev").touch()  # as if all were installed
    status, out, errors = make(tmp_path, "test", "PYTHON=new/python")
    assert status == 0, errors
    [aside] = tmp_path.glob(".venv-old-*")
    assert (aside / "mine").exists() and aside.name in out
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[0] == "-m pip install --quiet -r requirements-dev.txt" and "pytest" in calls[-1]
    # A good one is taken as it is, whatever `python3` is by now.
    status, out, errors = make(tmp_path, "test", "PYTHON=old/python")
    assert status == 0 and len(list(tmp_path.glob(".venv-old-*"))) == 1
    (tmp_path / "saved_models").mkdir()
    assert make(tmp_path, "clean")[0] == 0
    assert (tmp_path / "saved_models").exists() and not (tmp_path / ".venv").exists()


def test_a_log_that_is_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "latest-log.jsonl")
    with pytest.raises(UserError, match="latest-log.jsonl is a FIFO: name a PREFIX-log.jsonl"):
        read_log(tmp_path / "latest-log.jsonl")


def nobody():
    """In the process: a user without a home folder whom the system does not know."""

    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    pwd.getpwuid = unknown
    for name in ("HOME", "XDG_CACHE_HOME"):
        os.environ.pop(name, None)


def test_a_user_without_a_home_trains_on_own_images(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for i, image in enumerate(noise(40, 8)):
        Image.fromarray(image).save(photos / f"{i}.png")
    argv = [*SMALL, "--dataset", "images", "--image_size", "8", "--data_root", photos,
            "--n_batch", "10", "--num_epochs", "1", "--save_dir", tmp_path]  # fmt: skip
    status, text = Run(argv, tmp_path / "out", nobody).wait()
    assert status == 0, text
    assert (photos / ".vdvae" / "8.npy").exists()
