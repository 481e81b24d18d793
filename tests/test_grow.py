"""A run's images and what becomes of them: added ones, other ones, those of an older version."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from fakes import assert_refused, noise, open_all, own_H
from PIL import Image
from runs import Run, events

import own_images
from data import set_up_data
from decoding import decode_as_before, fit
from own_images import keep_image_record, measure, split_own
from packing import state_of


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """No test writes to the cache of who runs it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def add(root, names, seed=0):
    root.mkdir(exist_ok=True)
    for i, name in enumerate(names):
        image = np.random.default_rng((seed, i)).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(image).save(root / name)


def parts_by_name(H):
    """{part: names of its images}; keeps the record as a run that begins does."""
    H.test_eval = False
    parts = open_all(H)
    files = H.image_record["files"]
    if H.logdir:
        keep_image_record(H)
    by_name = {
        part: [files[i] for i in images.indices]
        for part, images in zip(("train", "valid", "test"), parts, strict=True)
    }
    for images, names in zip(parts, by_name.values(), strict=True):
        for i, name in enumerate(names):  # the names are those of the pictures
            picture = np.asarray(Image.open(Path(H.data_root, name)).convert("RGB"))
            assert (images[i][0].numpy() == picture).all()
    return by_name


def grown_folder(tmp_path, more=25):
    """A run on 40 images, more of them then, whose names lie between theirs; parts of the 40."""
    root, run = tmp_path / "photos", tmp_path / "run"
    add(root, [f"b{i:02}.png" for i in range(40)])
    before = parts_by_name(H := own_H(root, 8, run))
    add(root, [f"{'ac'[i % 2]}{i:02}.png" for i in range(more)], seed=1)
    return root, run, H, before


def test_old_images_keep_their_part_and_new_ones_are_split_by_themselves(tmp_path, capsys):
    root, run, first, before = grown_folder(tmp_path)
    record = json.loads((run / "images.json").read_text())
    assert record["files"] == sorted(p.name for p in root.glob("b*.png"))
    with pytest.raises(own_images.UserError) as refused:
        set_up_data(own_H(root, 8, run))
    message = str(refused.value)
    assert "25 new, first a00.png" in message and "--grow" in message and "delete" not in message
    assert json.loads((run / "images.json").read_text()) == record

    H = own_H(root, 8, run)
    H.grow = True
    capsys.readouterr()
    after = parts_by_name(H)
    assert "25 images are new: 23 to train on, 1 to validate, 1 to test" in capsys.readouterr().out
    assert (H.image_mean, H.image_std) == (first.image_mean, first.image_std)
    new = sorted(p.name for p in root.glob("[ac]*.png"))
    for part, numbers in zip(("valid", "test"), split_own(25), strict=True):
        assert after[part] == before[part] + [new[i] for i in numbers]
    assert set(before["train"]) <= set(after["train"]) and sum(map(len, after.values())) == 65

    # From now on it is the run's set, with --grow or without, and may grow again.
    assert parts_by_name(own_H(root, 8, run)) == parts_by_name(H) == after
    add(root, ["aa.png", "zz.png"], seed=2)  # too few for a split in three: they train
    again = parts_by_name(H)
    assert again["valid"] == after["valid"] and again["test"] == after["test"]
    assert {"aa.png", "zz.png"} <= set(again["train"])


def test_what_is_no_growth_is_refused_and_nothing_is_changed(tmp_path):
    root, run, H, _ = grown_folder(tmp_path)
    record = (run / "images.json").read_bytes()
    H.grow = True

    def refused(*words):
        assert_refused(lambda: set_up_data(H), *words)
        assert (run / "images.json").read_bytes() == record

    (root / "b07.png").rename(root / "renamed.png")
    refused("1 images that", "first b07.png", "--desc")
    add(root, ["b07.png"], seed=9)
    refused("are other pictures now", "--desc")
    H.grow = False
    (root / "b07.png").unlink()
    refused("26 new, first a00.png; 1 gone, first b07.png", "put its images back")
    (root / "renamed.png").rename(root / "b07.png")
    H.grow = True
    set_up_data(H)

    np.save(tmp_path / "a.npy", noise(30, 8))
    run2 = tmp_path / "run2"
    H = own_H(tmp_path / "a.npy", 8, run2)
    set_up_data(H)
    keep_image_record(H)
    np.save(tmp_path / "a.npy", noise(40, 8))
    H.grow = True
    assert_refused(lambda: set_up_data(H), "--grow", "a.npy is one .npy")
    for text in ("{", '{"mean": 1}', "[]"):
        (run / "images.json").write_text(text)
        with pytest.raises(own_images.UserError, match="put a copy of it back") as error:
            set_up_data(own_H(root, 8, run))
        assert "delete" not in str(error.value)


