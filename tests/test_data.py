"""The published data sets and those of scikit-learn: on tiny real files of each format."""

import hashlib
import os
import pickle
import shutil

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from fakes import Hostile, assert_refused, images_of, noise, open_all, run_H, sparse_npy
from golden import figures

from batches import make_loader
from data import set_up_data
from hps import Hyperparams
from image_sets import IMAGE_SETS


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
    labels = text(b"labels") + b"](" + b"K\x01" * n + b"e"
    return b"\x80\x02}(" + label + text(b"data") + array + labels + b"u."


@pytest.fixture(scope="module")
def cifar10(tmp_path_factory):
    """A folder with six batches of 10,000 images, numbered by their first two levels of red.

    The first image of each is noise beside its number, the others are black.
    """
    root = tmp_path_factory.mktemp("cifar10")
    (root / "cifar-10-batches-py").mkdir()
    for k, name in enumerate([f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]):
        planes = np.zeros((10000, 3072), np.uint8)
        planes[0] = noise(1, 32, seed=k).transpose(0, 3, 1, 2).reshape(3072)
        planes[:, :2] = np.stack(np.divmod(np.arange(10000 * k, 10000 * (k + 1)), 256), axis=1)
        batch = python2_batch(planes)
        if name == "data_batch_5":  # as Python 3 pickles the same
            batch = pickle.dumps({b"data": planes, b"labels": [1] * 10000}, protocol=2)
        (root / "cifar-10-batches-py" / name).write_bytes(batch)
    yield root
    shutil.rmtree(root)


def test_cifar10(cifar10):
    train, valid, test = open_all(run_H(cifar10, "cifar10"))

    def numbers_of(part):
        levels = part.array[part.indices][:, 0, :2, 0].astype(int)  # (n, 2)
        return levels @ [256, 1]

    numbers = {part: numbers_of(part) for part in (train, valid, test)}
    assert_split("cifar10", numbers[train], numbers[valid])
    for k in range(6):  # image 10,000 k, wherever the split put it
        part = test if k == 5 else train if 10000 * k in numbers[train] else valid
        i = list(numbers[part]).index(10000 * k)
        image = noise(1, 32, seed=k)
        image[0, 0, :2, 0] = divmod(10000 * k, 256)
        assert np.array_equal(images_of(part, [i]), image)
    assert np.array_equal(numbers[test], range(50000, 60000))


BAD_BATCHES = {
    "hostile": (lambda good: pickle.dumps({b"data": Hostile("ran")}), "posix.mkdir"),
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
    """image_sets.IMAGE_SETS has the mean and standard deviation of their training images."""
    train, valid, test = open_all(run_H(".", dataset))
    assert (len(train), len(valid), len(test)) == sizes
    levels = images_of(train, range(len(train)))
    facts = IMAGE_SETS[dataset]
    assert levels.dtype == np.uint8 and levels.shape[1:] == (facts.image_size,) * 2 + (
        facts.channels,
    )
    assert np.isclose(levels.mean(), facts.mean, atol=5e-6)
    assert np.isclose(levels.std(), facts.std, atol=5e-6)
    taken = {image.tobytes() for image in levels}
    assert not taken & {image.tobytes() for image in images_of(test, range(len(test)))}


def test_what_does_not_fit_is_refused():
    H = run_H(".", "digits", image_size=32)
    assert_refused(lambda: set_up_data(H), "--image_size 32", "digits has 8 pixels")
    H.dataset = "cats"
    assert_refused(lambda: set_up_data(H), "'cats'", "photos32")
    assert_refused(lambda: set_up_data(run_H(".", "mnist")), "'mnist'", "photos32")


def test_preprocess_leaves_the_batch_alone():
    H = Hyperparams(dataset="digits", device="cpu")
    H, train_set, valid_set, preprocess_fn = set_up_data(H)
    assert (H.image_size, H.image_channels) == (8, 1) and len(train_set) and len(valid_set)
    batch = torch.utils.data.default_collate([train_set[0], train_set[1]])
    before = batch[0].clone()
    x, target = preprocess_fn(batch)
    assert x.shape == target.shape == (2, 8, 8, 1) and x.dtype == target.dtype == torch.float32
    assert batch[0].equal(before) and batch[0].dtype == torch.uint8
    assert target.min() >= -1 and target.max() <= 1
