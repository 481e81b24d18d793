"""Mirrored training images: which are is a function of seed, epoch and image."""

import itertools

import numpy as np
import pytest
import torch
from fakes import noise, run_H
from runs import check_resumes
from torch.utils.data import TensorDataset

from batches import EpochBatches, Images, Varied, training_batches
from data import set_up_data
from noise import MIRRORING, chosen


def mirrored_of(seed, epochs, workers=0, rank=0, size=1, start=0):
    """{(epoch, index in the whole set): whether it came out mirrored} of what one rank takes."""
    array = noise(40, 4)
    indices = np.arange(5, 37)
    H = run_H(".", "digits", n_batch=4, seed=seed, device="cpu")
    H.update(xflip=True, num_workers=workers)
    _, loader = training_batches(H, Images(array, indices))
    batches = EpochBatches(len(indices), 4, rank, size, seed)
    loader = type(loader)(Varied(Images(array, indices), batches, 0.5, 0), batch_sampler=batches,
                          num_workers=workers)  # fmt: skip
    found = {}
    for epoch in epochs:
        batches.set_epoch(epoch, start)
        for image in itertools.chain.from_iterable(batch[0].numpy() for batch in loader):
            [index] = [i for i in indices if (array[i] == image).all() or
                       (array[i][:, ::-1] == image).all()]  # fmt: skip
            found[epoch, index] = not (array[index] == image).all()
    return found


def test_it_belongs_to_seed_epoch_and_image():
    whole = mirrored_of(0, range(3))
    assert len(whole) == 3 * 32 and 30 < sum(whole.values()) < 66
    assert all(chosen(0.5, [i], 0, MIRRORING, epoch)[0] == m for (epoch, i), m in whole.items())
    assert mirrored_of(0, [2], workers=2).items() <= whole.items()
    parts = [mirrored_of(0, range(3), rank=rank, size=2) for rank in range(2)]
    assert parts[0] | parts[1] == whole and not parts[0].keys() & parts[1].keys()
    assert mirrored_of(0, [1], start=8).items() <= whole.items()  # taken up in the middle
    assert mirrored_of(1, range(3)) != whole
    assert {whole[e, 7] for e in range(3)} | {whole[e, 9] for e in range(3)} == {True, False}


def test_what_is_chosen_is_chosen_anywhere_and_as_often_as_asked():
    indices = np.arange(100_000)
    for probability in (0, 0.1, 0.5, 1):
        mask = chosen(probability, indices, 0, MIRRORING, 3)
        assert abs(mask.mean() - probability) < 0.006
        assert (chosen(probability, indices[::-7], 0, MIRRORING, 3) == mask[::-7]).all()
    other = chosen(0.5, indices, 0, MIRRORING, 4) == chosen(0.5, indices, 0, MIRRORING, 3)
    assert abs(other.mean() - 0.5) < 0.006
    pairs = chosen(0.5, indices, 0, MIRRORING, 3)
    assert abs((pairs[1:] == pairs[:-1]).mean() - 0.5) < 0.006  # nor do neighbours agree


@pytest.mark.parametrize("xflip", [False, True])
def test_it_is_off_by_default_and_touches_training_alone(xflip):
    H = run_H(".", "digits", device="cpu")
    assert H.xflip is False
    H.xflip = xflip
    H, train, valid, _ = set_up_data(H)
    batches, loader = training_batches(H, train)
    first, labels = next(iter(loader))
    assert labels.dtype == torch.int64
    mine = torch.stack([train[i][0] for i in next(iter(batches))])
    assert torch.equal(first, mine) == (not xflip)
    assert isinstance(valid, Images) and isinstance(train, Images)


def test_a_program_s_own_data_set():
    images = torch.from_numpy(noise(8, 4))
    batches = EpochBatches(8, 8, 0, 1, seed=0)
    labelled = Varied(TensorDataset(images, torch.arange(8)), batches, 0.5, 0)
    turned = chosen(0.5, range(8), 0, MIRRORING, 0)
    for i, (image, label) in enumerate(labelled):
        assert label == i and torch.equal(image, images[i].flip(1) if turned[i] else images[i])
        if i == 7:
            break


def test_a_resumed_run_is_the_unbroken_one(tmp_path):
    check_resumes(["--xflip"], tmp_path)
