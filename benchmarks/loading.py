"""What images cost before they reach the network: memory, time to the first batch, images/s.

    python benchmarks/loading.py memory arrays png folder

memory: a process of its own trains a small network on a sparse 15.7 GB imagenet64-train.npy, and
then reads on to its 2,000th batch, against the same on a file of 200 images. arrays: batches of
that file by number of workers, from the system's cache, beside an array in memory. png: 1024 x 1024
PNG files by number of workers. folder: own images, packed at the first start and found at the
second. Needs 200 MB of disk.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import torch

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

from batches import EpochBatches, Images, make_loader
from data import FfhqFiles, set_up_data
from endings import run_command
from hps import Hyperparams, add_vae_arguments, parse_args_and_update_hparams
from launchers import resolve_device
from optimizers import make_optimizer
from options import OneLineParser, add_own_options
from train import training_step
from train_helpers import load_vaes


def make_H(*options):
    H = Hyperparams()
    small = "--hps images64 --device cpu --n_batch 16 --width 16 --custom_width_str= "
    small += "--enc_blocks 64x1,64d8,8x1 --dec_blocks 8x1,64m8"
    parser = add_vae_arguments(OneLineParser())
    add_own_options(parser)
    parse_args_and_update_hparams(H, parser, [*small.split(), *map(str, options)])
    return H


def sparse_npy(path, shape):
    """A .npy file of zeros that takes no room on the disk."""
    with open(path, "wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + int(np.prod(shape)))


def resident_mb():
    """Resident memory of this process, pages of mapped files included."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1000
    raise RuntimeError("no VmRSS in /proc/self/status")


def child(device, dataset, root, started):
    """Opens a data set, trains 10 steps, reads 2,000 batches; prints seconds and megabytes."""
    start = time.time()
    H = make_H("--dataset", dataset, "--data_root", root, "--device", device)
    H.update(mpi_size=1, rank=0, local_rank=0)
    H, train, _, preprocess_fn = set_up_data(H)
    batches = EpochBatches(len(train), H.n_batch, 0, 1, seed=0)
    loader = make_loader(H, train, batch_sampler=batches)
    next(iter(loader))
    first_batch_s, with_imports_s = time.time() - start, time.time() - float(started)
    vae, ema_vae = load_vaes(H, lambda *_, **__: None)
    optimizer, _ = make_optimizer(vae.parameters(), H, use_apex=False)

    def epochs():
        for epoch in itertools.count():
            batches.set_epoch(epoch)
            yield from loader

    peak = 0
    for step, batch in enumerate(itertools.islice(epochs(), 2000)):
        if step < 10:
            training_step(H, *preprocess_fn(batch), vae, ema_vae, optimizer, step)
        peak = max(peak, resident_mb())
    figures = {"first_batch_s": first_batch_s, "first_batch_with_imports_s": with_imports_s}
    print(json.dumps({**figures, "resident_mb": peak}))


def measure_memory(folder, device="cpu"):
    big, tiny = folder / "imagenet64-train.npy", folder / "tiny.npy"
    sparse_npy(big, (1281149, 64, 64, 3))
    sparse_npy(folder / "imagenet64-valid.npy", (49999, 64, 64, 3))
    noise = np.random.default_rng(0).integers(0, 256, (200, 64, 64, 3), dtype=np.uint8)
    np.save(tiny, noise)

    def run(*args):
        command = [sys.executable, __file__, "memory", "--child", device, *map(str, args)]
        command += [str(time.time())]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    on_big, on_tiny = run("imagenet64", folder), run("images", tiny)
    return {
        "file_bytes": big.stat().st_size,
        **on_big,
        "resident_mb_tiny_file": on_tiny["resident_mb"],
        "resident_growth_mb": on_big["resident_mb"] - on_tiny["resident_mb"],
    }


def images_per_second(H, images, n):
    batches = [list(range(first, first + H.n_batch)) for first in range(0, n, H.n_batch)]
    loader = make_loader(H, images, batch_sampler=batches)
    iterator = iter(loader)
    next(iterator)  # starting workers is no part of it
    start = time.time()
    count = sum(len(batch[0]) for batch in iterator)
    return count / (time.time() - start)


def measure_arrays(folder):
    sparse_npy(folder / "imagenet64-train.npy", (1281149, 64, 64, 3))
    sparse_npy(folder / "imagenet64-valid.npy", (49999, 64, 64, 3))
    H = make_H("--dataset", "imagenet64", "--data_root", folder)
    H, train, _, _ = set_up_data(H)
    figures = {}
    in_memory = Images(np.zeros((20000, 64, 64, 3), np.uint8))
    for workers in (0, 1, 2):
        H.num_workers = workers
        if workers == 0:
            figures["file_0_workers_first_time"] = images_per_second(H, train, 20000)
        figures[f"file_{workers}_workers"] = images_per_second(H, train, 20000)
        figures[f"in_memory_{workers}_workers"] = images_per_second(H, in_memory, 20000)
    return figures


def measure_png(folder):
    # Waves and some noise: about the 1.3 MB that an FFHQ picture has on average.
    y, x = np.mgrid[:1024, :1024] / 50
    smooth = 100 + 50 * np.stack([np.sin(x), np.cos(y), np.sin(x + y)], axis=-1)
    rng = np.random.default_rng(0)
    for i in range(24):
        picture = smooth + rng.normal(0, 4, smooth.shape)
        imageio.imwrite(folder / f"{i:05}.png", picture.clip(0, 255).astype(np.uint8))
    H = make_H("--n_batch", 1)
    figures = {"file_mb": (folder / "00000.png").stat().st_size / 1e6}
    for workers in (0, 1, 2):
        H.num_workers = workers
        images = Images(FfhqFiles(folder), np.arange(24))
        figures[f"{workers}_workers"] = images_per_second(H, images, 24)
    return figures


def measure_folder(folder):
    root = folder / "photos"
    rng = np.random.default_rng(0)
    for i in range(2000):
        path = root / f"{i % 20:02}" / f"{i:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
        imageio.imwrite(path, np.kron(coarse, np.ones((10, 10, 1), np.uint8)))
    figures = {"images": 2000, "pixels": "400x300 to 64x64"}
    for start_number in ("first_start_s", "second_start_s"):
        start = time.time()
        set_up_data(make_H("--data_root", root))
        figures[start_number] = time.time() - start
    return figures


MEASURES = {
    "memory": measure_memory,
    "arrays": measure_arrays,
    "png": measure_png,
    "folder": measure_folder,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("measures", nargs="+", choices=MEASURES)
    parser.add_argument("--device", default="cpu", help="of `memory`'s steps: cpu or cuda")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.child:
        child(*args.child)
        return
    for name in args.measures:
        with tempfile.TemporaryDirectory() as folder:
            device = [resolve_device(args.device)] if name == "memory" else []
            figures = MEASURES[name](Path(folder), *device)
        rounded = {k: round(v, 2) if isinstance(v, float) else v for k, v in figures.items()}
        print(json.dumps({"measure": name, **rounded}))


if __name__ == "__main__":
    run_command(main)
