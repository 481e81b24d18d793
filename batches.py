"""Batches of images: their order, their loading, the network's input made of them.

A data set yields tuples of one uint8 tensor (S, S, c), c channels, and where it has labels of an
int64 one, -1 for none; a batch of them is [uint8 (N, S, S, c)] or [uint8 (N, S, S, c), int64 (N,)].
"""

import atexit
import math
import os
import signal
import weakref

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from endings import SIGNALS, die_with_parent
from errors import UserError
from image_sets import IMAGE_SETS, channels_of
from labels import labels_of
from launchers import resolve_device, world
from noise import DROPPING, MIRRORING, chosen
from options import setting
from resources import fail_quietly, naming_shortages


class Images(Dataset):
    """Some of an array of images, uint8 (n, S, S, c), in memory or in files.

    Item i is a tuple of one uint8 tensor (S, S, c), a copy; with labels also of its label.

    Args:
        indices: which of the array; None: all.
        labels: int64 (n,), of the whole array, -1 for none; None: items have no label.
    """

    def __init__(self, array, indices=None, labels=None):
        self.array = array
        self.indices = np.arange(len(array)) if indices is None else indices
        self.labels = labels if labels is None else np.asarray(labels, dtype=np.int64)

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, i):
        return self.__getitems__([i])[0]

    def __getitems__(self, numbers):
        """The items of these numbers, with one index into the array."""
        indices = self.indices[numbers]
        images = torch.from_numpy(self.array[indices])  # (N, S, S, c)
        if self.labels is None:
            return [(image,) for image in images]
        return list(zip(images, torch.from_numpy(self.labels[indices]), strict=True))


class Varied(Dataset):
    """Training images, in each epoch some of them mirrored, some of their labels dropped.

    Which are is a function of (seed, epoch, the image's index in the whole set): the same for any
    number of workers and processes, and after a resume.

    Args:
        images: a data set of tuples whose first tensor is an image (S, S, c), the second, where
            labels are dropped, its label. Its `indices`, where it has them, are those of its
            images in the whole set.
        batches: the EpochBatches that choose the epoch, and have the seed.
        mirrored, dropped: the probabilities.
    """

    def __init__(self, images, batches, mirrored, dropped):
        self.images, self.batches = images, batches
        self.mirrored, self.dropped = mirrored, dropped

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.__getitems__([i])[0]

    def __getitems__(self, numbers):
        if hasattr(self.images, "__getitems__"):
            items = self.images.__getitems__(numbers)
        else:
            items = [self.images[i] for i in numbers]
        indices = getattr(self.images, "indices", None)
        indices = numbers if indices is None else np.asarray(indices)[numbers]
        seed, epoch = self.batches.seed, self.batches.epoch
        turned = chosen(self.mirrored, indices, seed, MIRRORING, epoch)  # (N,)
        dropped = chosen(self.dropped, indices, seed, DROPPING, epoch)  # (N,)
        varied = []
        for turn, drop, (image, *more) in zip(turned, dropped, items, strict=True):
            if drop:
                more[0] = torch.full_like(torch.as_tensor(more[0]), -1)
            varied.append((image.flip(1) if turn else image, *more))
        return varied


# ---- order ---------------------------------------------------------------------------------


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


# ---- loading -------------------------------------------------------------------------------

# Iterators over batches whose workers are alive.
_iterators = weakref.WeakSet()


@atexit.register
def _end_workers():
    """Before multiprocessing does: it asks by SIGTERM, to which they are deaf, and waits."""
    for iterator in list(_iterators):
        iterator._shutdown_workers()


class _Loader(DataLoader):
    """A DataLoader whose workers' UserErrors stay the one line they are."""

    def __iter__(self):
        try:
            with naming_shortages():
                iterator = super().__iter__()
                if not self.num_workers:
                    yield from iterator
                    return
                _iterators.add(iterator)
                try:
                    yield from iterator
                finally:  # left to the garbage collector, a worker may outlive its iterator
                    iterator._shutdown_workers()
        except UserError as error:
            # A worker's error arrives with the traceback put before it, all made one line.
            raise UserError(str(error).rpartition("UserError: ")[2].removesuffix(r"\n")) from None


