"""Labels of own images: by folders, by a JSON file, in an array's order; kept, refused, grown."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from fakes import assert_refused, images_of, noise, open_all, own_H
from PIL import Image
from runs import Run, log_of

import logs
from data import set_up_data
from label_files import labels_of_files, sorted_names
from own_images import keep_image_record


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def add(root, names, seed=0):
    for i, name in enumerate(names):
        image = np.random.default_rng((seed, i)).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(root / name)


@pytest.fixture
def photos(tmp_path):
    """40 images: 16 of cat, 16 of dog (some deeper), 8 in the root."""
    root = tmp_path / "photos"
    add(root, [f"dog/{'deep/' * (i % 2)}{i:02}.png" for i in range(16)], 1)
    add(root, [f"cat/{i:02}.png" for i in range(16)], 2)
    add(root, [f"{i:02}.png" for i in range(8)], 3)
    return root


def label_of_name(H):
    """{name: label} of all images of H's data set, by the files' names."""
    found = {}
    for images in open_all(H):
        for i, number in enumerate(images.indices):
            item = images[i]
            found[H.image_record["files"][number]] = int(item[1])
            picture = np.asarray(Image.open(Path(H.data_root, H.image_record["files"][number])))
            assert (item[0].numpy() == picture).all()
    return found


def test_folders(photos, capsys, tmp_path):
    H, log = own_H(photos, 8, tmp_path / "run", labels="folders"), tmp_path / "run" / "log.txt"
    logs.buffer_log()  # as train.py does
    found = label_of_name(H)
    assert "have no label" not in capsys.readouterr().out and not log.exists()
    logs.flush_log()
    assert "8 of 40 images have no label" in log.read_text()
    assert H.label_names == ["cat", "dog"] and H.n_labels == 2
    assert all(label == {"c": 0, "d": 1}.get(name[0], -1) for name, label in found.items())
    assert len(found) == 40 and "8 of 40 images have no label" in capsys.readouterr().out
    assert H.image_record["label_names"] == ["cat", "dog"]


@pytest.mark.parametrize(
    "names, ordered",
    [
        ("10 9 2 -1", "-1 2 9 10"),
        ("b10 b9 a", "a b10 b9"),
        ("10 x 9", "9 10 x"),
    ],
)
def test_order(names, ordered):
    assert sorted_names(names.split()) == ordered.split()


def write(path, labels):
    path.write_text(json.dumps({"labels": labels}))
    return str(path)


def test_a_file_of_pairs(photos, tmp_path, capsys):
    pairs = [["cat/03.png", 10], ["dog/00.png", "9"], ["05.png", 9]]
    H = own_H(photos, 8, labels=write(tmp_path / "dataset.json", pairs))
    found = label_of_name(H)
    assert H.label_names == ["9", "10"]
    assert {name: label for name, label in found.items() if label >= 0} == {
        "cat/03.png": 1, "dog/00.png": 0, "05.png": 0,
    }  # fmt: skip
    assert "37 of 40 images have no label" in capsys.readouterr().out


def test_an_array_s_labels(tmp_path):
    np.save(tmp_path / "a.npy", noise(30, 8))
    labels = [None if i == 4 else f"class {i % 3}" for i in range(30)]
    H = own_H(tmp_path / "a.npy", 8, labels=write(tmp_path / "l.json", labels))
    parts = open_all(H)
    assert H.label_names == ["class 0", "class 1", "class 2"]
    for images in parts:
        for i, number in enumerate(images.indices):
            assert images[i][1] == (-1 if number == 4 else number % 3)
    write(tmp_path / "l.json", labels[:-1])
    assert_refused(lambda: set_up_data(H), "29 labels", "30 images")
    H = own_H(tmp_path / "a.npy", 8, labels="folders")
    assert_refused(lambda: set_up_data(H), "folders", "FILE.json")


@pytest.mark.parametrize(
    "content, words",
    [
        ("{", ["l.json"]),
        ('{"labels": null}', ['no list under the key "labels"']),
        ("[]", ["no list"]),
        ('{"labels": [["nowhere.png", 1]]}', ["nowhere.png is not in"]),
        ('{"labels": [["cat/03.png", [0.1, 0.9]]]}', ["cat/03.png", "[0.1, 0.9]"]),
        ('{"labels": [["cat/03.png", true]]}', ["True"]),
        ('{"labels": [["cat/03.png", 1.5]]}', ["1.5"]),
        ('{"labels": [["cat/03.png", "a,b"]]}', ["'a,b'", "rename"]),
        ('{"labels": [["cat/03.png", "random"]]}', ["'random'"]),
        ('{"labels": [["cat/03.png", 1], ["cat/03.png", 2]]}', ["two labels, 1 and 2"]),
        ('{"labels": [3]}', ["3 is no pair"]),
        ('{"labels": []}', ["labels of none"]),
    ],
)
def test_files_that_are_refused(content, words, photos, tmp_path):
    (tmp_path / "l.json").write_text(content)
    H = own_H(photos, 8, labels=str(tmp_path / "l.json"))
    assert_refused(lambda: set_up_data(H), "--labels", *words)


def test_other_refusals(photos, tmp_path):
    assert_refused(lambda: set_up_data(own_H(photos, 8, labels=tmp_path / "no.json")), "can't be")
    (photos / "cat").rename(photos / "none")
    assert_refused(lambda: set_up_data(own_H(photos, 8, labels="folders")), "'none'", "rename")
    shutil.rmtree(photos / "none")
    shutil.rmtree(photos / "dog")
    assert_refused(lambda: set_up_data(own_H(photos, 8, labels="folders")), "no picture")
    assert_refused(lambda: labels_of_files("folders", photos, ["all/1.png"]), "'all'")


def test_a_run_keeps_its_labels(photos, tmp_path):
    run = tmp_path / "run"
    H = own_H(photos, 8, run, labels="folders")
    open_all(H)
    keep_image_record(H)
    open_all(own_H(photos, 8, run, labels="folders"))  # the same again
    pairs = [[f"cat/{i:02}.png", "dog"] for i in range(16)]
    other = own_H(photos, 8, run, labels=write(tmp_path / "l.json", pairs))
    assert_refused(lambda: set_up_data(other), "images.json", "other labels")


def test_grown(photos, tmp_path):
    run = tmp_path / "run"
    open_all(H := own_H(photos, 8, run, labels="folders"))
    keep_image_record(H)
    add(photos, [f"cat/x{i:02}.png" for i in range(6)], 7)
    H = own_H(photos, 8, run, labels="folders")
    H.grow = True
    found = label_of_name(H)
    assert found["cat/x03.png"] == 0 and found["dog/00.png"] == 1 and len(found) == 46
    keep_image_record(H)
    add(photos, ["bird/0.png"], 8)
    H = own_H(photos, 8, run, labels="folders")
    H.update(grow=True, label_names=["cat", "dog"], n_labels=2)
    from own_images import load_images

    H.image_channels = 3
    assert_refused(lambda: load_images(H), "'bird'", "cat, dog")


def test_grey_own_images(photos, tmp_path):
    H = own_H(photos, 8, image_channels=1)
    train, _, _ = open_all(H)
    name = H.image_record["files"][train.indices[3]]
    grey = np.asarray(Image.open(photos / name).convert("L"))
    assert (train[3][0].numpy()[..., 0] == grey).all() and train[3][0].shape == (8, 8, 1)
    assert (photos / ".vdvae" / "8-grey.npy").exists() and H.image_record["packing"][2] == 1
    assert H.image_channels == 1
    rgb = own_H(photos, 8)
    assert open_all(rgb)[0][0][0].shape == (8, 8, 3)  # beside it
    assert (photos / ".vdvae" / "8.npy").exists()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", [(30, 8, 8), (30, 8, 8, 1), (30, 8, 8, 3)])
def test_arrays_of_one_channel_or_three(shape, channels, tmp_path):
    array = noise(30, 8)[..., : shape[-1] if len(shape) == 4 else 1].reshape(shape)
    np.save(tmp_path / "a.npy", array)
    H = own_H(tmp_path / "a.npy", None, image_channels=channels)
    train, _, _ = open_all(H)
    found = images_of(train, range(4))
    assert found.shape == (4, 8, 8, channels)
    original = array[train.indices[:4]]
    if shape[3:] == (3,) and channels == 1:
        expected = np.stack([np.asarray(Image.fromarray(i).convert("L")) for i in original])
        assert (found[..., 0] == expected).all()
    else:
        assert (found == original.reshape(4, 8, 8, -1)).all()


def test_a_run_on_labelled_folders(photos, tmp_path):
    """Trained, resumed, evaluated with and without labels, sampled by names."""
    argv = ("--hps digits --dataset images --image_size 8 --width 8 --zdim 2 --num_mixtures 2 "
            "--enc_blocks 8x1,8d8,1x1 --dec_blocks 1x1,8m1 --n_batch 6 --num_epochs 1 "
            "--iters_per_print 3 --num_images_visualize 2").split()  # fmt: skip
    argv += ["--data_root", photos, "--save_dir", tmp_path / "runs"]

    def train(*more):
        return Run([*argv, *more], tmp_path / "out").wait()

    status, text = train("--labels", "folders", "--image_channels", "1")
    assert status == 0, text
    assert "labels    2 (cat, dog)" in text and "8x8, grey" in text
    run = tmp_path / "runs" / "test"
    state = json.loads((run / "latest-state.json").read_text())["hparams"]
    assert state["label_names"] == ["cat", "dog"] and sum(state["label_counts"]) == 36
    [line] = [e for e in log_of(run) if e.get("type") == "eval_loss"]
    assert line["labels"] == "given"
    # Channels and labels are the run's own, where the command line names none.
    status, text = train("--resume", "--num_epochs", "2")
    assert status == 0, text
    evaluation = ("--test_eval", "--restore_ema_path", run / "latest-model-ema.th")
    results = {}
    for label in ("given", "none"):
        status, text = train(*evaluation, "--label", label)
        assert status == 0, text
        assert f"labels: {label}" in text.splitlines()[-1]
        results[label] = text.splitlines()[-1].partition("elbo")[2]
    shutil.rmtree(photos / "dog")
    assert train("--resume", "--num_epochs", "3")[0] == 2