def test_weights_of_a_run_lend_their_split_to_a_grown_folder(tmp_path, capsys):
    root, run, first, before = grown_folder(tmp_path)
    H = own_H(root, 8, tmp_path / "tuned")
    H.restore_path = str(run / "latest-model.th")
    set_up_data(H)
    assert "all 40 images" in (printed := capsys.readouterr().out) and "--grow keeps" in printed
    H.grow = True
    after = parts_by_name(H)
    assert H.image_mean == first.image_mean
    assert all(set(before[part]) <= set(after[part]) for part in before)
    # Other images have nothing to do with it.
    add(tmp_path / "others", [f"x{i}.png" for i in range(30)], seed=3)
    capsys.readouterr()
    H = own_H(tmp_path / "others", 8, tmp_path / "third", restore_path=run / "latest-model.th")
    set_up_data(H)
    assert "--grow" not in capsys.readouterr().out


# ---- older versions --------------------------------------------------------------------------


def as_before(root, run, size=8):
    """The packing and the record of a run of version 1; the array."""
    names = sorted(p.name for p in root.iterdir() if p.suffix == ".png")
    array = np.stack([fit(decode_as_before((root / name).read_bytes()), size) for name in names])
    facts = measure(array)
    (root / ".vdvae").mkdir(exist_ok=True)
    np.save(root / ".vdvae" / f"{size}.npy", array)
    manifest = {"source": state_of(root, names), **facts, "bad": {}, "files": names}
    (root / ".vdvae" / f"{size}.json").write_text(json.dumps(manifest))
    valid, test = split_own(len(array))
    record = {"image_size": size, "n_images": len(array), "valid": valid.tolist(),
              "test": test.tolist(), **facts}  # fmt: skip
    run.mkdir(exist_ok=True)
    (run / "images.json").write_text(json.dumps(record))
    return array


def transparent(root, names):
    add(root, names)
    for name in names[::2]:
        image = Image.open(root / name)
        image.putalpha(Image.linear_gradient("L").resize((8, 8)))
        image.save(root / name)


@pytest.mark.parametrize("cached", [True, False])
def test_an_older_run_goes_on_with_the_pictures_as_it_knew_them(tmp_path, capsys, cached):
    root, run = tmp_path / "photos", tmp_path / "run"
    transparent(root, [f"{i:02}.png" for i in range(30)])
    array = as_before(root, run)
    Image.new("RGB", (8, 8)).save(root / "new_kind.bmp")  # which version 1 left out
    digest = hashlib.sha256((root / ".vdvae" / "8.npy").read_bytes()).hexdigest()
    if not cached:
        shutil.rmtree(root / ".vdvae")
    record = json.loads((run / "images.json").read_text())
    for _ in range(2):
        H = own_H(root, 8, run)
        parts = open_all(H)
        assert (parts[0].array[np.arange(30)] == array).all()
        assert [part.indices.tolist() for part in parts[1:]] == [record["valid"], record["test"]]
        assert "alpha dropped" in (printed := capsys.readouterr().out)
        assert ("packed" in printed) == (not cached and _ == 0)
        # Meanwhile a new run packs the folder anew, beside it.
        other = open_all(own_H(root, 8, tmp_path / "other"))
        assert len(other[0].array) == 31 and (other[0].array[[0]] != array[0]).any()
        capsys.readouterr()
    if cached:  # what the older version has made is there still
        kept = [p.read_bytes() for p in (root / ".vdvae").glob("8.*.npy")]
        assert digest in [hashlib.sha256(content).hexdigest() for content in kept]
    keep_image_record(H)
    assert len(json.loads((run / "images.json").read_text())["files"]) == 30  # from now on

    H.background = "black"
    assert_refused(lambda: set_up_data(H), "--background black", "alpha dropped", "--desc")
    # Weights of that run in a folder of their own: the same pictures, the same split.
    H = own_H(root, 8, tmp_path / "third", restore_path=run / "latest-model.th")
    assert open_all(H)[2].indices.tolist() == record["test"]


