"""The published data sets: files → uint8 images, split as in the paper.

A data set yields tuples of one uint8 tensor (S, S, 3), with labels of two (batches.py).
"""

import codecs
import os
import pickle
from pathlib import Path

import numpy as np

from batches import Images, make_preprocess, preprocess  # noqa: F401  programs import preprocess here
from errors import MissingFiles, UserError, needing, reason_of
from file_kinds import not_regular
from image_files import ImageArray, decode, open_npy
from image_sets import IMAGE_SETS, image_channels_of, image_size_of, set_labels
from labels import labels_of
from launchers import resolve_device
from options import setting
from own_images import load_images
from records import published_normalisation
from starting import describe_labels, starting_normalisation, take_network


def mkdir_p(path):
    """Makes a folder and its parents where they do not exist."""
    os.makedirs(path, exist_ok=True)


def flatten(outer):
    """The items of the items of outer, in a list."""
    return [item for inner in outer for item in inner]


def split_last(n, n_valid, seed):
    """Shuffles 0..n-1 with RandomState(seed): (all but the last n_valid, the last n_valid).

    The published splits of ImageNet (seed 42, 5,000) and FFHQ-256 (seed 5, 7,000).
    """
    order = np.random.RandomState(seed).permutation(n)
    return order[:-n_valid], order[-n_valid:]


# ---- CIFAR-10 ------------------------------------------------------------------------------


class _BatchUnpickler(pickle.Unpickler):
    """Unpickles what a CIFAR-10 batch holds, dicts and arrays, and calls nothing else."""

    def find_class(self, module, name):
        numpy_core = ("numpy.core.multiarray", "numpy._core.multiarray")
        if module in numpy_core and name == "_reconstruct":
            return np._core.multiarray._reconstruct
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            # The files say align=0, copy=1, which today's NumPy takes as booleans only.
            return lambda kind, align=0, copy=0: np.dtype(kind, bool(align), bool(copy))
        if (module, name) == ("_codecs", "encode"):  # bytes, as Python 3 writes them in protocol 2
            return codecs.encode
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _unpickle(path):
    if special := not_regular(path):  # which could wait for ever
        raise ValueError(f"it is {special}")
    with open(path, "rb") as file:
        return _BatchUnpickler(file, encoding="bytes").load()


def unpickle_cifar10(file):
    """What a CIFAR-10 batch file, a path, holds: a dict with str keys."""
    return {key.decode(): value for key, value in _unpickle(file).items()}


def read_cifar10_batch(path):
    """A CIFAR-10 batch file (python pickle): images uint8 (10000, 32, 32, 3), labels int (10000,).

    Raises:
        UserError: for a file that is missing, damaged or none of CIFAR-10's.
    """
    remedy = "run ./setup_cifar10.sh in the folder that --data_root names"
    try:
        batch = _unpickle(path)
        planes = batch[b"data"]
        if planes.dtype != np.uint8 or planes.shape != (10000, 3 * 32 * 32):
            raise ValueError(f"its data is {planes.dtype} {planes.shape}, not uint8 (10000, 3072)")
        labels = np.asarray(batch[b"labels"], dtype=np.int64)
        if labels.shape != (10000,):
            raise ValueError(f"it has labels of {labels.shape}, not (10000,)")
    except FileNotFoundError:
        raise MissingFiles(f"{path} does not exist: {remedy}") from None
    except Exception as error:  # a damaged pickle raises nearly anything
        raise UserError(f"{path} is no CIFAR-10 batch ({reason_of(error)}): {remedy}") from None
    images = planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)  # (n, 32, 32, 3)
    return images, labels


def cifar10(data_root, one_hot=True):
    """((X, Y) of 45,000 to train, 5,000 to validate, 10,000 to test).

    X is uint8 (n, 32, 32, 3); Y float32 (n, 10), or without one_hot int (n, 1).
    """
    with needing("scikit-learn", "the split of cifar10"):
        from sklearn.model_selection import train_test_split  # slow to import

    folder = Path(data_root, "cifar-10-batches-py")
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    *batches, test = [read_cifar10_batch(folder / name) for name in names]
    images, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    train, valid = train_test_split(np.arange(50000), test_size=5000, random_state=11172018)

    def of_kind(labels):
        return np.eye(10, dtype=np.float32)[labels] if one_hot else labels[:, None]

    splits = (images[train], labels[train]), (images[valid], labels[valid]), test
    return tuple((x, of_kind(y)) for x, y in splits)


