"""Data sets on tiny real files of each format, the order of images, and what reading costs."""

import pytest
from torch.utils.data import DataLoader, DistributedSampler

from data import EpochBatches

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
