"""Noise of the next pass of images, drawn by threads while this one is computed.

Image by image, layer by layer: each number is the one that the image's generator gives, in the
order in which the network asks. The first pass draws as it goes, and so shows that order.
"""

import concurrent.futures
import math
import os

import torch

from launchers import world
from noise import image_generators

# Of a pass's noise that is drawn ahead; there are two buffers of it, pinned, and one on the GPU.
MOST_BYTES = 2**29
# Does on the CPU too what pays on CUDA alone, where drawing takes no time of the device: for tests.
AS_ON_CUDA = False


class Generators(list):
    """The generators of a pass's images; what they are to give may have been drawn already.

    Attributes:
        plan: (shape, fill) of what one image draws, in order; the first pass appends to it.
        drawn: tensors of all images, one an entry of the plan; None where nothing was drawn.
    """

    plan = drawn = None


class Ahead:
    """Gives the generators of one pass after another, and draws ahead for the following one.

    Args:
        device: the network's.
        following: (indices of the images, key of noise.image_generators) of a pass → those of the
            next one, no indices at the end; called once a pass, in order.
    """

    def __init__(self, device, following):
        self.device, self.following = torch.device(device), following
        self.on = self.device.type == "cuda" or AS_ON_CUDA
        self.plan, self.pool, self.buffers, self.turn = [], None, [None, None], 0
        self.under_way = None  # (indices, key), flat buffer, futures of the next pass

    def __call__(self, indices, *key):
        """The Generators of a pass."""
        generators = Generators(image_generators(indices, *key))
        if not self.on:
            return generators
        following = self.following(indices, key)
        if not self.plan:
            generators.plan = self.plan  # to be noted
            return generators
        if self.under_way is None or self.under_way[0] != (list(indices), key):
            self._begin(indices, key)
        if self.under_way:
            generators.plan, generators.drawn = self.plan, self._take()
            self._begin(*following)
        return generators

    def _begin(self, indices, key):
        """Has the threads draw for images of these indices, unless that takes too much memory."""
        self._wait()
        self.under_way = None
        n, row = len(indices), sum(math.prod(shape) for shape, _ in self.plan)
        if not n or 4 * n * row > MOST_BYTES:
            return
        if self.pool is None:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
            threads = max(1, min(8, cores // world().local_size))
            self.pool = concurrent.futures.ThreadPoolExecutor(threads)
        flat = self._buffer(n * row)
        rows = [t.unbind() for t in self._parts(flat, n)]  # of each entry of the plan
        jobs = zip(image_generators(indices, *key), zip(*rows, strict=True), strict=True)
        futures = [self.pool.submit(self._draw, *job) for job in jobs]
        self.under_way = (list(indices), key), flat, futures

    def _buffer(self, size):
        """One of the two buffers, in turn, when the copy that was made of it is done."""
        self.turn = 1 - self.turn
        buffer, copied = self.buffers[self.turn] or (None, None)
        if copied is not None:
            copied.synchronize()
        if buffer is None or len(buffer) < size:
            buffer = torch.empty(size, pin_memory=self.device.type == "cuda")
            self.buffers[self.turn] = buffer, None
        return buffer[:size]

    def _parts(self, flat, n):
        """Tensors of n images, one an entry of the plan, that lie one after another in `flat`."""
        sizes = [n * math.prod(shape) for shape, _ in self.plan]
        pieces = zip(flat.split(sizes), self.plan, strict=True)
        return [piece.view(n, *shape) for piece, (shape, _) in pieces]

    def _draw(self, generator, rows):
        with torch.inference_mode():  # the buffer may have been made in it
            for row, (_, fill) in zip(rows, self.plan, strict=True):
                fill(row, generator=generator)

    def _take(self):
        """The tensors of the pass under way, on the device: one copy, which nothing waits for."""
        self._wait()
        (indices, _), flat, _ = self.under_way
        if self.device.type == "cuda":
            there = flat.to(self.device, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
            self.buffers[self.turn] = self.buffers[self.turn][0], copied
        else:
            there = flat.clone()  # the buffer is filled anew while these are in use
        return self._parts(there, len(indices))

    def _wait(self):
        """Until the threads have drawn what is under way."""
        for future in self.under_way[2] if self.under_way else ():
            future.result()
