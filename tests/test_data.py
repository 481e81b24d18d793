"""Data sets on tiny real files of each format, the order of images, and what reading costs."""

import hashlib
import io
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from fakes import tiny_network
from golden import figures
from PIL import Image
from test_commands import run_until
from test_processes import environment
from torch.utils.data import DataLoader, DistributedSampler, Subset

from data import (
    EpochBatches,
    Images,
    NpyImages,
    fit,
    keep_image_record,
    make_loader,
    make_preprocess,
    set_up_data,
)
from hps import (
    IMAGE_SETS,
    Hyperparams,
    OneLineParser,
    UserError,
    add_vae_arguments,
    get_hparams,
    parse_args_and_update_hparams,
    result_notice,
)
from train import evaluate
from vae import VAE

REPO = Path(__file__).resolve().parent.parent
# name: pixels, parameters, stochastic layers
OWN_PRESETS = {
    "images32": (32, 15_044_068, 36),
    "images64": (64, 16_247_876, 42),
    "images128": (128, 27_341_812, 47),
    "images256": (256, 42_486_228, 49),
}

# ---- the order of images -------------------------------------------------------------------


@pytest.mark.parametrize("n, n_batch, size", [(10, 2, 1), (11, 2, 3), (12, 3, 2), (2, 1, 5)])
def test_batches_are_those_of_distributed_sampler(n, n_batch, size):
    for rank in range(size):
        batches = EpochBatches(n, n_batch, rank, size, seed=4)
        reference = DistributedSampler(range(n), size, rank, seed=4)
        for epoch in (0, 3):
            batches.set_epoch(epoch)
            reference.set_epoch(epoch)
            loader = DataLoader(range(n), n_batch, sampler=reference, drop_last=True)
            assert list(batches) == [batch.tolist() for batch in loader]
            assert len(batches) == len(loader)


@pytest.mark.parametrize("size", [1, 2])
def test_an_epoch_continues_in_its_middle(size):
    for rank in range(size):
        batches = EpochBatches(23, 3, rank, size, seed=1)
        batches.set_epoch(2)
        whole = list(batches)
        for taken in range(len(whole) + 1):
            batches.set_epoch(2, start_image=taken * 3 * size)
            assert list(batches) == whole[taken:] and len(batches) == len(whole) - taken


def test_an_epoch_continues_on_another_number_of_processes():
    """Every image of the epoch is taken once, before or after the change."""
    one = EpochBatches(24, 3, 0, 1, seed=1)
    order = [i for batch in one for i in batch]
    taken = 6
    rest = []
    for rank in range(2):
        batches = EpochBatches(24, 3, rank, 2, seed=1)
        batches.set_epoch(0, start_image=taken)
        rest += [i for batch in batches for i in batch]
    assert sorted(order[:taken] + rest) == list(range(24))


# ---- every loader, on real files -----------------------------------------------------------


def run_H(data_root, dataset, **options):
    """H as train.py has it, on the CPU, without a run's folder."""
    H = Hyperparams()
    s = ["--hps", "digits", "--dataset", dataset, "--data_root", str(data_root), "--device", "cpu"]
    for name, value in options.items():
        s += [f"--{name}", str(value)]
    parse_args_and_update_hparams(H, add_vae_arguments(OneLineParser()), s)
    return H


def open_all(H):
    """(train, valid, test) of H.dataset, through the public door."""
    _, train, valid, _ = set_up_data(H)
    H.test_eval = True
    return train, valid, set_up_data(H)[2]


