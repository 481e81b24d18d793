"""Data sets: files → uint8 images, and uint8 images → the network's input and target.

A data set yields tuples of one uint8 tensor (S, S, 3); a batch of them is [uint8 (N, S, S, 3)].
"""

import math
import os
import pickle
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from hps import IMAGE_SETS, UserError
from utils import resolve_device


def mkdir_p(path):
    """Makes a folder and its parents where they do not exist."""
    os.makedirs(path, exist_ok=True)


class Images(Dataset):
    """Some of an array of images, uint8 (n, S, S, 3), in memory or memory-mapped.

    Item i is a tuple of one uint8 tensor (S, S, 3), a copy.
    """

    def __init__(self, array, indices=None):
        self.array = array
        self.indices = np.arange(len(array)) if indices is None else indices

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, i):
        return (torch.from_numpy(np.array(self.array[self.indices[i]])),)


def split_last(n, n_valid, seed):
    """Shuffles 0..n-1 with RandomState(seed): (all but the last n_valid, the last n_valid).

    The published splits of ImageNet (seed 42, 5,000) and FFHQ-256 (seed 5, 7,000).
    """
    order = np.random.RandomState(seed).permutation(n)
    return order[:-n_valid], order[-n_valid:]


class EpochBatches(Sampler):
    """The batches of image numbers that one process takes in an epoch, for DataLoader.

    The order of an epoch is torch's DistributedSampler's: a function of (seed, epoch) alone, the
    same for any number of loader workers. Image k of it, counted over all processes, is in a step
    that takes n_batch * size images; the images that fill no whole step are left out. (With an
    uneven number of images per process, the first ones of the order fill up, as in
    DistributedSampler.)

    Args:
        n_images: images of the data set.
        n_batch: images of a batch, per process.
        rank, size: which of how many processes this is.
        seed: of the run.
    """

    def __init__(self, n_images, n_batch, rank, size, seed):
        self.n_images, self.n_batch = n_images, n_batch
        self.rank, self.size, self.seed = rank, size, seed
        self.set_epoch(0)

    def set_epoch(self, epoch, start_image=0):
        """Chooses the epoch, to begin after the first start_image images of its order.

        start_image counts the images that all processes together have taken in this epoch.
        """
        self.epoch, self.start_image = epoch, start_image

    def __len__(self):
        """Batches from start_image to the end of the epoch."""
        return math.ceil((self.n_images - self.start_image) / self.size) // self.n_batch

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.n_images, generator=generator).numpy()
        # np.resize repeats the order from its start.
        order = np.resize(order, self.start_image + len(self) * self.n_batch * self.size)
        mine = order[self.start_image + self.rank :: self.size]  # (len(self) * n_batch,)
        for batch in mine.reshape(-1, self.n_batch):
            yield batch.tolist()


# ---- loaders: H → (train, valid, test) ------------------------------------------------------


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
            import _codecs

            return _codecs.encode
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_cifar10_batch(path):
    """The images of a CIFAR-10 batch file (python pickle): uint8 (n, 32, 32, 3).

    Raises:
        UserError: for a file that is missing, damaged or none of CIFAR-10's.
    """
    remedy = "run ./setup_cifar10.sh in the folder that --data_root names"
    try:
        with open(path, "rb") as file:
            batch = _BatchUnpickler(file, encoding="bytes").load()
        planes = batch[b"data"]
        if planes.dtype != np.uint8 or planes.ndim != 2 or planes.shape[1] != 3 * 32 * 32:
            raise ValueError(f"its data is {planes.dtype} {planes.shape}, not uint8 (n, 3072)")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: {remedy}") from None
    except Exception as error:  # a damaged pickle raises nearly anything
        reason = str(error) or type(error).__name__
        raise UserError(f"{path} is no CIFAR-10 batch ({reason}): {remedy}") from None
    return planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)  # (n, 32, 32, 3)


def load_cifar10(H):
    """45,000 train, 5,000 valid and 10,000 test images."""
    from sklearn.model_selection import train_test_split  # slow to import

    folder = Path(H.data_root, "cifar-10-batches-py")
    train = np.concatenate([read_cifar10_batch(folder / f"data_batch_{i}") for i in range(1, 6)])
    if len(train) != 50000:
        raise UserError(f"{folder} holds {len(train)} training images, not 50000: fetch it anew")
    indices = train_test_split(np.arange(50000), test_size=5000, random_state=11172018)
    test = read_cifar10_batch(folder / "test_batch")
    return Images(train, indices[0]), Images(train, indices[1]), Images(test)


