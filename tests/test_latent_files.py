"""Embedding files: made a batch at a time, continued, read a batch at a time."""

import json
import resource
import shutil
import zipfile
from collections import namedtuple

import numpy as np
import pytest
import torch
from fakes import RGB_RUN, arr_0, nearly_equal, noise, write_sample_folder
from PIL import Image
from runs import sample_in

import latent_files
from batches import preprocess
from errors import UserError
from image_files import read_images
from synthesis import latents_of
from vae import VAE
from weights import load_model, weights_hash


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """ema.th, the weights of the preset digits; a.png and b.jpg; eleven pictures in a folder."""
    folder = write_sample_folder(tmp_path_factory.mktemp("sample"))
    (folder / "pngs").mkdir()
    for i, image in enumerate(noise(11, 8)):
        Image.fromarray(image).save(folder / "pngs" / f"{i:02}.png")
    return folder


@pytest.fixture
def run(folder, tmp_path, monkeypatch):
    return sample_in(folder, tmp_path, monkeypatch)


def content(path):
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def test_the_file_of_embed(run, capsys):
    run("embed pngs a.png --resolution 4 --n_batch 4")
    assert "embeddings.npz: 12 images of 392 numbers, 0.0 MiB" in capsys.readouterr().out
    found, model = content("embeddings.npz"), load_model("ema.th", device="cpu")
    assert found.keys() == {"embeddings", "images", "layers", "labels", "preset", "weights"}
    paths = [f"pngs/{i:02}.png" for i in range(11)] + ["a.png"]
    assert found["images"].tolist() == paths and str(found["preset"]) == "digits"
    assert found["layers"].tolist() == [[8, 1, 1]] + [[8, 4, 4]] * 3
    assert found["labels"].tolist() == [""] * 12 and str(found["weights"]) == weights_hash(model)
    direct = model.embed(preprocess(read_images(paths, 8), model.H)[0], layers=4)
    assert found["embeddings"].dtype == np.float32
    assert np.allclose(found["embeddings"], direct, atol=1e-4)
    run("embed pngs a.png --layers 4 --n_batch 4 --seed 9 --out again.npz")  # nothing is drawn
    assert np.array_equal(content("again.npz")["embeddings"], found["embeddings"])


