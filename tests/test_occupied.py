"""Runs side by side: a folder that holds a run is no place for another, unless the user says so."""

import json
import os
import shutil

import pytest
from runs import SMALL, Run, check_latest, events, hashes

import train
from checkpoints import holds_run, remove_run
from launchers import is_later_attempt

SHORT = [*SMALL, "--num_epochs", "1"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    argv = [*SHORT, "--iters_per_ckpt", "10", "--tensorboard", "--save_dir", folder]
    assert Run(argv, folder / "out").wait()[0] == 0
    return folder / "test"


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of a finished run, save_dir/test."""
    shutil.copytree(finished, tmp_path / "test", symlinks=True)
    return tmp_path / "test"


def contents(folder):
    return {p: (p.read_bytes() if p.is_file() else b"", os.lstat(p).st_mtime_ns, p.is_symlink())
            for p in folder.rglob("*")}  # fmt: skip


def again(folder, *argv, **environ):
    argv = [*SHORT, "--save_dir", folder.parent, *argv]
    return Run(argv, folder.parent / "out", environ=environ).wait()


@pytest.mark.parametrize("other", [[], ["--hps", "photos32"], ["--lr", "0.1", "--dry_run"]])
def test_a_second_run_is_refused_and_nothing_touched(other, folder):
    before = contents(folder)
    status, text = again(folder, *other)
    assert contents(folder) == before
    if "--dry_run" in other:
        assert status == 0 and "memory" in text
    else:
        assert status == 2 and len(text.splitlines()) == 1
        assert all(f"--{word}" in text for word in ("resume", "overwrite", "desc")), text


def test_what_makes_a_folder_one_that_holds_a_run(tmp_path):
    assert not holds_run(tmp_path) and not holds_run(tmp_path / "absent")
    (tmp_path / "log.jsonl").write_text('{"type": "test_loss"}\n{"message": "training model"}\n')
    (tmp_path / "holiday.png").touch()
    assert not holds_run(tmp_path)
    (tmp_path / "log.jsonl").write_text('{"time": "now", "type": "train_loss", "step": 1}\n')
    assert holds_run(tmp_path)
    (tmp_path / "log.jsonl").unlink()
    (tmp_path / "latest-model.th").symlink_to("nowhere")
    assert holds_run(tmp_path)


@pytest.mark.parametrize("name", ["best-model-ema.th", "latest-model.th"])
def test_what_a_run_would_replace_is_not_there_to_be_replaced(name, tmp_path):
    """Such as the best of a run whose large files have been deleted."""
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / name).write_bytes(b"a user's own")
    for more in ([], ["--resume"] if name.startswith("best") else []):
        status, text = again(tmp_path / "test", *more)
        assert status == 2 and len(text.splitlines()) == 1 and "--desc" in text
    left = [p for p in (tmp_path / "test").iterdir() if p.name != "lock"]
    assert [p.name for p in left] == [name] and left[0].read_bytes() == b"a user's own"


def test_a_second_run_on_other_own_images_is_told_of_the_run_not_of_its_record(folder):
    import numpy as np

    rng = np.random.RandomState(0)
    for name in "ab":
        np.save(folder.parent / f"{name}.npy", rng.randint(0, 256, (60, 8, 8, 3), np.uint8))
    for name, words in (("a", None), ("b", "--overwrite")):
        argv = ["--dataset", "images", "--data_root", folder.parent / f"{name}.npy"]
        status, text = again(folder, *argv, "--n_batch", "20", "--desc", "own")
        assert (status, bool(words)) == (2 if words else 0, bool(words)), text
        assert not words or words in text
    status, text = again(folder, *argv, "--n_batch", "20", "--desc", "own", "--overwrite")
    assert status == 0, text


def test_overwrite_removes_the_run_and_nothing_else(folder):
    checkpoint = next((folder / "sets").glob("*-latest"))
    mine = {folder / name: str(name).encode() for name in
            ("notes.txt", "latest-thoughts.md", "samples-best.png", "log.txt.bak", "model.th",
             "sets/readme", checkpoint / "mine.txt")}  # fmt: skip
    for path, content in mine.items():
        path.write_bytes(content)
    (folder / "sets" / "01-holiday").mkdir()
    (folder / "sets" / "01-holiday" / "a.png").touch()
    status, text = again(folder, "--seed", "1", "--overwrite")
    assert status == 0, text
    content = mine.pop(checkpoint / "mine.txt")
    mine[folder / "sets" / f"kept-{checkpoint.name}" / "mine.txt"] = content
    assert {path: path.read_bytes() for path in mine} == mine
    assert (folder / "sets" / "01-holiday" / "a.png").exists()
    assert not list(folder.glob("iter-*")) and check_latest(folder) == 13
    seeds = {e["value"] for e in events(folder) if e.get("key") == "seed"}
    assert seeds == {1} and len(list(folder.glob("events.out*"))) == 0


def test_a_copy_that_followed_the_links_is_removed_whole(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")  # folders and files where there were links
    assert holds_run(tmp_path / "copy")
    remove_run(tmp_path / "copy")
    assert [p.name for p in (tmp_path / "copy").iterdir()] == ["lock"]


def test_a_refused_overwrite_removes_nothing(folder):
    before = contents(folder)
    weights = folder / "latest-model.th"
    for argv in (["--enc_blocks", "8y1"], ["--resume"], ["--n_batch", "5000"],
                 ["--restore_path", weights], ["--init_from", folder]):  # fmt: skip
        status, text = again(folder, "--overwrite", *argv)
        assert status == 2 and contents(folder) == before, (argv, text)


@pytest.mark.parametrize(
    "name, flags",
    [("TORCHELASTIC_RESTART_COUNT", ["--overwrite"]), ("SLURM_RESTART_COUNT", [])],
)
def test_a_later_attempt_goes_on_with_what_the_first_has_made(name, flags, folder):
    before = hashes(folder)
    status, text = again(folder, *flags, **{name: "1"})
    assert status == 0 and "nothing left to do" in text and hashes(folder) == before
    assert [is_later_attempt({name: n}) for n in ("0", "1", "10", "", "x")] == [
        False, True, True, False, False,
    ]  # fmt: skip


def test_the_originals_way_of_going_on_is_not_refused(folder):
    options = []
    for option, name in (("", "model.th"), ("_ema", "model-ema.th"), ("_optimizer", "opt.th"),
                         ("_log", "log.jsonl")):  # fmt: skip
        options += [f"--restore{option}_path", folder / f"latest-{name}"]
    status, text = again(folder, *options, "--num_epochs", "2")
    assert status == 0 and "continuing from step 10" in text, text  # the last that is logged


def test_an_evaluation_in_the_folder_is_not_refused(folder):
    status, text = again(folder, "--test_eval", "--init_from", folder)
    assert status == 0 and "type: test_loss" in text
    assert json.loads((folder / "latest-state.json").read_text())["step"] == 13


def test_a_program_that_calls_train_loop_is_not_refused(folder, monkeypatch):
    H, logprint = train.set_up_hyperparams(
        [str(a) for a in SHORT] + ["--save_dir", str(folder.parent)]
    )
    H, data_train, data_valid, preprocess_fn = train.set_up_data(H)
    vae, ema_vae = train.load_vaes(H, logprint)
    train.train_loop(H, data_train, data_valid, preprocess_fn, vae, ema_vae, logprint)
    assert check_latest(folder) == 13