def load_cifar10(H):
    """45,000 train, 5,000 valid and 10,000 test images, with --labels own their labels."""
    splits = cifar10(H.data_root, one_hot=False)
    return tuple(Images(x, labels=y[:, 0] if labels_of(H) else None) for x, y in splits)


# ---- ImageNet, FFHQ ------------------------------------------------------------------------


def _imagenet(data_root, dataset):
    """(train, valid, test) as imagenet32's: the valid file is the test set.

    The ImageNet of van den Oord et al. 2016 has 1,281,149 and 49,999 images, the box-filtered one
    of Chrabaszcz et al. 2017 has 1,281,167 and 50,000.
    """
    size, remedy = IMAGE_SETS[dataset].image_size, f"run ./setup_imagenet.sh {dataset}"
    n_train, n_test = (1281167, 50000) if dataset.endswith("_box") else (1281149, 49999)
    root = Path(data_root)
    train = open_npy(root / f"{dataset}-train.npy", (n_train, size, size, 3), remedy)
    test = open_npy(root / f"{dataset}-valid.npy", (n_test, size, size, 3), remedy)
    train_indices, valid_indices = split_last(len(train), 5000, seed=42)
    return (
        ImageArray(train, train_indices),
        ImageArray(train, valid_indices),
        ImageArray(test, np.arange(n_test)),
    )


def imagenet32(data_root):
    """(train, valid, test), uint8 (n, 32, 32, 3): arrays that stay on the disk until indexed."""
    return _imagenet(data_root, "imagenet32")


def imagenet64(data_root):
    """(train, valid, test), uint8 (n, 64, 64, 3), as imagenet32's."""
    return _imagenet(data_root, "imagenet64")


def ffhq256(data_root):
    """63,000 train images and 7,000 that are both valid and test, uint8 (n, 256, 256, 3)."""
    path = Path(data_root, "ffhq-256.npy")
    array = open_npy(path, (70000, 256, 256, 3), "run ./setup_ffhq256.sh")
    train, valid = (ImageArray(array, numbers) for numbers in split_last(len(array), 7000, seed=5))
    return train, valid, valid


def ffhq1024(data_root):
    """The folders of the train, valid and test images: one, for the split is by file number."""
    return (data_root,) * 3


def _of_arrays(function, *args):
    """H → the data sets of what function(H.data_root, *args) gives."""

    def load(H):
        return tuple(Images(a.array, a.indices) for a in function(H.data_root, *args))

    return load


class FfhqFiles:
    """The 70,000 PNG files of FFHQ as if they were an array of images, decoded on access."""

    shape = (70000, 1024, 1024, 3)

    def __init__(self, root):
        self.root = Path(root)
        # The official layout has folders of 1,000: 69000/69999.png.
        self.official = (self.root / "00000").is_dir()

    def __len__(self):
        return self.shape[0]

    def name(self, i):
        """Path of file number i, relative to the root."""
        return f"{i // 1000 * 1000:05}/{i:05}.png" if self.official else f"{i:05}.png"

    def missing(self):
        """Names of the files that are not there.

        Raises:
            UserError: for a folder that can't be read.
        """
        folders = [f"{i:05}" for i in range(0, 70000, 1000)] if self.official else [""]
        found = set()
        for folder in folders:
            try:
                entries = os.scandir(self.root / folder)
                found |= {os.path.join(folder, entry.name) for entry in entries if entry.is_file()}
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                raise UserError(
                    f"{error.filename} can't be read ({error.strerror}): change its permissions, "
                    f"or look after the disk"
                ) from None
        return [name for name in map(self.name, range(len(self))) if name not in found]

    def __getitem__(self, numbers):
        return np.stack([self._read(i) for i in numbers])

    def _read(self, i):
        path = self.root / self.name(i)
        try:
            image = decode(path.read_bytes())
        except OSError as error:
            raise UserError(f"{path} can't be read ({error.strerror}): fetch it anew") from None
        except ValueError as error:
            raise UserError(f"{path} {error}: fetch it anew") from None
        if image.size != (1024, 1024):
            raise UserError(
                f"{path} is {image.width} x {image.height} pixels, not 1024 x 1024: fetch it anew"
            )
        return np.asarray(image)


