"""Copies of a run's folder, by whatever means: `--resume` goes on, or says what is missing."""

import errno
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from runs import SMALL, Run, Signal, check_latest, figures, hashes
from torch import nn

import checkpoints
from checkpoints import complete_checkpoints, repair_checkpoints, write_checkpoint
from errors import UserError
from hps import Hyperparams
from resuming import newest_checkpoint, refuse_half_a_checkpoint

RUN = [*SMALL, "--iters_per_save", "4", "--iters_per_ckpt", "5", "--num_epochs", "2"]


# ---- ways to copy ----------------------------------------------------------------------------


def sh(*words, cwd=None):
    subprocess.run([str(word) for word in words], check=True, cwd=cwd)


def tar(source, target, *options):
    target.mkdir()
    sh("tar", "cf", f"{target}.tar", *options, ".", cwd=source)
    sh("tar", "xf", f"{target}.tar", cwd=target)


def latest_alone(source, target, *options):
    target.mkdir()
    sh("cp", *options, *source.glob("latest-*"), target)


def latest_over_an_older_copy(source, target):
    """As rsync -L does, which puts files in the place of links."""
    tar(source, target)
    for path in source.glob("latest-*"):
        (target / path.name).unlink()
        shutil.copyfile(path, target / path.name)
    for path in [*(target / "sets").glob("0*-latest")]:
        state = json.loads((path / "state.json").read_text())
        if state["step"] == check_latest(source):
            shutil.rmtree(path)


def twice(source, target):
    """A copy of a copy."""
    sh("cp", "-rL", source, f"{target}-first")
    sh("cp", "-rL", f"{target}-first", target)


def without_names(source, target):
    """As rsync -r does, which passes over links."""
    tar(source, target)
    for path in target.rglob("*"):
        if path.is_symlink():
            path.unlink()


def linked_names_alone(source, target):
    """The links sets/latest are folders, what they pointed to is left out."""
    sh("cp", "-rL", source, target)
    for path in (target / "sets").glob("0*"):
        shutil.rmtree(path)
    for path in target.glob("latest-*"):
        path.unlink()


COPIES = {
    "cp -rL": lambda source, target: sh("cp", "-rL", source, target),
    "cp -a": lambda source, target: sh("cp", "-a", source, target),
    "cp -L latest-*": lambda source, target: latest_alone(source, target, "-L"),
    "cp -L over an older copy": latest_over_an_older_copy,
    "tar": tar,
    "tar -h": lambda source, target: tar(source, target, "-h"),
    "python": lambda source, target: shutil.copytree(source, target),
    "a copy of a copy": twice,
    "rsync -r": without_names,
    "sets/latest alone": linked_names_alone,
}


