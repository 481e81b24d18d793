"""Data sets and checkpoint files that look like the real ones but hold next to nothing, opened."""

import json
import math
import os
import pickle
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from golden import weight
from PIL import Image

from checkpoints import write_checkpoint
from data import set_up_data
from errors import UserError
from hps import Hyperparams, add_vae_arguments, get_hparams, parse_args_and_update_hparams
from options import OneLineParser, add_own_options
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
        for label in "ab":
            (root / "photos" / label).mkdir(parents=True)
        noise = np.random.RandomState(0).randint(0, 256, (40, 70, 80, 3), dtype=np.uint8)
        for i, photo in enumerate(noise):
            imageio.imwrite(root / "photos" / "ab"[i % 2] / f"{i}.jpg", photo)
    elif preset == "imagenet32_box":
        sparse_npy(root / f"{preset}-train.npy", (1_281_167, 32, 32, 3))
        sparse_npy(root / f"{preset}-valid.npy", (50_000, 32, 32, 3))
    elif preset in ("imagenet32", "imagenet64"):
        size = int(preset[-2:])
        sparse_npy(root / f"{preset}-train.npy", (1_281_149, size, size, 3))
        sparse_npy(root / f"{preset}-valid.npy", (49_999, size, size, 3))
    elif preset == "ffhq256":
        sparse_npy(root / "ffhq-256.npy", (70_000, 256, 256, 3))
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


def write_sample_folder(folder):
    """ema.th, weights of the preset digits; a.png and b.jpg, pictures of another size."""
    state = {k: weight(k, v.shape) for k, v in VAE(get_hparams("digits")).state_dict().items()}
    for name in state:  # so that another image makes another picture, not its noise alone
        state[name] *= 4 if name.startswith("encoder.") else 3 if ".z_proj." in name else 1
    torch.save(state, folder / "ema.th")
    pixels = np.random.RandomState(0).randint(0, 256, (2, 20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels[0]).save(folder / "a.png")
    Image.fromarray(pixels[1]).convert("L").save(folder / "b.jpg")
    return folder


def write_digits_run(folder):
    """A run's folder whose weights have the shapes of the preset digits, but not its blocks."""
    H = get_hparams("digits", dec_blocks="1x1,4m1,4x3,8m4,8x1", dataset="images", image_size=8,
                    image_channels=1, n_labels=10)  # fmt: skip
    H.update(hparam_sets="digits", image_mean=70.0, image_std=90.0, save_dir=str(folder.parent))
    H.progress = {"step": 1}
    vae = VAE(H)
    folder.mkdir()
    write_checkpoint(str(folder / "latest"), vae, vae, torch.optim.AdamW(vae.parameters()), H)
    return folder


RGB_RUN = Path(__file__).parent / "data" / "rgb_digits"  # a run on coloured images


class Hostile:
    """A pickle of it makes a folder, `path`, when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


# ---- opened --------------------------------------------------------------------------------


def parsed(*args):
    """H of a command line."""
    H = Hyperparams()
    parser = add_vae_arguments(OneLineParser())
    add_own_options(parser)
    parse_args_and_update_hparams(H, parser, args)
    return H


def run_H(data_root, dataset, **options):
    """H as train.py has it, on the CPU, without a run's folder."""
    s = ["--hps", "digits", "--dataset", dataset, "--data_root", str(data_root), "--device", "cpu"]
    for name, value in options.items():
        s += [f"--{name}", str(value)]
    return parsed(*s)


def own_H(root, size=16, run=None, **options):
    """H for own images, in the run's folder `run` where one is given."""
    H = run_H(root, "images", **options, **({"image_size": size} if size else {}))
    if run:
        run.mkdir(exist_ok=True)
        H.logdir = str(run / "log")
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


def arr_0(path="out.npz"):
    with np.load(path) as file:
        assert list(file) == ["arr_0"]
        return file["arr_0"]


def nearly_equal(a, b):
    """Equal but for what the rounding of another batch size does."""
    return a.shape == b.shape and (a != b).mean() < 0.01


def assert_refused(action, *words):
    with pytest.raises(UserError) as error:
        action()
    assert "\n" not in str(error.value)
    for word in words:
        assert str(word) in str(error.value)