def cores():
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def begin_worker(_):
    """In a loader worker: a signal to the whole process group is a request to the run, not to it.

    The worker ends when the run does, however that ends.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    die_with_parent()
    fail_quietly()


def make_loader(H, images, **batching):
    """A DataLoader of batches of images, in H.num_workers processes, pinned for CUDA.

    By default, arrays are read in the training process on the CPU, where that costs less than
    handing batches over; by one worker beside a GPU; PNG files are decoded in up to four.

    Args:
        batching: batch_sampler, or batch_size for the images in their order.
    """
    cuda = resolve_device(setting(H, "device")) != "cpu"
    workers = setting(H, "num_workers")
    if workers is None:
        mine = max(1, cores() // world().local_size)
        workers = min(4, mine) if H.dataset == "ffhq_1024" else int(cuda)
    # A generator of its own: by default it would draw from the one that makes the noise.
    return _Loader(
        images,
        num_workers=workers,
        pin_memory=cuda,
        worker_init_fn=begin_worker,
        generator=torch.Generator(),
        **batching,
    )


def training_batches(H, images):
    """(EpochBatches, loader) of a training run's steps, --grad_accum batches of n_batch each.

    Raises:
        UserError: if the images make no full step.
    """
    me, n_images = world(), H.n_batch * setting(H, "grad_accum")
    batches = EpochBatches(len(images), n_images, me.rank, me.size, setting(H, "seed"))
    if not len(batches):
        raise UserError(
            f"--n_batch {H.n_batch} on {me.size} processes: the {len(images)} training images "
            f"make no full batch; lower --n_batch or --grad_accum"
        )
    mirrored = 0.5 if setting(H, "xflip") else 0.0
    dropped = setting(H, "label_dropout") if labels_of(H) else 0.0
    if mirrored or dropped:
        images = Varied(images, batches, mirrored, dropped)
    return batches, make_loader(H, images, batch_sampler=batches)


# ---- the network's input -------------------------------------------------------------------


def make_preprocess(dataset, device, mean=None, std=None):
    """A function [uint8 (N, S, S, c), ...] → (input, target), float32 of that shape on `device`.

    input is (level - mean) / std, those given or else the data set's; target is in [-1, 1], of 5
    bits where the data set's are. The caller's batch is left as it was.
    """
    facts = IMAGE_SETS[dataset]
    if mean is not None:
        facts = facts._replace(mean=mean, std=std)

    def preprocess_fn(batch):
        levels = batch[0].to(device, non_blocking=True).float()  # (N, S, S, c), 0 to 255
        x = (levels - facts.mean) * (1 / facts.std)
        if facts.bits == 5:
            levels = (levels / 8).floor() * 8
        return x, (levels - 127.5) / 127.5

    return preprocess_fn


def of_channels(images, channels):
    """uint8 images (n, S, S), (n, S, S, 1) or (n, S, S, 3) as (n, S, S, channels), 1 or 3.

    Of a tensor a tensor, of an array an array.

    Grey is repeated; of colours it is Pillow's L, (299 R + 587 G + 114 B) / 1000 in 16 bits.
    """
    if images.ndim == 3:
        images = images[..., None]
    if images.shape[-1] == channels:
        return images
    if channels == 3:
        repeated = torch.as_tensor(images).expand(*images.shape[:3], 3).contiguous()
        return repeated if torch.is_tensor(images) else repeated.numpy()
    of_tensor = torch.is_tensor(images)
    images = (images if of_tensor else torch.tensor(images)).int()
    red, green, blue = images.unbind(-1)
    grey = (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16
    grey = grey[..., None].to(torch.uint8)
    return grey if of_tensor else grey.numpy()


def preprocess(images, H):
    """The network's (input, target) of images, an array or tensor of uint8 (N, S, S, c).

    H is a model's, with its dataset, image_size, image_channels and device. Both are float32
    (N, S, S, c) of its c channels; images of (N, S, S), one channel or three become such
    (of_channels).

    Raises:
        UserError: for images of another type or size.
    """
    images, size = torch.as_tensor(images), H.image_size
    pixels = [(len(images), size, size, *more) for more in ((), (1,), (3,))] if images.ndim else ()
    if images.dtype != torch.uint8 or tuple(images.shape) not in pixels:
        raise UserError(
            f"images are {images.dtype} {tuple(images.shape)}; the model takes uint8 "
            f"(N, {size}, {size}, {channels_of(H)})"
        )
    if H.dataset == "images" and H.image_mean is None:
        raise UserError(
            "the mean and std of the images that the model was trained on are not known: "
            "images.json of its run must lie beside its weights"
        )
    device, images = resolve_device(setting(H, "device")), of_channels(images, channels_of(H))
    return make_preprocess(H.dataset, device, H.image_mean, H.image_std)([images])
