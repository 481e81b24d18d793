"""The weights that a run starts from: which files they are in, what they were trained with."""

import os

import numpy as np
import torch.distributed as dist

from errors import UserError
from image_sets import CHANNELS, IMAGE_SETS, set_labels
from labels import labels_of
from launchers import world
from logs import print_and_log
from options import OPTIONS, setting
from presets import facts_of_shapes, shapes_of
from records import normalisation_of, state_beside
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


def same_labels(H, path, state):
    """Whether the weights `state`, of the file `path`, know the labels of H, in their order.

    Where nothing tells their names, those of as many labels are taken to be the same.
    """
    if facts_of_shapes(shapes_of(state))[1] != labels_of(H):
        return False
    _, old = state_beside(path) or (None, {})
    return old.get("label_names") in (None, H.label_names)


BOTH = ("images", "digits")  # data sets that come grey or in RGB

# What a record tells of images and labels, beside the options of a network.
RECORDED = ("image_channels", "labels", "n_labels", "label_names")


def take_network(H):
    """Gives H the network, channels and labels of the run whose weights it goes on with.

    A run's own network wins over a preset that has changed since; what the command line names wins
    over both. A record from before there were labels means none. Without a record, and for a new
    training that starts from weights, their shapes tell channels, and labels of the former.

    Returns:
        whether H.n_labels and H.label_names are theirs.

    Raises:
        UserError: for a damaged record; as read_weights; for channels that the data set, or under
            --resume the run, does not have.
    """
    weights, ema = starting_paths(H)
    if not (ema or weights):
        return False
    path = fetched(ema or weights)
    if not os.path.exists(path):  # which load_vaes then says
        return False
    state, old = state_beside(path) or (None, {})
    recorded = {"enc_blocks", "dec_blocks", "image_channels"} <= old.keys()
    # A program that has made H names all that it wants.
    if setting(H, "init_from") or H.given_options is None or not recorded:
        return _take_shapes(H, path, old)
    if H.image_size and old.get("image_size") not in (None, H.image_size):
        return False  # another model, as load_vaes then says
    return _take_record(H, state, old)


def _take_shapes(H, path, old):
    """take_network by the shapes of weights, with the names of labels that a record tells."""
    channels, n_labels = facts_of_shapes(shapes_of(read_weights(path)))
    given = H.given_options or ()
    if channels in CHANNELS and "image_channels" not in given and H.dataset in BOTH:
        H.image_channels = channels
    if setting(H, "init_from") or "labels" in given:
        return False
    names = [old.get("label_names"), H.label_names, [str(i) for i in range(n_labels)]]
    H.n_labels = n_labels
    H.label_names = next(found for found in names if len(found or ()) == n_labels) or []
    return True


def _take_record(H, state, old):
    """take_network by the hyperparameters `old` that the file `state` has recorded."""
    names = [name for name, *_ in OPTIONS["network"] if name in old]
    taken = [name for name in [*names, *RECORDED] if name not in H.given_options]
    changed = [n for n in names if n in taken and H[n] != old[n]]
    channels = H.image_channels if "image_channels" in H.given_options else old["image_channels"]
    if H.resumed and channels != old["image_channels"]:
        raise UserError(
            f"--resume: image_channels is {channels} now; the run had {old['image_channels']}, and "
            f"the network depends on it: set it back"
        )
    if H.dataset not in BOTH and channels != IMAGE_SETS[H.dataset].channels:
        raise UserError(
            f"{state} tells of a network for {channels} channels, {H.dataset} has "
            f"{IMAGE_SETS[H.dataset].channels}: name a --dataset of as many, such as images"
        )
    H.update({name: old.get(name) for name in taken})
    H.n_labels, H.label_names = old.get("n_labels") or 0, old.get("label_names") or []
    if "labels" in H.given_options and H.dataset != "images":
        H.label_names = set_labels(H.dataset, H.labels)
        H.n_labels = len(H.label_names)
    if changed:
        values = ", ".join(f"{name} {H[name]}" for name in changed)
        print_and_log(H.logdir, f"the network is the one of {state}, not today's preset: {values}")
    if setting(H, "test_eval"):
        H.label_dropout = old.get("label_dropout", 1.0)
        H.label_counts = old.get("label_counts")
    return True


def describe_labels(H, splits):
    """Holds the options of labels against the data's; sets H.label_counts and H.n_told.

    n_told is the number of labelled images that are evaluated. The counts are the numbers of
    training images of each label and, last, of those without; with H.test_eval, those of the
    weights' own training.

    Args:
        splits: the training, validation and test set, batches.Images; those without labels get -1
            for each image where the network knows labels.

    Raises:
        UserError: for options of labels where there are none, or an evaluation without labels of
            a network that has never been without.
    """
    n_labels, given = labels_of(H), H.given_options or ()
    if not n_labels:
        for name in ("label", "label_dropout"):
            if name in given:
                raise UserError(
                    f"--{name} {H[name]}: {H.dataset} has no labels here: leave it out"
                    + (", or name them with --labels" if H.dataset in ("cifar10", "images") else "")
                )
        return
    for images in splits:
        if images.labels is None:
            images.labels = np.full(len(images.array), -1)
    if not (H.test_eval and H.label_counts):
        labels = splits[0].labels[splits[0].indices]
        counts = np.bincount(labels[labels >= 0], minlength=n_labels)
        H.label_counts = [*counts.tolist(), int((labels < 0).sum())]
    evaluated = splits[2 if H.test_eval else 1]
    H.n_told = int((evaluated.labels[evaluated.indices] >= 0).sum())
    if not labels_told(H):
        refuse_unlabelled(H, "--label none" if "label" in given else "no image has a label")


def labels_told(H):
    """Whether an evaluation is told labels: they are asked for, and some image has one."""
    return setting(H, "label") == "given" and H.n_told != 0


def refuse_unlabelled(H, what):
    """Raises UserError for a network that was always told labels: it knows nothing without."""
    if labels_of(H) and H.label_counts and not H.label_counts[-1] and H.label_dropout == 0:
        raise UserError(
            f"{what}: the weights were trained with --label_dropout 0 on labelled images alone, so "
            f"they know no images without a label: name a label"
        )