def noise(n, size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def images_of(dataset, numbers):
    return np.stack([dataset[i][0].numpy() for i in numbers])


def assert_refused(action, *words):
    with pytest.raises(UserError) as error:
        action()
    assert "\n" not in str(error.value)
    for word in words:
        assert str(word) in str(error.value)


def sha256(indices):
    return hashlib.sha256(np.asarray(indices, dtype=np.int64).tobytes()).hexdigest()


def assert_split(name, train, valid):
    golden = figures("splits")[name]
    assert len(train) + len(valid) == golden["n"]
    assert (sha256(train), sha256(valid)) == (golden["train_sha256"], golden["valid_sha256"])
    assert (list(train[:5]), list(valid[:5])) == (golden["train_first"], golden["valid_first"])


def python2_batch(planes):
    """A CIFAR-10 batch as Python 2 pickled it: str for bytes, NumPy's old names and integers."""

    def text(b):
        return b"T" + len(b).to_bytes(4, "little") + b

    n, columns = planes.shape
    shape = b"(" + b"".join(b"J" + k.to_bytes(4, "little") for k in (n, columns)) + b"t"
    dtype = b"cnumpy\ndtype\n(" + text(b"u1") + b"K\x00K\x01tR(K\x03" + text(b"|")
    dtype += b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t" + text(b"b") + b"tR"
    array += b"(K\x01" + shape + dtype + b"\x89" + text(planes.tobytes()) + b"tb"
    label = text(b"batch_label") + text(b"training batch")
    return b"\x80\x02}(" + label + text(b"data") + array + text(b"labels") + b"](K\x01eu."


@pytest.fixture(scope="module")
def cifar10(tmp_path_factory):
    """A folder with six batches of 10,000 images; the first image of each is noise."""
    root = tmp_path_factory.mktemp("cifar10")
    (root / "cifar-10-batches-py").mkdir()
    for k, name in enumerate([f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]):
        planes = np.zeros((10000, 3072), np.uint8)
        planes[0] = noise(1, 32, seed=k).transpose(0, 3, 1, 2).reshape(3072)
        batch = python2_batch(planes)
        if name == "data_batch_5":  # as Python 3 pickles the same
            batch = pickle.dumps({b"data": planes, b"labels": [1]}, protocol=2)
        (root / "cifar-10-batches-py" / name).write_bytes(batch)
    yield root
    shutil.rmtree(root)


def test_cifar10(cifar10):
    train, valid, test = open_all(run_H(cifar10, "cifar10"))
    assert_split("cifar10", train.indices, valid.indices)
    for k in range(5):  # image 10,000 k, wherever the split put it
        part = train if 10000 * k in train.indices else valid
        i = list(part.indices).index(10000 * k)
        assert np.array_equal(images_of(part, [i]), noise(1, 32, seed=k))
    assert len(test) == 10000 and np.array_equal(images_of(test, [0]), noise(1, 32, seed=5))


class Hostile:
    """A pickle of it makes the file `ran` when it is loaded."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


BAD_BATCHES = {
    "hostile": (lambda good: pickle.dumps({b"data": Hostile()}), "posix.mkdir"),
    "eval": (lambda good: b'cbuiltins\neval\n(S\'open("ran", "w")\'\ntR.', "builtins.eval"),
    "other NumPy": (lambda good: b"cnumpy\nload\n(S'ran'\ntR.", "numpy.load"),
    "truncated": (lambda good: good[:-1000], "truncated"),
    "page": (lambda good: b"<html>", "is no CIFAR-10 batch"),
    "empty": (lambda good: b"", "Ran out of input"),
    "no data": (lambda good: pickle.dumps({b"labels": [1]}), "data"),
    "list": (lambda good: pickle.dumps([1]), "is no CIFAR-10 batch"),
    "type": (lambda good: pickle.dumps({b"data": np.zeros((2, 3072))}), "float64 (2, 3072), not"),
    "count": (lambda good: pickle.dumps({b"data": np.zeros((9, 3072), np.uint8)}), "(10000, 3072)"),
}


@pytest.mark.parametrize("case", BAD_BATCHES)
def test_a_bad_cifar10_batch_is_refused(cifar10, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    make, message = BAD_BATCHES[case]
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    good = (cifar10 / folder.name / "data_batch_1").read_bytes()
    (folder / "data_batch_1").write_bytes(make(good))
    refusal = "data_batch_1", message, "./setup_cifar10.sh"
    assert_refused(lambda: set_up_data(run_H(tmp_path, "cifar10")), *refusal)
    assert os.listdir() == [folder.name]
    (folder / "data_batch_1").unlink()
    refusal = "data_batch_1", "does not exist", "./setup_cifar10.sh"
    assert_refused(lambda: set_up_data(run_H(tmp_path, "cifar10")), *refusal)


def sparse_npy(path, shape, images=None, descr="|u1"):
    """A .npy file of that shape that takes no room: zeros, but for {number: image}."""
    with open(path, "wb") as file:
        header = {"descr": descr, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        start, size = file.tell(), math.prod(shape[1:])
        for i, image in (images or {}).items():
            file.seek(start + i * size)
            file.write(image.tobytes())
        file.truncate(start + math.prod(shape) * np.dtype(descr).itemsize)


@pytest.mark.parametrize(
    "dataset, n_train, n_test",
    [("imagenet32", 1281149, 49999), ("imagenet64", 1281149, 49999)]
    + [("imagenet32_box", 1281167, 50000), ("imagenet64_box", 1281167, 50000)],
)
def test_imagenet(tmp_path, dataset, n_train, n_test):
    size = IMAGE_SETS[dataset].image_size
    train_path, valid_path = tmp_path / f"{dataset}-train.npy", tmp_path / f"{dataset}-valid.npy"
    H, remedy = run_H(tmp_path, dataset), f"run ./setup_imagenet.sh {dataset}"
    assert_refused(lambda: set_up_data(H), train_path, "does not exist", remedy)
    last = {n_train - 1: noise(1, size)[0]}
    sparse_npy(train_path, (n_train, size, size, 3), last)
    wrong = 50000 if n_test == 49999 else 49999  # the other ImageNet's
    sparse_npy(valid_path, (wrong, size, size, 3))
    refusal = valid_path, f"uint8 ({wrong}, {size}", f"not uint8 ({n_test}, {size}", remedy
    assert_refused(lambda: set_up_data(H), *refusal)

    sparse_npy(valid_path, (n_test, size, size, 3), {3: noise(1, size, seed=1)[0]})
    train, valid, test = open_all(H)
    if n_train == 1281149:
        assert_split("imagenet", train.indices, valid.indices)
    assert len(train) == n_train - 5000 and len(valid) == 5000 and len(test) == n_test
    i = list(train.indices).index(n_train - 1)
    assert np.array_equal(images_of(train, [i, 0]), [noise(1, size)[0], np.zeros((size, size, 3))])
    assert np.array_equal(images_of(test, [3]), noise(1, size, seed=1))


def test_results_on_the_box_filtered_imagenet_say_so():
    assert "not comparable with the published 3.8 of imagenet32" in str(
        result_notice("imagenet32_box")
    )
    assert "not comparable with the published 3.52 of" in str(result_notice("imagenet64_box"))
    for dataset in ("imagenet32", "digits", "images", None):
        assert result_notice(dataset) == {}


def test_a_run_on_the_box_filtered_imagenet_says_so(tmp_path):
    sparse_npy(tmp_path / "imagenet32_box-train.npy", (1281167, 32, 32, 3))
    sparse_npy(tmp_path / "imagenet32_box-valid.npy", (50000, 32, 32, 3))
    argv = [sys.executable, REPO / "train.py", "--hps", "imagenet32", "--device", "cpu"]
    argv += ["--dataset", "imagenet32_box", "--save_dir", tmp_path, *tiny_network(32)]
    lines = run_until(list(map(str, argv)), environment(), tmp_path, "type: train_loss")
    assert "notice: box-filtered ImageNet" in lines[-1] and "not comparable" in lines[-1]

    H = get_hparams("imagenet32", dataset="imagenet32_box", device="cpu", width=4)
    H.update(enc_blocks="32d32,1x1", dec_blocks="1x1,32m1", image_size=32)
    data = Images(noise(6, 32))
    figures = evaluate(H, VAE(H), data, make_preprocess(H.dataset, "cpu"))
    assert figures["n_images"] == 6 and "not comparable" in figures["notice"]


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
    "objects": (lambda path: np.save(path, np.array([Hostile()])), "no complete .npy"),
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


def test_ffhq256_is_13_762_560_128_bytes_in_two_splits(tmp_path):
    path = tmp_path / "ffhq-256.npy"
    sparse_npy(path, (70000, 256, 256, 3), {69999: noise(1, 256)[0]})
    assert path.stat().st_size == 13_762_560_128
    train, valid, test = open_all(run_H(tmp_path, "ffhq_256"))
    assert_split("ffhq256", train.indices, valid.indices)
    assert np.array_equal(test.indices, valid.indices)
    part = train if 69999 in train.indices else valid
    assert np.array_equal(images_of(part, [list(part.indices).index(69999)]), noise(1, 256))


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    """faces(official): a folder of 70,000 PNG names; numbers 5, 64999 and 65000 are images."""
    top = tmp_path_factory.mktemp("faces")
    seeds = [top / f"seed{k}" for k in range(4)]  # hard links to these; an inode takes 65,000
    for seed in seeds:
        seed.write_bytes(b"x")

    def make(official):
        for i in range(70000):
            folder = top / str(official)
            if official:
                folder /= f"{i // 1000 * 1000:05d}"
            if i % 1000 == 0:
                folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{i:05d}.png"
            if i in (5, 64999, 65000):
                imageio.imwrite(path, noise(1, 1024, seed=i)[0], compress_level=0)
            elif i == 6:
                imageio.imwrite(path, noise(1, 512)[0])
            else:
                os.link(seeds[i % 4], path)
        return top / str(official)

    yield make
    shutil.rmtree(top)


@pytest.mark.parametrize("official", [True, False])
def test_ffhq1024_in_both_layouts(faces, tmp_path, official):
    root = faces(official)
    (tmp_path / "link").symlink_to(root)  # as setup_ffhq1024.sh makes it
    H = run_H(tmp_path / "link", "ffhq_1024")
    train, valid, test = open_all(H)
    assert (len(train), len(valid), len(test)) == (65000, 5000, 5000)
    assert np.array_equal(images_of(train, [5, 64999]), [noise(1, 1024, i)[0] for i in (5, 64999)])
    assert np.array_equal(images_of(valid, [0]), noise(1, 1024, 65000))
    assert np.array_equal(images_of(test, [0]), noise(1, 1024, 65000))

    name = "00000/0000{}.png" if official else "0000{}.png"
    assert_refused(lambda: train[6], name.format(6), "512 x 512 pixels, not 1024 x 1024")
    assert_refused(lambda: train[7], name.format(7), "cannot be decoded")
    H.num_workers = 1
    for numbers in ([5, 64999], [5, 7]):
        loader = make_loader(H, train, batch_sampler=[numbers])
        if 7 in numbers:  # one line, from a worker too
            assert_refused(lambda loader=loader: list(loader), name.format(7), "cannot be decoded")
        else:
            [[batch]] = loader
            assert batch.dtype == torch.uint8 and batch.shape == (2, 1024, 1024, 3)

    (root / name.format(3)).unlink()
    (root / name.format(3)).symlink_to("nothing")
    refusal = "lacks 1 of the 70,000", name.format(3), "./setup_ffhq1024.sh"
    assert_refused(lambda: set_up_data(H), *refusal)
    H.data_root = tmp_path / "absent"
    assert_refused(lambda: set_up_data(H), "lacks 70,000 of the 70,000", "absent")


@pytest.mark.parametrize(
    "dataset, sizes", [("digits", (1397, 200, 200)), ("photos32", (5300, 250, 250))]
)
def test_the_sets_that_come_with_scikit_learn(dataset, sizes):
    """hps.IMAGE_SETS has the mean and standard deviation of their training images."""
    train, valid, test = open_all(run_H(".", dataset))
    assert (len(train), len(valid), len(test)) == sizes
    levels = images_of(train, range(len(train)))
    facts = IMAGE_SETS[dataset]
    assert levels.dtype == np.uint8 and levels.shape[1:] == (facts.image_size,) * 2 + (3,)
    assert np.isclose(levels.mean(), facts.mean, atol=5e-6)
    assert np.isclose(levels.std(), facts.std, atol=5e-6)
    taken = {image.tobytes() for image in levels}
    assert not taken & {image.tobytes() for image in images_of(test, range(len(test)))}


def test_preprocessing_is_the_published_one():
    levels = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 16, 16, 3)
    u = levels.double()
    published = {  # shift and scale; of ffhq_1024 for levels from 0 to 1
        "cifar10": (u - 120.63838) / 64.16736,
        "imagenet32": (u - 116.2373) / 69.37404,
        "imagenet64": (u - 115.92961967) / 69.37404,
        "ffhq_256": (u - 112.8666757481) / 69.84780273,
        "ffhq_1024": (u / 255 - 0.4387) / 0.2743,
    }
    for dataset, expected in published.items():
        batch = [levels.clone()]
        x, target = make_preprocess(dataset, "cpu")(batch)
        assert x.dtype == target.dtype == torch.float32
        torch.testing.assert_close(x.double(), expected, rtol=1e-5, atol=1e-5)
        coarse = (u / 8).floor() * 8 if dataset == "ffhq_256" else u
        torch.testing.assert_close(target.double(), (coarse - 127.5) / 127.5, rtol=1e-6, atol=1e-6)
        assert torch.equal(batch[0], levels)


def test_what_does_not_fit_is_refused():
    H = run_H(".", "digits", image_size=32)
    assert_refused(lambda: set_up_data(H), "--image_size 32", "digits has 8 pixels")
    H.dataset = "cats"
    assert_refused(lambda: set_up_data(H), "'cats'", "photos32")


# ---- own images ----------------------------------------------------------------------------


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


def own_H(root, size=16, run=None, **options):
    """H for own images, in the run's folder `run` where one is given."""
    H = run_H(root, "images", **options, **({"image_size": size} if size else {}))
    if run:
        run.mkdir(exist_ok=True)
        H.logdir = str(run / "log")
    return H


def everything(H):
    """All images of H's data set by number in the array, and the splits' numbers."""
    parts = open_all(H)
    return parts[0].array[np.arange(len(parts[0].array))], [part.indices for part in parts]


def test_every_kind_of_picture_becomes_rgb_resized_and_cut(tmp_path):
    root, size = tmp_path / "photos", 16
    (root / "deep" / "er").mkdir(parents=True)
    pixels = noise(1, 64)[0][:48]  # 64 wide, 48 high
    smooth = np.linspace(0, 255, 48 * 64 * 3).reshape(48, 64, 3).astype(np.uint8)
    rgb = Image.fromarray(pixels)
    grey, palette = Image.fromarray(pixels[..., 0]), rgb.convert("P")
    turned = Image.Exif()
    turned[0x0112] = 6  # to be shown turned clockwise by 90 degrees
    pictures = {
        "0.png": (rgb, {}, rgb),
        "1.PNG": (grey, {}, grey.convert("RGB")),
        "2.png": (palette, {}, palette.convert("RGB")),
        "deep/3.png": (Image.fromarray(np.dstack([pixels, pixels[..., :1]])), {}, rgb),
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
    (root / names[0]).chmod(0o600)  # made readable, maybe
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
    Image.fromarray(noise(1, 32)[0]).convert("CMYK").save(root / "cmyk.jpg")
    (root / "d.png").write_bytes((root / "a" / "000.png").read_bytes()[:-100])
    (root / "b" / "empty.webp").touch()
    (root / "e.png").symlink_to("nothing")
    Image.fromarray(noise(1, 32)[0]).save(root / "z.png", format="GIF")  # whatever its name says
    H = own_H(root)
    refusal = "7 of 19 images", "a/small.png is 15 x 15 pixels, smaller than 16"
    refusal += "b/empty.webp cannot be decoded (no PNG, JPEG or WebP)", "broken.jpg"
    refusal += "...", "16.json", "--bad_images skip"
    assert_refused(lambda: set_up_data(H), *refusal)
    capsys.readouterr()
    H.bad_images = "skip"
    assert np.array_equal(everything(H)[0], good)
    printed = capsys.readouterr().out
    assert "packed" not in printed  # the first, refused start did it
    assert "going on although 7 of 19 images" in printed and "a/small.png" in printed
    bad = json.loads((root / ".vdvae" / "16.json").read_text())["bad"]
    names = "a/small.png", "b/empty.webp", "broken.jpg", "cmyk.jpg", "d.png", "e.png", "z.png"
    assert tuple(bad) == names
    assert "mode CMYK" in bad["cmyk.jpg"] and "No such file" in bad["e.png"]


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
    for bad in (images.astype(np.int16), images[..., :1], images[:, :4], images[0, 0, 0]):
        np.save(path, bad)
        assert_refused(lambda: set_up_data(own_H(path, None)), path, str(bad.dtype), bad.shape)
    path.write_bytes(b"x")
    assert_refused(lambda: set_up_data(own_H(path, None)), path, "no complete .npy file")


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
    assert_refused(lambda: set_up_data(own_H(root, run=run)), run / "images.json", "delete it")


TINY = "--width 8 --zdim 2 --n_batch 4 --num_epochs 1 --enc_blocks 16x1,16d4,4x1 --warmup_iters 0 "
TINY += "--dec_blocks 4x1,16m4 --no_bias_above 16 --bottleneck_multiple 0.5 --num_images_visualize "
TINY += "1 --num_variables_visualize 0 --num_temperatures_visualize 1 --image_size 16"


def command(tmp_path, root, *options, launcher=()):
    """(status, stdout, stderr) of a train.py on own images; its run is tmp_path/runs/own."""
    args = ["--hps", "images32", *TINY.split(), "--data_root", root, "--desc", "own"]
    args += ["--save_dir", tmp_path / "runs", "--device", "cpu", *options]
    done = subprocess.run(
        [*launcher, sys.executable, REPO / "train.py", *map(str, args)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    return done.returncode, done.stdout, done.stderr


def test_two_processes_train_on_a_folder_that_one_packs_and_evaluate_its_test_set(tmp_path):
    root, run = tmp_path / "photos", tmp_path / "runs" / "own"
    write_photos(root, n=130)
    mpiexec = Path(sys.executable).with_name("mpiexec")
    status, stdout, stderr = command(tmp_path, root, launcher=(mpiexec, "-n", "2"))
    assert status == 0, stderr
    assert stdout.count("packed 130 images") == 1
    weights = run / "latest-model-ema.th"
    status, stdout, stderr = command(tmp_path, root, "--test_eval", "--restore_ema_path", weights)
    assert status == 0 and "packed" not in stdout, stderr
    events = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    [tested] = [event for event in events if event.get("type") == "test_loss"]
    assert tested["n_images"] == 6 and math.isfinite(tested["bits_per_dim"])

    (root / "broken.png").touch()
    status, stdout, stderr = command(tmp_path, root)
    assert status == 2 and stderr.count("\n") == 1 and "broken.png cannot be decoded" in stderr


def test_presets_for_own_images_have_the_stated_size():
    """The README's table, hps.py's comments."""
    for name, (size, parameters, layers) in OWN_PRESETS.items():
        H = Hyperparams()
        parser = add_vae_arguments(OneLineParser())
        parse_args_and_update_hparams(H, parser, ["--hps", name])
        assert (H.dataset, H.image_size) == ("images", size)
        H.image_channels = 3
        with torch.device("meta"):
            vae = VAE(H)
        assert sum(p.numel() for p in vae.parameters()) == parameters, name
        assert len(vae.decoder.dec_blocks) == layers, name


# ---- what reading costs --------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_batches_are_the_same_for_any_number_of_workers(tmp_path, num_workers):
    np.save(tmp_path / "mine.npy", noise(40, 8))
    H = own_H(tmp_path / "mine.npy", 8, num_workers=num_workers)
    train = set_up_data(H)[1]
    batches = EpochBatches(len(train), 5, 0, 1, seed=3)
    state = torch.get_rng_state()
    for epoch in (0, 1):
        batches.set_epoch(epoch)
        loaded = [batch[0].numpy() for batch in make_loader(H, train, batch_sampler=batches)]
        expected = [images_of(train, numbers) for numbers in batches]
        assert np.array_equal(loaded, expected)
    assert torch.equal(torch.get_rng_state(), state)  # which makes the noise


def test_a_program_that_fails_between_two_batches_ends(tmp_path):
    """Its workers leave SIGTERM to the run: multiprocessing would wait for them for ever."""
    np.save(tmp_path / "mine.npy", noise(40, 8))
    program = """
import sys
from data import NpyImages, Images, make_loader
from hps import Hyperparams
images = Images(NpyImages(sys.argv[1]))
for batch in make_loader(Hyperparams(device="cpu", num_workers=1), images, batch_size=4):
    raise KeyError("a fault of the program's")
"""
    done = subprocess.run(
        [sys.executable, "-i", "-c", program, tmp_path / "mine.npy"],  # -i keeps the traceback
        env=environment() | {"PYTHONPATH": str(REPO)}, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert "KeyError" in done.stderr


def test_a_batch_is_one_index_into_the_array():
    class Counted:
        reads = 0

        def __init__(self):
            self.array = noise(30, 8)

        def __len__(self):
            return len(self.array)

        def __getitem__(self, numbers):
            Counted.reads += 1
            return self.array[numbers]

    data = Images(Counted(), np.arange(29, -1, -1))
    [batch] = next(iter(DataLoader(Subset(data, range(3, 20)), batch_size=16)))
    assert Counted.reads == 1
    assert np.array_equal(batch, noise(30, 8)[29 - np.arange(3, 19)])
    assert torch.equal(data[4][0], data[np.int64(4)][0]) and len(data[4]) == 1
    data[4][0].fill_(0)
    assert data[4][0].any()  # items are copies


def test_an_npy_file_is_pickled_as_its_path(tmp_path):
    sparse_npy(tmp_path / "big.npy", (100_000, 64, 64, 3), {77_777: noise(1, 64)[0]})
    images = NpyImages(tmp_path / "big.npy")
    data = pickle.dumps(images)
    assert len(data) < 1000
    assert np.array_equal(pickle.loads(data)[[77_777]], noise(1, 64))


def test_memory_and_start_do_not_grow_with_the_file():
    """The README's figures, with room for a loaded machine."""
    done = subprocess.run(
        [sys.executable, REPO / "benchmarks" / "loading.py", "memory"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["file_bytes"] > 15e9
    assert figures["resident_growth_mb"] < 300
    assert figures["first_batch_s"] < 10  # 2 on a quiet machine