def test_it_goes_on_after_a_break(run, tmp_path, monkeypatch, capfd):
    (tmp_path / "bad.png").write_text("no picture")
    line = "embed bad.png pngs a.png --n_batch 3"
    with pytest.raises(UserError, match="1 of 13 images have no row in whole.npz"):
        run(f"{line} --out whole.npz")
    read, calls = latent_files.read_readable, []

    def stopped(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return read(*args)

    monkeypatch.setattr(latent_files, "read_readable", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(f"{line} --out broken.npz")
    assert not (tmp_path / "broken.npz").exists()
    with pytest.raises(UserError, match="layers None, not 2"):
        run(f"{line} --out broken.npz --layers 2")
    capfd.readouterr()
    with pytest.raises(UserError, match="1 of 13 images have no row in broken.npz"):
        run(f"{line} --out broken.npz")
    assert len(calls) == 4 + 2
    assert "skipped: bad.png cannot be decoded (it is text)" in capfd.readouterr().err
    whole, broken = content("whole.npz"), content("broken.npz")
    assert all(np.array_equal(whole[name], broken[name]) for name in whole)
    assert len(whole["embeddings"]) == 12 and whole["images"][0] == "pngs/00.png"
    assert not list(tmp_path.glob("*part*"))
    with pytest.raises(UserError, match="none of the 1 images"):
        run("embed bad.png --out none.npz")
    assert not list(tmp_path.glob("none*"))


def test_what_gives_no_finite_numbers_is_skipped(run, monkeypatch, capfd):
    embed = VAE.embed

    def overflowing(self, x, **how):
        e = embed(self, x, **how).clone()
        e[1, 3] = np.inf
        return e

    monkeypatch.setattr(VAE, "embed", overflowing)
    with pytest.raises(UserError, match="1 of 3 images have no row in e.npz"):
        run("embed a.png b.jpg pngs/00.png --out e.npz")
    found = content("e.npz")
    assert found["images"].tolist() == ["a.png", "pngs/00.png"]
    assert found["embeddings"].shape[0] == 2 and np.isfinite(found["embeddings"]).all()
    assert "skipped: b.jpg gave no finite numbers" in capfd.readouterr().err


def test_decode_takes_it(run, tmp_path):
    run("embed pngs --n_batch 4 --out e.npz")
    run("decode e.npz --mean --n_batch 3 --out d.npz")
    rows = content("e.npz")["embeddings"]
    model = load_model("ema.th", device="cpu")
    direct = model.forward_samples_set_latents(11, model.unflatten(rows), mean=True)
    assert nearly_equal(arr_0("d.npz"), direct)
    # A regression's: float64, its rows side by side or its columns, compressed, and no more.
    for name, array, save in (
        ("c.npz", rows.astype(float), np.savez),
        ("f.npz", np.asfortranarray(rows), np.savez),
        ("z.npz", rows.astype(float), np.savez_compressed),
    ):
        save(name, embeddings=array)
        run(f"decode {name} --mean --n_batch 3 --out of_{name}")
        assert np.array_equal(arr_0(f"of_{name}"), arr_0("d.npz"))
    run("decode e.npz --layers 3 --seed 4 --out three.npz")
    np.savez("e3.npz", embeddings=rows[:, : 8 + 128 + 128])
    run("decode e3.npz --seed 4 --out of_e3.npz")
    assert np.array_equal(arr_0("three.npz"), arr_0("of_e3.npz"))
    np.savez("width.npz", embeddings=rows[:, :100])
    np.savez("nan.npz", embeddings=rows + np.nan)
    np.savez("int.npz", embeddings=rows.astype(int))
    np.savez("layers.npz", embeddings=rows[:, :8], layers=np.array([[2, 2, 2]]))
    np.savez("empty.npz", embeddings=rows[:0])
    np.savez("labels.npz", embeddings=rows, labels=["1", "2"])
    with zipfile.ZipFile("e.npz") as whole, zipfile.ZipFile("short.npz", "w") as short:
        short.writestr("embeddings.npy", whole.read("embeddings.npy")[: -3 * rows[0].nbytes])
    (tmp_path / "cut.npz").write_bytes((tmp_path / "e.npz").read_bytes()[:-3000])
    for name, words in (
        ("width", "100 numbers an image, where .* 8, 136, 264"),
        ("nan", "not finite"),
        ("int", "not floats"),
        ("layers", "its layers are of other shapes"),
        ("empty", "it has no row"),
        ("labels", "it has 2 labels for 11 images"),
        ("short", "embeddings ends before its row 11"),
        ("cut", "not a zip file"),
    ):
        with pytest.raises(UserError, match=f"{name}.npz holds no latents.*{words}"):
            run(f"decode {name}.npz --out out_{name}.npz")


def test_rows_are_read_in_bounded_memory(tmp_path):
    """Any part in any order, and not the whole."""
    rows = np.random.default_rng(0).standard_normal((3000, 5000)).astype(np.float32)  # 57 MiB
    np.savez(tmp_path / "e.npz", embeddings=rows)
    found = latent_files._Rows(tmp_path / "e.npz", "embeddings")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for start in (0, 2000, 10, 2990):
        assert np.array_equal(found.read(start, start + 10), rows[start : start + 10])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16 * 1024


def test_a_disk_without_room_is_told_first(run, monkeypatch, tmp_path):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(UserError, match=r"needs 34,496 bytes.*1,000 free"):
        run("embed pngs --layers 4 --out e.npz --force")
    assert not [*tmp_path.glob("e.npz*")]  # other layers may be asked for


def test_embeddings_under_labels(run, tmp_path):
    """Names in turn, over batches; one that can't be read keeps its turn."""
    (tmp_path / "bad.png").write_text("no picture")
    with pytest.raises(UserError, match="1 of 4 images have no row"):
        run("embed a.png bad.png b.jpg a.png --from_label 3,8 --n_batch 3 --out e.npz")
    made = content("e.npz")
    assert made["images"].tolist() == ["a.png", "b.jpg", "a.png"]
    assert made["labels"].tolist() == ["3", "3", "8"]
    run("embed a.png --from_label 8 --out eight.npz")
    run("embed a.png --out none.npz")
    rows = [content(f"{name}.npz")["embeddings"][0] for name in ("eight", "none")]
    assert np.allclose(rows[0], made["embeddings"][2], atol=1e-4)
    assert not np.allclose(rows[0], rows[1], atol=1e-3)
    # decode takes the file's own labels.
    run("decode eight.npz --mean --out own.npz")
    run("decode eight.npz --mean --label 8 --out given.npz")
    run("decode eight.npz --mean --label none --out without.npz")
    own, given, without = (content(f"{n}.npz")["arr_0"] for n in ("own", "given", "without"))
    assert (own == given).all() and (own != without).any()
    # One of latents tells under which it was encoded too.
    run("encode a.png b.jpg --from_label 5 --label 3,8 --out l.npz")
    made = content("l.npz")
    assert made["from_label"].tolist() == ["5", "5"] and made["label"].tolist() == ["3", "8"]


def test_files_that_name_weights_by_their_files_hash_stay_valid(run, tmp_path, capsys):
    """As before: latents, and the settings of an unfinished output."""
    from files import sha256

    run("encode a.png")
    old = content("latents.npz") | {"weights": sha256("ema.th")}
    np.savez("old.npz", **old)
    capsys.readouterr()
    run("decode old.npz --out a.npz")
    run("decode latents.npz --out b.npz")
    assert "other weights" not in capsys.readouterr().err
    run("samples --n 3 --out pngs_made --n_batch 2")
    settings = tmp_path / "pngs_made" / "settings.json"
    kept = json.loads(settings.read_text())
    settings.write_text(json.dumps(kept | {"weights": sha256("ema.th")}))
    run("samples --n 5 --out pngs_made --n_batch 2")
    assert len(list((tmp_path / "pngs_made").glob("*.png"))) == 5
    state = torch.load("ema.th")
    state["decoder.gain"] += 1
    torch.save(state, "other.th")
    with pytest.raises(UserError, match="made with weights"):
        run("samples --n 5 --out pngs_made --n_batch 2", weights="other.th")


def test_coloured_images(run, tmp_path):
    """By way of an embedding and of latents: all three levels of a pixel count."""
    weights = str(RGB_RUN / "latest-model-ema.th")
    model = load_model(weights, device="cpu")
    run("embed pngs --n_batch 4 --out e.npz", weights)
    images = read_images([f"pngs/{i:02}.png" for i in range(11)], 8)
    rows = content("e.npz")["embeddings"]
    assert np.allclose(rows, model.embed(preprocess(images, model.H)[0]), atol=1e-4)
    grey = np.repeat(images[..., :1], 3, axis=3)
    assert not np.allclose(rows, model.embed(preprocess(grey, model.H)[0]), atol=1e-3)
    run("decode e.npz --out d.npz --mean", weights)
    direct = model.forward_samples_set_latents(11, model.unflatten(rows), mean=True)
    assert direct.shape == (11, 8, 8, 3) and nearly_equal(arr_0("d.npz"), direct)
    run("encode pngs --seed 5 --out l.npz", weights)
    run("decode l.npz --seed 5 --out of_latents.npz", weights)
    run("reconstruct pngs --seed 5 --out r.npz", weights)
    assert np.array_equal(arr_0("of_latents.npz"), arr_0("r.npz"))
    rate = content("l.npz")["rate001"]
    stats = latents_of(model, images, range(11), 5)
    assert np.allclose(rate, stats[1]["kl"].sum(dim=(1, 2, 3)) / (8 * 8 * 3), rtol=1e-4)
