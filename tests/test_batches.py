"""The order of images, their loading by workers, the input made of them."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from fakes import images_of, noise, own_H
from runs import ROOT, environment
from torch.utils.data import DataLoader, DistributedSampler, Subset

from batches import EpochBatches, Images, make_loader, make_preprocess, preprocess
from data import set_up_data
from errors import UserError
from hps import get_hparams

# ---- order -----------------------------------------------------------------------------------


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


# ---- loading ---------------------------------------------------------------------------------


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
from batches import Images, make_loader
from image_files import NpyImages
from hps import Hyperparams
images = Images(NpyImages(sys.argv[1]))
for batch in make_loader(Hyperparams(device="cpu", num_workers=1), images, batch_size=4):
    raise KeyError("a fault of the program's")
"""
    done = subprocess.run(
        [sys.executable, "-i", "-c", program, tmp_path / "mine.npy"],  # -i keeps the traceback
        env=environment() | {"PYTHONPATH": str(ROOT)}, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=600,
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


# ---- the network's input ---------------------------------------------------------------------


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


def test_preprocess_is_that_of_the_data_set():
    H = get_hparams("ffhq256")
    H.image_size = 4
    images = np.random.RandomState(0).randint(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    x, target = preprocess(images, H)
    assert torch.allclose(x, torch.from_numpy((images - 112.8666757481) / 69.84780273).float())
    assert torch.allclose(target, torch.from_numpy((images // 8 * 8 - 127.5) / 127.5).float())
    for wrong in (images.astype(np.float32), images[:, :3], images[0]):
        with pytest.raises(UserError, match=r"uint8 \(N, 4, 4, 3\)"):
            preprocess(wrong, H)


def test_a_program_that_outlives_a_loader_s_error_ends():
    """Its workers end with their iterator: left to the garbage collector, they hung at the exit."""
    program = """
import gc
from batches import Images, make_loader
from errors import UserError
from options import Hyperparams
class Bad:
    def __len__(self):
        return 10
    def __getitem__(self, numbers):
        raise UserError("a bad image")
try:
    list(make_loader(Hyperparams(device="cpu", num_workers=1), Images(Bad()), batch_size=2))
except UserError as error:
    print(error)
gc.collect()
import multiprocessing
print(multiprocessing.active_children())
"""
    done = subprocess.run([sys.executable, "-c", program], env=environment(PYTHONPATH=str(ROOT)),
                          capture_output=True, text=True, timeout=600)  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "a bad image\n[]\n"), done.stderr