def load_ffhq1024(H):
    """65,000 train images (00000 to 64999) and 5,000 that are both valid and test, by number."""
    array = FfhqFiles(H.data_root)
    if missing := array.missing():
        raise MissingFiles(
            f"{H.data_root} lacks {len(missing):,} of the 70,000 PNG files, first {missing[0]}: "
            f"run ./setup_ffhq1024.sh FOLDER with the folder of FFHQ's images1024x1024"
        )
    valid = Images(array, np.arange(65000, 70000))
    return Images(array, np.arange(65000)), valid, valid


# ---- what comes with scikit-learn ----------------------------------------------------------


def load_digits(H):
    """The 1,797 handwritten digits that scikit-learn ships: 1,397 train, 200 valid, 200 test.

    Grey with their labels; a network of earlier versions gets them in RGB, or without.
    """
    with needing("scikit-learn", "the data set digits"):
        from sklearn import datasets  # slow to import

    digits = datasets.load_digits()
    levels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # (n, 8, 8)
    array = np.repeat(levels[..., None], H.image_channels, axis=-1)  # (n, 8, 8, 1)
    order = np.random.RandomState(0).permutation(len(array))
    labels = digits.target if labels_of(H) else None
    parts = order[400:], order[:200], order[200:400]
    return tuple(Images(array, part, labels) for part in parts)


def load_photos32(H):
    """Patches of scikit-learn's two sample photographs: 5,300 train, 250 valid, 250 test.

    The photographs, 427 x 640, are cut at columns 448 and 544, so no patch of one split shows
    a pixel of another.
    """
    with needing("scikit-learn", "the data set photos32"):
        from sklearn import datasets  # slow to import

    photos = np.stack(datasets.load_sample_images().images)  # (2, 427, 640, 3)

    def patches(left, right, stride):
        windows = np.lib.stride_tricks.sliding_window_view(
            photos[:, :, left:right], (32, 32), axis=(1, 2)
        )[:, ::stride, ::stride]  # (2, rows, columns, 3, 32, 32)
        return Images(windows.transpose(0, 1, 2, 4, 5, 3).reshape(-1, 32, 32, 3))

    return patches(0, 448, stride=8), patches(448, 544, stride=16), patches(544, 640, stride=16)


LOADERS = {
    "cifar10": load_cifar10,
    "imagenet32": _of_arrays(_imagenet, "imagenet32"),
    "imagenet64": _of_arrays(_imagenet, "imagenet64"),
    "imagenet32_box": _of_arrays(_imagenet, "imagenet32_box"),
    "imagenet64_box": _of_arrays(_imagenet, "imagenet64_box"),
    "ffhq_256": _of_arrays(ffhq256),
    "ffhq_1024": load_ffhq1024,
    "digits": load_digits,
    "photos32": load_photos32,
    "images": load_images,
}


def set_up_data(H):
    """Opens H.dataset; sets H.image_size, H.image_channels, H.n_labels and H.label_names.

    Where H goes on with weights, the network, channels and labels are those that their run has
    recorded, but for what the command line names.

    Returns:
        (H, training set, validation set or with H.test_eval the test set, preprocess_fn).

    Raises:
        UserError: for an unknown data set, or files that are missing or not what they should be.
    """
    H.image_size = image_size_of(H.dataset, setting(H, "image_size"))
    asks = H.dataset == "images" or "image_channels" in (H.given_options or ())
    asked = setting(H, "image_channels") if asks else None
    H.image_channels = image_channels_of(H.dataset, asked)
    if not take_network(H):
        H.label_names = set_labels(H.dataset, setting(H, "labels"))
        H.n_labels = len(H.label_names)
    H.normalisation = starting_normalisation(H) or published_normalisation(H.dataset)
    splits = train, valid, test = LOADERS[H.dataset](H)
    describe_labels(H, splits)
    if H.dataset != "images" and H.normalisation[:2] != IMAGE_SETS[H.dataset][1:3]:
        H.image_mean, H.image_std = H.normalisation[:2]
    device = resolve_device(setting(H, "device"))
    preprocess_fn = make_preprocess(H.dataset, device, H.image_mean, H.image_std)
    return H, train, test if H.test_eval else valid, preprocess_fn