def open_npy(path, shape, remedy):
    """Memory-maps a .npy file of uint8 images of the given shape (n, S, S, 3).

    Raises:
        UserError: for a file that is missing, damaged, or of another type or shape.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: {remedy}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no complete .npy file ({error}): {remedy}") from None
    if not isinstance(array, np.ndarray) or array.dtype != np.uint8 or array.shape != shape:
        found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else "an archive"
        raise UserError(f"{path} holds {found}, not uint8 {shape}: {remedy}")
    return array


def load_imagenet(H):
    """1,276,149 train, 5,000 valid (both of the train file) and 49,999 test images."""
    size, remedy = IMAGE_SETS[H.dataset].image_size, f"run ./setup_imagenet.sh {H.dataset}"
    root = Path(H.data_root)
    train = open_npy(root / f"{H.dataset}-train.npy", (1281149, size, size, 3), remedy)
    test = open_npy(root / f"{H.dataset}-valid.npy", (49999, size, size, 3), remedy)
    train_indices, valid_indices = split_last(len(train), 5000, seed=42)
    return Images(train, train_indices), Images(train, valid_indices), Images(test)


def load_ffhq256(H):
    """63,000 train images and 7,000 that are both valid and test."""
    path = Path(H.data_root, "ffhq-256.npy")
    array = open_npy(path, (70000, 256, 256, 3), "run ./setup_ffhq256.sh")
    train_indices, valid_indices = split_last(len(array), 7000, seed=5)
    valid = Images(array, valid_indices)
    return Images(array, train_indices), valid, valid


class PngArray:
    """PNG files as if they were an array (n, S, S, 3) of uint8, decoded on access."""

    def __init__(self, paths, size):
        self.paths = paths
        self.size = size

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        import imageio.v3 as imageio

        try:
            image = imageio.imread(self.paths[i], mode="RGB")
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"{self.paths[i]} can't be read ({error}): fetch it anew") from None
        if image.shape != (self.size, self.size, 3):
            raise UserError(
                f"{self.paths[i]} is {image.shape[1]} x {image.shape[0]} pixels, "
                f"not {self.size} x {self.size}: fetch it anew"
            )
        return image


def load_ffhq1024(H):
    """65,000 train images (00000 to 64999) and 5,000 that are both valid and test, by number."""
    root = Path(H.data_root)
    flat = (root / "00000.png").exists()
    paths = [
        root / f"{i:05}.png" if flat else root / f"{i // 1000 * 1000:05}" / f"{i:05}.png"
        for i in range(70000)
    ]
    for path in (paths[0], paths[-1]):
        if not path.exists():
            raise UserError(
                f"{path} does not exist: run ./setup_ffhq1024.sh FOLDER with the folder of the "
                f"70,000 PNG files of FFHQ's images1024x1024"
            )
    array = PngArray(paths, 1024)
    valid = Images(array, np.arange(65000, 70000))
    return Images(array, np.arange(65000)), valid, valid


def load_digits(H):
    """The 1,797 handwritten digits that scikit-learn ships: 1,397 train, 200 valid, 200 test."""
    from sklearn import datasets  # slow to import

    levels = np.rint(datasets.load_digits().images * (255 / 16)).astype(np.uint8)  # (n, 8, 8)
    array = np.repeat(levels[..., None], 3, axis=-1)  # (n, 8, 8, 3)
    order = np.random.RandomState(0).permutation(len(array))
    return Images(array, order[400:]), Images(array, order[:200]), Images(array, order[200:400])


def load_photos32(H):
    """Patches of scikit-learn's two sample photographs: 5,300 train, 250 valid, 250 test.

    The photographs, 427 x 640, are cut at columns 448 and 544, so no patch of one split shows
    a pixel of another.
    """
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
    "imagenet32": load_imagenet,
    "imagenet64": load_imagenet,
    "ffhq_256": load_ffhq256,
    "ffhq_1024": load_ffhq1024,
    "digits": load_digits,
    "photos32": load_photos32,
}


# ---- the door ------------------------------------------------------------------------------


def make_preprocess(dataset, device):
    """A function [uint8 (N, S, S, 3), ...] → (input, target), float32 of that shape on `device`.

    input is (level - mean) / std of the data set; target is in [-1, 1], of 5 bits where the data
    set's are. The caller's batch is left as it was.
    """
    facts = IMAGE_SETS[dataset]

    def preprocess_fn(batch):
        levels = batch[0].to(device, non_blocking=True).float()  # (N, S, S, 3), 0 to 255
        x = (levels - facts.mean) * (1 / facts.std)
        if facts.bits == 5:
            levels = (levels / 8).floor() * 8
        return x, (levels - 127.5) / 127.5

    return preprocess_fn


def set_up_data(H):
    """Opens H.dataset and sets H.image_size and H.image_channels.

    Returns:
        (H, training set, validation set or with H.test_eval the test set, preprocess_fn).

    Raises:
        UserError: for an unknown data set, or files that are missing or not what they should be.
    """
    if H.dataset not in IMAGE_SETS:
        raise UserError(f"unknown dataset {H.dataset!r}: it is one of {', '.join(IMAGE_SETS)}")
    H.image_size = IMAGE_SETS[H.dataset].image_size
    H.image_channels = 3
    train, valid, test = LOADERS[H.dataset](H)
    preprocess_fn = make_preprocess(H.dataset, resolve_device(H.device))
    return H, train, test if H.test_eval else valid, preprocess_fn