# ---- whole runs ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert Run([*RUN, "--save_dir", folder], folder / "out").wait()[0] == 0
    return folder / "test"


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The folder of a run that got a signal in step 11: latest is of step 11, iter-10 of 10."""
    folder = tmp_path_factory.mktemp("stopped")
    run = Run([*RUN, "--save_dir", folder], folder / "out", Signal(signal.SIGTERM, "step", 11))
    assert run.wait()[0] == 143 and check_latest(folder / "test") == 11
    return folder / "test"


def check_ordinary(folder):
    """No copies are left: a name is a link, what is in sets/ a checkpoint or a link to one."""
    for path in (p for p in folder.rglob("*") if p.parent.name in ("sets", folder.name)):
        assert not path.name.endswith(".partial") and path.exists(), path
        if path.parent.name == "sets":
            assert path.name[0] == "0" or path.is_symlink(), path
        elif path.name.startswith(("latest-", "iter-")):
            assert path.is_symlink(), path
    found = complete_checkpoints(folder)
    assert len(found) == len({prefix for _, prefix, _ in found}) + 1  # one older `latest`


@pytest.mark.parametrize(
    "way", [pytest.param(w, marks=pytest.mark.slow) if w != "cp -rL" else w
            for w in COPIES]
)  # fmt: skip
def test_a_copy_goes_on_bit_for_bit(way, stopped, whole, tmp_path):
    copy = tmp_path / "other"
    COPIES[way](stopped, copy)
    options = [*RUN, "--save_dir", tmp_path, "--desc", "other", "--resume"]
    status, text = Run(options, tmp_path / "out").wait()
    warnings = [
        line for line in text.splitlines() if "WARNING" in line and "of the EMA" not in line
    ]
    assert status == 0 and ": step 11, epoch 0" in text and not warnings, text
    assert hashes(copy) == hashes(whole)
    old, new = figures(whole), figures(copy)
    for key, line in new.items():
        assert json.loads(line) | {"model": "test"} == json.loads(old[key])
    check_ordinary(copy)


def test_an_interrupted_copy_says_which_file_is_missing(stopped, tmp_path):
    copy = tmp_path / "other"
    latest_alone(stopped, copy, "-L")
    (copy / "latest-state.json").unlink()  # the last of them
    options = [*RUN, "--save_dir", tmp_path, "--desc", "other", "--resume"]
    status, text = Run(options, tmp_path / "out").wait()
    assert status == 2 and f"{copy}/latest-state.json is missing" in text.splitlines()[-1]
    assert {p.name for p in copy.iterdir()} <= {p.name for p in stopped.iterdir()}


# ---- what is found in a folder, and made of it -----------------------------------------------


def save(folder, step, prefix="latest"):
    model = nn.Linear(3, 2)
    nn.init.constant_(model.weight, step)
    H = Hyperparams(save_dir=str(folder), progress={"step": step})
    optimizer = torch.optim.AdamW(model.parameters())
    write_checkpoint(os.path.join(folder, prefix), model, model, optimizer, H)


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "log.jsonl").write_text("{}\n")
    for step, prefix in ((1, "latest"), (2, "iter-2"), (3, "latest"), (4, "iter-4"), (5, "latest")):
        save(folder, step, prefix)
    return folder


def steps_in(folder):
    """The steps of the complete checkpoints, newest first."""
    stems = [f"{path}/" for _, _, path in complete_checkpoints(folder)]
    return [checkpoints.read_whole(stem)["step"] for stem in stems]


@pytest.mark.parametrize("way", COPIES)
def test_a_start_makes_a_copy_an_ordinary_folder(way, source, tmp_path):
    """And so does the next save of a program that knows of no starts."""
    for first in (repair_checkpoints, lambda folder: save(folder, 6)):
        copy = tmp_path / f"copy{first is repair_checkpoints}"
        COPIES[way](source, copy)
        assert newest_checkpoint(str(copy), print)[1]["step"] == 5
        first(copy)
        step = 5 if first is repair_checkpoints else 6
        assert check_latest(copy) == step
        assert newest_checkpoint(str(copy), print)[1]["step"] == step
        repair_checkpoints(copy)
        before = {p: os.lstat(p).st_ino for p in copy.rglob("*")}
        repair_checkpoints(copy)
        assert before == {p: os.lstat(p).st_ino for p in copy.rglob("*")}  # nothing left to do
        assert steps_in(copy)[0] == step and len(steps_in(copy)) == len(set(steps_in(copy)))
        for path in copy.glob("iter-*-model.th"):
            assert torch.load(path)["weight"][0, 0] == int(path.name.split("-")[1])
        assert check_latest(copy) == step and not [*copy.rglob("*.partial")]
        assert all(p.exists() for p in copy.rglob("*"))


@pytest.mark.parametrize("damage", ["cut", "gone"])
@pytest.mark.parametrize("name", ["model.th", "model-ema.th", "opt.th", "log.jsonl", "state.json"])
@pytest.mark.parametrize("way", ["cp -L latest-*", "cp -rL", "tar"])
def test_half_a_copy_names_the_file_or_takes_what_is_whole(way, name, damage, source, tmp_path):
    """cp -rL has three copies of the newest checkpoint: each of them by itself is enough."""
    copy, printed = tmp_path / "copy", []
    COPIES[way](source, copy)

    def strike(path):
        if damage == "gone":
            path.unlink()
        else:
            with open(path, "r+b") as file:
                file.truncate(os.path.getsize(path) - 1)

    stems = {"cp -L latest-*": [f"{copy}/latest-"], "tar": [f"{copy}/sets/000005-latest/"]}
    stems = stems.get(
        way, [f"{copy}/sets/000005-latest/", f"{copy}/sets/latest/", f"{copy}/latest-"]
    )
    for stem in stems[:-1]:
        strike(Path(f"{stem}{name}"))
        assert newest_checkpoint(str(copy), printed.append)[1]["step"] == 5
    strike(Path(f"{stems[-1]}{name}"))
    if way == "cp -L latest-*":
        with pytest.raises(UserError, match=name):
            assert newest_checkpoint(str(copy), printed.append) is None
            refuse_half_a_checkpoint(str(copy))
        return
    assert newest_checkpoint(str(copy), printed.append)[1]["step"] == 4
    assert any(f"{name} is" in line or f"no {name}" in line for line in printed), printed
    repair_checkpoints(copy)
    save(copy, 6)
    assert check_latest(copy) == 6 and newest_checkpoint(str(copy), print)[1]["step"] == 6


def test_the_whole_copy_of_a_damaged_checkpoint_takes_its_place(source, tmp_path):
    copy = tmp_path / "copy"
    COPIES["cp -rL"](source, copy)
    for path in (copy / "sets").glob("0*-*/opt.th"):
        path.write_bytes(b"cut")
    repair_checkpoints(copy)
    for _, prefix, path in complete_checkpoints(copy):
        if (prefix, Path(path).name) != ("latest", "000003-latest"):  # of it there was no copy
            assert checkpoints.is_whole(f"{path}/"), path
    assert check_latest(copy) == 5 and newest_checkpoint(str(copy), print)[1]["step"] == 5


def test_links_to_nothing_are_named(source, tmp_path):
    copy = tmp_path / "copy"
    latest_alone(source, copy, "-P")
    assert newest_checkpoint(str(copy), print) is None
    with pytest.raises(UserError, match=r"latest-state.json is missing \(a link to sets/latest/"):
        refuse_half_a_checkpoint(str(copy))


def test_weights_of_another_program_are_no_half_of_a_copy(tmp_path):
    """Under other names; or where an option says what to start from, see resume_run."""
    (tmp_path / "cifar10-seed0-model-ema.th").touch()
    (tmp_path / "mine-model.th").touch()
    refuse_half_a_checkpoint(str(tmp_path))


def test_an_older_iter_never_passes_for_the_newest(source, tmp_path):
    """A copy of iter-4 whose folder in sets/ is not there."""
    copy = tmp_path / "copy"
    COPIES["cp -rL"](source, copy)
    for path in (copy / "sets").glob("*iter-4"):
        shutil.rmtree(path)
    assert newest_checkpoint(str(copy), print)[1]["step"] == 5
    repair_checkpoints(copy)
    assert steps_in(copy) == [5, 4, 3, 2]
    assert newest_checkpoint(str(copy), print)[1]["step"] == 5
    shutil.rmtree(copy / "sets" / "000005-latest")
    assert newest_checkpoint(str(copy), print)[1]["step"] == 4


@pytest.mark.parametrize("way", ["cp -rL", "tar"])
def test_the_files_of_a_best_evaluation_are_nothing_to_go_on_from(way, tmp_path):
    """Nor are they half of what would be, in a folder that has no more."""
    folder, copy = tmp_path / "source", tmp_path / "copy"
    folder.mkdir()
    H = Hyperparams(save_dir=str(folder), progress={"step": 7})
    write_checkpoint(str(folder / "best"), None, nn.Linear(3, 2), None, H)
    COPIES[way](folder, copy)
    assert newest_checkpoint(str(copy), print) is None
    refuse_half_a_checkpoint(str(copy))
    save(copy, 3)
    repair_checkpoints(copy)
    assert newest_checkpoint(str(copy), print)[1]["step"] == 3
    assert (copy / "best-model-ema.th").is_symlink() and (copy / "best-model-ema.th").exists()
    write_checkpoint(str(copy / "best"), None, nn.Linear(3, 2), None, H)
    assert [p for _, p, _ in complete_checkpoints(copy)].count("best") == 1


@pytest.mark.parametrize("way", COPIES)
def test_overwrite_removes_a_copied_run_and_nothing_else(way, source, tmp_path):
    copy = tmp_path / "copy"
    COPIES[way](source, copy)
    (copy / "sets").mkdir(exist_ok=True)
    for name in ("notes-state.json", "sets/mine", "latest.txt"):
        (copy / name).write_text("mine")
    repair_checkpoints(copy)
    checkpoints.remove_run(copy)
    left = [str(p.relative_to(copy)) for p in copy.rglob("*")]
    assert sorted(left) == ["latest.txt", "notes-state.json", "sets", "sets/mine"]
    COPIES[way](source, tmp_path / "again")
    checkpoints.remove_run(tmp_path / "again")
    assert not [p for p in (tmp_path / "again").rglob("*") if p.name != "lock"]


def test_a_copy_on_a_disk_without_links(source, tmp_path, monkeypatch):
    """The files are copied then."""

    def refuse(*_):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    latest_alone(source, tmp_path / "copy", "-L")
    repair_checkpoints(tmp_path / "copy")
    assert check_latest(tmp_path / "copy") == 5
    assert (tmp_path / "copy" / "latest-model.th").is_symlink()
