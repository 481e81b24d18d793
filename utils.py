"""Small tools that know no VAE: ranks, means over them, logs, tiles."""

import math

import numpy as np
import torch

from downloads import maybe_download  # noqa: F401  programs import it from here
from launchers import world
from logs import log_event
from noise import image_generators  # noqa: F401  programs import it from here
from options import Hyperparams  # noqa: F401  likewise
from processes import allreduce

# ---- processes -----------------------------------------------------------------------------


def mpi_size():
    """Number of processes of the run, however they were started."""
    return world().size


def mpi_rank():
    """Number of this process, 0 to mpi_size() - 1."""
    return world().rank


def local_mpi_rank():
    """Number of this process among those on its host."""
    return world().local_rank


def num_nodes():
    """Number of hosts that the run's processes are on."""
    return math.ceil(world().size / world().local_size)


def gpus_per_node():
    """Number of the run's processes on a host."""
    return world().local_size


def get_cpu_stats_over_ranks(stat_dict):
    """Means over all processes of a dict of scalars (0-dim tensors or numbers), as floats.

    All of them travel in one vector: one reduction and one device synchronisation.
    """
    device = next((v.device for v in stat_dict.values() if torch.is_tensor(v)), None)
    # torch.full makes a number on the device, where as_tensor would copy it there and wait.
    values = [
        v.detach().float() if torch.is_tensor(v) else torch.full((), float(v), device=device)
        for v in stat_dict.values()
    ]
    return dict(zip(stat_dict, allreduce(torch.stack(values), average=True).tolist(), strict=True))


get_cpu_stats_over_ranks.in_steps = (
    get_cpu_stats_over_ranks  # which does the same, and reads the floats later
)


# ---- logs, pictures ------------------------------------------------------------------------


def logger(log_prefix):
    """A function log(*args, pprint=False, **kwargs) that prints, and appends to two files.

    One event is one line: key-value pairs, `time` first, args joined as `message`, of
    log_prefix.txt and one JSON object of log_prefix.jsonl (pprint: keys in alphabetical order).
    Ranks other than 0 say nothing. A line that can't be written is reported on stderr.
    """

    def log(*args, pprint=False, **kwargs):
        if mpi_rank() == 0:
            log_event(log_prefix, args, pprint, kwargs)

    log.buffers = True  # as logs.buffer_log asks
    return log


def tile_images(images, d1=4, d2=4, border=1):
    """d1 rows of d2 pictures (each uint8 (h, w, c)) on white, `border` pixels around each.

    Returns uint8 (d1 * (h + border) + border, d2 * (w + border) + border, c).

    Raises:
        ValueError: if there are not d1 * d2 pictures.
    """
    if len(images) != d1 * d2:
        raise ValueError(f"{len(images)} pictures do not fill {d1} rows of {d2}")
    h, w, c = images[0].shape
    tiled = np.full(
        (d1 * (h + border) + border, d2 * (w + border) + border, c), 255, dtype=np.uint8
    )
    for index, image in enumerate(images):
        row, column = divmod(index, d2)
        top, left = border + row * (h + border), border + column * (w + border)
        tiled[top : top + h, left : left + w] = image
    return tiled
