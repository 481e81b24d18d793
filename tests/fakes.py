"""Data sets and checkpoint files that look like the real ones but hold next to nothing."""

import json
import os
import pickle

import imageio.v3 as imageio
import numpy as np
import torch

from hps import get_hparams
from vae import VAE


def tiny_network(size):
    """Options of the smallest sensible network for images of `size` pixels."""
    return [
        "--width=4", "--zdim=1", "--num_mixtures=1", "--custom_width_str=",
        f"--enc_blocks={size}d{size // 4},4d4,1x1", f"--dec_blocks=1x1,4m1,{size}m4",
    ]  # fmt: skip


def write_cifar10(root):
    """The six batches, black but for the test images."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    batches = {f"data_batch_{i}": np.zeros((10000, 3072), np.uint8) for i in range(1, 6)}
    noise = np.random.RandomState(0).randint(0, 256, (10000, 3072), dtype=np.uint8)
    for name, planes in (batches | {"test_batch": noise}).items():
        batch = {b"data": planes, b"labels": [0] * len(planes)}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))


def write_sparse_npy(path, shape):
    """A uint8 .npy file of black images that takes no room on the disk."""
    with open(path, "wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + int(np.prod(shape)))


def write_ffhq1024(folder):
    """The official layout, all names links to two black PNGs."""
    folder.mkdir()
    seeds = [folder / "a", folder / "b"]  # an inode takes 65,000 links at most
    for seed in seeds:
        imageio.imwrite(seed, np.zeros((1024, 1024, 3), np.uint8), extension=".png")
    for i in range(70_000):
        if i % 1000 == 0:
            (folder / f"{i:05}").mkdir()
        os.link(seeds[i % 2], folder / f"{i // 1000 * 1000:05}" / f"{i:05}.png")


def write_data(preset, root):
    """The data set of a preset, where its loader looks below `root`, or in root/photos."""
    if preset == "cifar10":
        write_cifar10(root)
    elif preset == "images64":
        (root / "photos").mkdir()
        noise = np.random.RandomState(0).randint(0, 256, (40, 70, 80, 3), dtype=np.uint8)
        for i, photo in enumerate(noise):
            imageio.imwrite(root / "photos" / f"{i}.jpg", photo)
    elif preset == "imagenet32_box":
        write_sparse_npy(root / f"{preset}-train.npy", (1_281_167, 32, 32, 3))
        write_sparse_npy(root / f"{preset}-valid.npy", (50_000, 32, 32, 3))
    elif preset in ("imagenet32", "imagenet64"):
        size = int(preset[-2:])
        write_sparse_npy(root / f"{preset}-train.npy", (1_281_149, size, size, 3))
        write_sparse_npy(root / f"{preset}-valid.npy", (49_999, size, size, 3))
    elif preset == "ffhq256":
        write_sparse_npy(root / "ffhq-256.npy", (70_000, 256, 256, 3))
    elif preset == "ffhq1024":
        write_ffhq1024(root / "ffhq_images1024x1024")


def write_released(prefix, preset, step=1000):
    """prefix-{model,model-ema,opt}.th and -log.jsonl of a tiny network in the released layouts."""
    H = get_hparams(preset)
    options = [option.removeprefix("--").split("=") for option in tiny_network(H.image_size)]
    H.update({name: type(H[name])(value) for name, value in options})
    vae = VAE(H)
    state = vae.state_dict()
    torch.save({f"module.{name}": t for name, t in state.items()}, f"{prefix}-model.th")
    torch.save(state, f"{prefix}-model-ema.th")
    moments = {
        i: {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.ones_like(p)}
        for i, p in enumerate(vae.parameters())
    }
    group = {"lr": H.lr, "bias_correction": True, "betas": (0.9, 0.9), "eps": 1e-8,
             "weight_decay": H.wd, "initial_lr": H.lr, "step": step,
             "params": [*moments]}  # fmt: skip
    torch.save({"state": moments, "param_groups": [group]}, f"{prefix}-opt.th")
    with open(f"{prefix}-log.jsonl", "w") as file:
        print(json.dumps({"type": "train_loss", "step": step, "epoch": 3}), file=file)
