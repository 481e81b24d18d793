"""Stand-in for the original's `data`, and what a fork's looks like that adds a data set: `digits`.

Data sets are TensorDatasets of uint8, held in memory; FFHQ-1024's, of files, is left out.
"""

import os
import pickle

import numpy as np
import torch
from torch.utils.data import TensorDataset

# Size, shift and scale of the network's input: (level + shift) * scale.
_FACTS = {
    "cifar10": (32, -120.63838, 1 / 64.16736),
    "imagenet32": (32, -116.2373, 1 / 69.37404),
    "imagenet64": (64, -115.92961967, 1 / 69.37404),
    "ffhq_256": (256, -112.8666757481, 1 / 69.84780273),
    "digits": (8, -78.04011, 1 / 95.98312),
}


def set_up_data(H):
    """(H, training set, validation set or with H.test_eval the test set, preprocess_fn)."""
    if H.dataset not in _FACTS:
        raise ValueError(f"unknown dataset {H.dataset}")
    if H.dataset == "cifar10":
        (train, _), (valid, _), (test, _) = cifar10(H.data_root, one_hot=False)
    elif H.dataset == "digits":
        train, valid, test = _digits()
    else:
        whole = {"imagenet32": imagenet32, "imagenet64": imagenet64, "ffhq_256": ffhq256}
        train, valid, test = whole[H.dataset](H.data_root)
    H.image_size, shift, scale = _FACTS[H.dataset]
    H.image_channels = 3
    low_bit = H.dataset == "ffhq_256"

    def preprocess_fn(batch):
        levels = batch[0].float()
        data_input = (levels + shift) * scale
        if low_bit:
            levels = torch.floor(levels / 8) * 8
        return data_input, (levels - 127.5) / 127.5

    train, held_out = (
        TensorDataset(torch.as_tensor(a)) for a in (train, test if H.test_eval else valid)
    )
    return H, train, held_out, preprocess_fn


def mkdir_p(path):
    os.makedirs(path, exist_ok=True)


def flatten(outer):
    return [item for inner in outer for item in inner]


def unpickle_cifar10(file):
    with open(file, "rb") as f:
        return {key.decode(): value for key, value in pickle.load(f, encoding="bytes").items()}


def cifar10(data_root, one_hot=True):
    """((X, Y) of 45,000, of 5,000, of the test set), X uint8 (n, 32, 32, 3)."""
    from sklearn.model_selection import train_test_split

    def read(names):
        batches = [unpickle_cifar10(f"{data_root}/cifar-10-batches-py/{name}") for name in names]
        x = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32)
        y = np.array(flatten(batch["labels"] for batch in batches))
        y = np.eye(10, dtype=np.float32)[y] if one_hot else y[:, None]
        return np.ascontiguousarray(x.transpose(0, 2, 3, 1)), y

    x, y = read(f"data_batch_{i}" for i in range(1, 6))
    splits = train_test_split(x, y, test_size=5000, random_state=11172018)
    train_x, valid_x, train_y, valid_y = splits
    return (train_x, train_y), (valid_x, valid_y), read(["test_batch"])


def _imagenet(data_root, size):
    train = np.load(f"{data_root}/imagenet{size}-train.npy")
    order = np.random.RandomState(42).permutation(len(train))
    test = np.load(f"{data_root}/imagenet{size}-valid.npy")
    return train[order[:-5000]], train[order[-5000:]], test


def imagenet32(data_root):
    return _imagenet(data_root, 32)


def imagenet64(data_root):
    return _imagenet(data_root, 64)


def ffhq256(data_root):
    images = np.load(f"{data_root}/ffhq-256.npy")
    order = np.random.RandomState(5).permutation(len(images))
    train, valid = images[order[:-7000]], images[order[-7000:]]
    return train, valid, valid


def ffhq1024(data_root):
    """The folders of the training, the validation and the test images."""
    return f"{data_root}/train", f"{data_root}/valid", f"{data_root}/valid"


def _digits():
    from sklearn.datasets import load_digits

    levels = np.rint(load_digits().images * (255 / 16)).astype(np.uint8)  # (n, 8, 8)
    images = np.repeat(levels[..., None], 3, axis=-1)  # (n, 8, 8, 3)
    images = images[np.random.RandomState(0).permutation(len(images))]
    return images[400:], images[:200], images[200:400]
