"""The weights that a run starts from: which files they are in, what they were trained with."""

import os

import torch.distributed as dist

from errors import UserError
from launchers import world
from options import setting
from presets import shapes_of
from records import normalisation_of
from turns import each_host_first
from utils import maybe_download
from weights import read_weights

# Of a run's folder or one of its checkpoints, the first that is there.
BEST_FIRST = ("best-model-ema.th", "latest-model-ema.th", "model-ema.th", "latest-model.th")


def fetched(path):
    """A local path for `path`; of an address each host's first process fetches the file."""
    if not path.startswith(("http://", "https://")) or not dist.is_initialized():
        return maybe_download(path)
    with each_host_first(world().local_rank, world().size):
        return maybe_download(path)


def weights_in(place):
    """The file of weights that --init_from names: itself, or the best of a run's folder.

    Raises:
        UserError: for a folder without any.
    """
    if not os.path.isdir(place):
        return place
    found = [os.path.join(place, name) for name in BEST_FIRST]
    found = [path for path in found if os.path.isfile(path)]
    if not found:
        raise UserError(
            f"--init_from {place}: the folder holds none of {', '.join(BEST_FIRST)}: name a run's "
            f"folder, or a file of weights"
        )
    return found[0]


def starting_paths(H):
    """(file of the weights, file of the EMA) that a run starts from; None: random, the weights'.

    --init_from gives both. An EMA file without one of weights gives both too, where the run trains:
    released checkpoints have at times no other.
    """
    if init_from := setting(H, "init_from"):
        path = weights_in(init_from)
        return path, path
    ema = H.restore_ema_path
    return H.restore_path or (None if H.test_eval else ema), ema


def starting_normalisation(H):
    """The Normalisation of the weights that the run starts from, or None: its data set's own.

    H.init_from becomes the file that it names. A published data set keeps its own facts under
    --restore_*, as in the original, unless a run that was itself started from other weights has
    recorded theirs.

    Raises:
        UserError: as weights_in, normalisation_of.
    """
    weights, ema = starting_paths(H)
    if not (ema or weights):
        return None
    if setting(H, "init_from"):
        H.init_from = weights
    path = fetched(ema or weights)
    counts = H.dataset == "images" or setting(H, "init_from")
    return normalisation_of(path, (lambda: shapes_of(read_weights(path))) if counts else None)