@pytest.mark.parametrize("tried", [False, True])
def test_an_older_run_grows_by_the_names_of_its_packing(tmp_path, tried):
    root, run = tmp_path / "photos", tmp_path / "run"
    add(root, names := [f"b{i:02}.png" for i in range(30)])
    as_before(root, run)
    record = json.loads((run / "images.json").read_text())
    add(root, [f"a{i}.png" for i in range(9)], seed=1)
    H = own_H(root, 8, run)
    if tried:  # without it at first, and a new run packs anew
        open_all(own_H(root, 8, tmp_path / "new"))
        assert_refused(lambda: set_up_data(H), "9 new, first a0.png", "--grow")
    H.grow = True
    after = parts_by_name(H)
    assert {names[i] for i in record["test"]} <= set(after["test"]) and len(after["test"]) == 2

    # Without any packing nobody knows the names: there is a way, and it deletes nothing.
    shutil.rmtree(root / ".vdvae")
    (run / "images.json").write_text(json.dumps(record))
    assert_refused(lambda: set_up_data(H), "names of its files are not known", "take the new ones")
    for name in (f"a{i}.png" for i in range(9)):
        (root / name).rename(tmp_path / name)
    H.grow = False
    open_all(H)
    keep_image_record(H)
    for name in (f"a{i}.png" for i in range(9)):
        (tmp_path / name).rename(root / name)
    H.grow = True
    assert parts_by_name(H) == after


def test_a_background_belongs_to_the_run(tmp_path):
    root, run = tmp_path / "photos", tmp_path / "run"
    transparent(root, [f"{i:02}.png" for i in range(30)])
    H = own_H(root, 8, run, background="navy")
    array = open_all(H)[0].array[np.arange(30)]
    keep_image_record(H)
    again = own_H(root, 8, run)  # the run knows it
    assert (open_all(again)[0].array[np.arange(30)] == array).all()
    assert (open_all(own_H(root, 8))[0].array[np.arange(30)] != array).any()
    H.background = "red"
    assert_refused(lambda: set_up_data(H), "--background red", "#000080", "--desc")
    H.background, H.given_options = "white", ["background", "data_root"]  # the default by name
    assert_refused(lambda: set_up_data(H), "--background white", "#000080", "--desc")


# ---- a run -----------------------------------------------------------------------------------

OWN = (
    "--hps images32 --image_size 8 --device cpu --width 8 --custom_width_str= --zdim 2 "
    "--num_mixtures 2 --enc_blocks 8x1,8d8,1x1 --dec_blocks 1x1,8m1 --n_batch 4 --warmup_iters 0 "
    "--no_bias_above 8 --epochs_per_eval 1 --iters_per_print 1 --num_images_visualize 1 "
    "--num_variables_visualize 0 --num_temperatures_visualize 1"
).split()


def test_a_run_goes_on_with_more_images(tmp_path):
    root, run = tmp_path / "photos", tmp_path / "test"
    add(root, [f"b{i:02}.png" for i in range(40)])  # 36 to train on: 9 steps an epoch

    def train(*argv):
        argv = [*OWN, "--data_root", root, "--save_dir", tmp_path, *argv]
        return Run(argv, tmp_path / "out", environ=os.environ | {"HOME": str(tmp_path)}).wait()

    status, text = train("--num_epochs", "10", "--max_skips", "1", "--skip_threshold", "1e-9",
                         "--iters_per_save", "1")  # fmt: skip
    assert status == 2 and "--max_skips" in text  # in the middle of the first epoch
    state = json.loads((run / "latest-state.json").read_text())
    assert 0 < state["position"] < 36 and state["epoch"] == 0
    add(root, [f"a{i:02}.png" for i in range(40)], seed=1)
    before = (run / "images.json").read_bytes()
    status, text = train("--num_epochs", "1", "--resume")
    assert status == 2 and text.count("--grow") == 1 and "delete" not in text
    assert (run / "images.json").read_bytes() == before
    # Killed after it has noted the images, before it has saved: the next start knows as well.
    status, text = train("--num_epochs", "1", "--resume", "--grow", "--data_root", root)
    assert status == 0 and "epoch 0 begins anew" in text
    steps = [e["step"] for e in events(run) if e.get("type") == "train_loss"]
    assert max(steps) == state["step"] + 18  # 72 images
    status, text = train("--num_epochs", "2", "--resume")
    assert status == 0 and "anew" not in text
    assert (
        max(e["step"] for e in events(run) if e.get("type") == "train_loss") == state["step"] + 36
    )


def test_a_kill_between_the_record_and_the_first_save_loses_nothing(tmp_path):
    root, run, H, _ = grown_folder(tmp_path)
    old = {"image_digest": H.image_digest}
    assert not own_images.epoch_begins_anew(H, old)
    H.grow = True
    parts_by_name(H)  # which keeps the record
    later = own_H(root, 8, run)
    set_up_data(later)
    assert own_images.epoch_begins_anew(later, old)
    assert own_images.epoch_begins_anew(later, {})  # a checkpoint from before there was growth
    assert not own_images.epoch_begins_anew(later, {"image_digest": later.image_digest})
