"""The user's own images: any folder of pictures, or one .npy, as a data set.

A folder is packed once into an .npy of its own; mean, standard deviation and split are measured
once, then kept in the run's folder as images.json.
"""

import hashlib
import math
import os
from pathlib import Path

import numpy as np

from batches import Images, of_channels
from decoding import rgb_of
from errors import UserError
from file_kinds import what_file
from files import read_json, write_json
from image_files import ImageArray, NpyImages, list_images, open_npy
from label_files import labels_digest, labels_of_array, labels_of_files, numbers_of
from logs import print_and_log
from options import DEFAULTS, setting
from packing import Packing, cached, names_in_packing, packed_images, state_of
from safetensors_files import metadata_of

# ---- the images ----------------------------------------------------------------------------


def open_own(H, how):
    """(NpyImages, facts as of measure) of --data_root, a folder of images or one .npy.

    how: the Packing of a folder.

    Raises:
        UserError: as packed_images and open_npy; for images that can't be used, unless --bad_images
            is skip; and for a missing or wrong --image_size.
    """
    given = H.given_options  # None where a program has made H
    unsaid = given is not None and "data_root" not in given
    # "" is mostly a shell's variable that is not set.
    if H.data_root == "" or unsaid and H.data_root == DEFAULTS["data_root"]:
        raise UserError("own images need --data_root: name a folder of them, or an .npy file")
    root, channels = Path(H.data_root), how.channels
    if root.suffix == ".npy" and not root.is_dir():
        try:
            found = NpyImages(root).shape
        except (OSError, ValueError) as error:
            kind, remedy = what_file(root)
            reason = f"it is {kind}: {remedy}" if remedy else error
            raise UserError(f"--data_root {root} is no complete .npy file ({reason})") from None
        n, size = (found + (0, 0))[:2]
        size = setting(H, "image_size") or size
        shape = (n, size, size, *(found[3:] if found[3:] in ((), (1,)) else (3,)))
        array = open_npy(root, shape, "convert it, or name another --image_size")
        name, state = root.name, state_of(root.parent, [root.name])
        if shape[3:] != (channels,):
            array = OfChannels(array, channels)
            name += {1: "-grey", 3: "-rgb"}[channels]
        return array, cached(root.parent, name, state, lambda _: measure(array))[1]
    if not root.is_dir():
        raise UserError(f"--data_root {root} is no folder: name one of images, or an .npy file")
    if not setting(H, "image_size"):
        raise UserError("--dataset images needs --image_size: the pixels of a side to resize to")
    array, facts = packed_images(root, setting(H, "image_size"), measure, how)
    if bad := facts["bad"]:
        named = ", ".join(f"{name} {why}" for name, why in list(bad.items())[:3])
        problem = (
            f"{len(bad)} of {len(bad) + len(array)} images below {root} can't be used "
            f"({named}{', ...' if len(bad) > 3 else ''}; all in "
            f"{Path(array.path).with_suffix('.json')})"
        )
        if setting(H, "bad_images") != "skip":
            raise UserError(f"{problem}: repair or remove them, or add --bad_images skip")
        print_and_log(H.logdir, f"going on although {problem}")
    return array, facts


class OfChannels:
    """An array of uint8 images (n, S, S), (n, S, S, 1 or 3) as one of (n, S, S, channels)."""

    def __init__(self, array, channels):
        self.array, self.channels = array, channels
        self.shape = (*array.shape[:3], channels)

    def __len__(self):
        return len(self.array)

    def __getitem__(self, numbers):
        return of_channels(self.array[numbers], self.channels)  # (N, S, S, channels)


# ---- statistics, split ---------------------------------------------------------------------


def split_own(n):
    """Indices (valid, test) of n own images, shuffled with a seed of their own; the rest train.

    A twentieth each, at least 1 and at most 5,000.
    """
    k = min(max(n // 20, 1), 5000)
    order = np.random.RandomState(0).permutation(n)
    return order[:k], order[k : 2 * k]


def train_indices(n, valid, test):
    """Those of 0..n-1 that are in neither of two splits, in ascending order."""
    return np.setdiff1d(np.arange(n), np.concatenate([valid, test]))


def measure(array):
    """{mean, std, sha256} of training images of an array, in levels of 0 to 255.

    At most 10,000, evenly spaced: the first ones would all be of a tree's first folders. sha256 is
    over the shape and these images: it tells one set of images from another.
    """
    numbers = train_indices(len(array), *split_own(len(array)))
    numbers = numbers[:: math.ceil(len(numbers) / 10000) or 1]
    digest, counts = hashlib.sha256(str(array.shape).encode()), np.zeros(256, np.int64)
    step = max(1, 2**22 // math.prod(array.shape[1:]))  # 4 MiB at a time; bincount takes 8 times it
    for first in range(0, len(numbers), step):
        images = array[numbers[first : first + step]]
        digest.update(images)
        counts += np.bincount(images.ravel(), minlength=256)
    levels, n = np.arange(256), max(counts.sum(), 1)
    mean = (counts * levels).sum() / n
    std = math.sqrt((counts * (levels - mean) ** 2).sum() / n)
    return {"mean": float(mean), "std": std, "sha256": digest.hexdigest()}


# ---- the run's record ----------------------------------------------------------------------

# What each images.json has. Those of folders also have `files`, the names of the images in the
# array's order, and `packing`; a set that has grown has `grown_from`, the sha256 at first. Those
# with labels have `label_names` and `labels`, a hash over which image has which.
FACTS = {"image_size", "n_images", "valid", "test", "mean", "std", "sha256"}


def place_of_record(path):
    """Where the record of a run's own images is: images.json beside `path`, or `path` itself.

    A file that tells its network by itself has in it what is known of its images, too.
    """
    return Path(path) if metadata_of(path) is not None else Path(path).with_name("images.json")


def read_record(path, keys):
    """The record of own images that belongs to weights, or a log, `path`; None where there is none.

    Raises:
        UserError: if it is none, or lacks one of keys.
    """
    content, path = metadata_of(path), place_of_record(path)
    if content is not None:
        record, remedy = content.get("images"), "export its model anew"
        if record is not None and not isinstance(record, dict):
            raise UserError(f"{path} has no record of images in its metadata: {remedy}")
    else:
        remedy = "put a copy of it back, or choose another --desc: it holds the run's split"
        record = read_json(path, remedy)
    if record and not keys <= record.keys():
        raise UserError(f"{path} lacks one of {', '.join(sorted(keys))}: {remedy}")
    return record


def _packing_for(H, record, path, own):
    """The Packing of a run that goes on with, or starts from, what a record tells of images.

    A run goes on with the pictures as it knew them, whatever today's packing makes of the files.

    Args:
        record, path: an images.json, None without; own: whether it is in the run's own folder.

    Raises:
        UserError: for another --background than the run's.
    """
    background = "#{:02x}{:02x}{:02x}".format(*rgb_of(setting(H, "background")))
    asked, root = Packing(background=background, channels=H.image_channels), Path(H.data_root)
    if not record or not root.is_dir():
        return asked
    known = Packing(*record.get("packing", (1, None)))._replace(channels=asked.channels)
    # Another background is asked for, even if it is the default by name.
    named = "background" in (H.given_options or ())
    if asked != known and (named or asked != Packing(channels=asked.channels)):
        if own:
            raise UserError(
                f"--background {H.background}: {path} tells of images packed otherwise "
                f"({known}): leave it out, or choose another --desc"
            )
        return asked
    if not own and known != asked:  # weights of another run, maybe of other images
        names = list_images(root, known.suffixes())[0]
        files = record.get("files") or names_in_packing(
            root, record["image_size"], record["sha256"]
        )
        if not (set(files) <= set(names) if files else record["n_images"] == len(names)):
            return asked
    if known != asked:
        print_and_log(H.logdir, f"images are taken as {path} knows them: {known}")
    return known


def _grown(H, base, path, array, facts):
    """A record of images of which some are known from another, and the rest is new.

    The known ones keep the split, by name, with the mean and std; the new ones are split by
    themselves by the same rule, where they are three at least; fewer train.

    Raises:
        UserError: if one that is known is gone, or is another picture now.
    """
    files, old = facts["files"], base["files"]
    number = {name: i for i, name in enumerate(files)}
    if gone := [name for name in old if name not in number]:
        raise UserError(
            f"--grow: {path} tells of {len(gone):,} images that {H.data_root} lacks (first "
            f"{gone[0]}), and a renamed one would change sides of the split: put them back, or "
            f"choose another --desc"
        )
    if measure(ImageArray(array, [number[name] for name in old]))["sha256"] != base["sha256"]:
        raise UserError(
            f"--grow: some of the {len(old):,} images that {path} tells of are other pictures now: "
            f"put the former ones back, or choose another --desc"
        )
    known = set(old)
    new = [name for name in files if name not in known]
    parts = split_own(len(new)) if len(new) >= 3 else ((), ())
    record = base | {"n_images": len(files), "files": files, "sha256": facts["sha256"]}
    for key, part in zip(("valid", "test"), parts, strict=True):
        record[key] = [number[old[i]] for i in base[key]] + [number[new[i]] for i in part]
    record["grown_from"] = base.get("grown_from", base["sha256"])
    sizes = [len(part) for part in parts]
    print_and_log(
        H.logdir,
        f"{len(new):,} images are new: {len(new) - sum(sizes):,} to train on, {sizes[0]:,} to "
        f"validate, {sizes[1]:,} to test; the {len(old):,} others stay where they are",
    )
    return record


def _label(H, record, own, own_path, grown):
    """int64 labels (n,) of own images by --labels, None without; H.label_names are their names.

    Args:
        record: of the images, which gets the labels' names and hash.
        own, own_path: the images.json of the run's own folder; None without.
        grown: names of the images that it tells of, where there are more now, else None.

    Raises:
        UserError: as label_files; for other labels than those of the run's folder.
    """
    how, n = setting(H, "labels"), record["n_images"]
    if how is None or setting(H, "label") == "none" and H.test_eval:
        return None
    files = record.get("files") or range(n)
    try:
        found = (
            labels_of_files(how, H.data_root, files)
            if "files" in record
            else labels_of_array(how, n)
        )
    except UserError as error:
        if not H.test_eval or "labels" in (H.given_options or ("labels",)):
            raise
        # The weights' run had labels; these images need none.
        print_and_log(H.logdir, f"evaluated without labels: {error}")
        return None
    H.label_names, numbers = numbers_of(found, how, H.label_names)
    H.n_labels = len(H.label_names)
    digest = labels_digest(files, found)
    if own and own.get("labels"):
        label, old = dict(zip(files, found, strict=True)), files if grown is None else grown
        if own["labels"] != labels_digest(old, [label[name] for name in old]):
            raise UserError(
                f"{own_path} tells of images with other labels than those of --labels {how}: put "
                f"the former ones back, or choose another --desc"
            )
    record |= {"label_names": H.label_names, "labels": digest}
    without = numbers.count(-1)
    if without:
        print_and_log(H.logdir, f"{without:,} of {len(numbers):,} images have no label")
    return numbers


def _warn_of_leak(H, base, path):
    """Says that images of the weights' training may be in another part of a new split."""
    if base.get("files"):
        print_and_log(
            H.logdir,
            f"all {base['n_images']:,} images that {path} tells of are among these, yet the split "
            f"is a new one: what the weights were trained on may be tested; --grow keeps their "
            f"split",
        )


def _changes(base, facts):
    """What differs in words between the files that a record tells of and those of a packing."""
    old, files = base.get("files"), facts.get("files")
    if not old or not files:
        return "the names of its files are not known"
    lists = {"new": sorted({*files} - {*old}), "gone": sorted({*old} - {*files})}
    words = [f"{len(names):,} {what}, first {names[0]}" for what, names in lists.items() if names]
    return "; ".join(words) or "some of the files have changed"


def _other_images(H, own, path, record, facts):
    """The UserError for a run's folder that tells of other images than those of --data_root."""
    if own["sha256"] == record["sha256"]:
        return UserError(
            f"{path} tells of another mean, std or split than the restored weights': choose "
            f"another --desc"
        )
    remedy, changes = "put its images back, or choose another --desc", _changes(own, facts)
    if own["image_size"] == record["image_size"] and "gone" not in changes:
        if "new" in changes:
            remedy = "add --grow to go on with the new ones too, or choose another --desc"
        elif "names" in changes and own["n_images"] < record["n_images"]:
            remedy = (
                "choose another --desc; or take the new ones out, start once with --resume, which "
                "notes the names, and add them again with --grow"
            )
    return UserError(
        f"{path} tells of {own['n_images']} other images of {own['image_size']} pixels than the "
        f"{record['n_images']} of {record['image_size']} of {H.data_root} ({changes}): {remedy}"
    )


def load_images(H):
    """The user's own images; sets H.image_size, H.image_mean, H.image_std and H.image_record.

    The record has mean, std and split, and is images.json in the run's folder once the run trains,
    see keep_image_record. A run that starts from weights takes the mean and std of those, which are
    then in H.normalisation (starting.py), and their run's split where the images are the same, or
    with --grow are among them. H.normalisation is (mean, std, where they stand) in the end.

    Raises:
        UserError: as open_own; if the run's folder tells of other images, or of another mean and
            std than the restored weights'; for fewer than 3 images or such of one level only.
    """
    # The record of a run that goes, or that is not to be touched, is none of this one's.
    logdir = None if setting(H, "overwrite") or H.occupied else H.logdir
    places = [p for path in (H.restore_ema_path, H.restore_path, H.init_from, logdir) if path
              for p in (path, os.path.realpath(path))]  # fmt: skip
    known = [(found, place_of_record(p)) for p in places if (found := read_record(p, FACTS))]
    # The restored weights' comes first: it is what they were trained with.
    base, base_path = known[0] if known else (None, None)
    own_path = logdir and Path(logdir).with_name("images.json")
    own = before = read_record(logdir, FACTS) if logdir else None
    how = _packing_for(H, base, base_path, own is not None and own == base)
    array, facts = open_own(H, how)
    n, size = array.shape[:2]
    if n < 3 or not facts["std"]:
        raise UserError(
            f"{H.data_root} holds {n} images of standard deviation {facts['std']:g}: a split in "
            f"three needs 3 images, and levels that differ"
        )
    valid, test = split_own(n)
    record = {"image_size": size, "n_images": n, "valid": valid.tolist(), "test": test.tolist()}
    record |= {key: facts[key] for key in ("mean", "std", "sha256")}
    if "files" in facts:
        record |= {"files": facts["files"], "packing": list(how)}
    if base and "files" not in base and "files" in facts:  # from before names were recorded
        names = names_in_packing(H.data_root, base["image_size"], base["sha256"])
        how_known = base.get("packing", [1, None])
        base = base | {"files": names, "packing": how_known} if names else base
        own = base if own and own["sha256"] == base["sha256"] else own
    grows = setting(H, "grow") and base and base["sha256"] != record["sha256"]
    if grows and base.get("files") and base["image_size"] == size and "files" in facts:
        same_run = own and own["sha256"] == base["sha256"]
        record = _grown(H, base, base_path, array, facts)
        own = record if same_run else own
    elif grows and "files" not in facts:
        raise UserError(f"--grow: images are added to a folder, and {H.data_root} is one .npy")
    elif base:
        same = base["sha256"] == record["sha256"]
        record |= base if same else {key: base[key] for key in ("mean", "std")}
        if not (same or own or grows) and {*base.get("files", ())} <= {*facts.get("files", ())}:
            _warn_of_leak(H, base, base_path)
    weights = H.restore_ema_path or H.restore_path
    told = base and (base["sha256"] == record["sha256"] or base.get("files"))
    if H.test_eval and weights and not told:
        print_and_log(
            H.logdir,
            f"nothing tells which images {weights} was trained on: the split is a new one, and "
            f"what was trained on may be tested",
        )
    source = str(base_path) if base else f"measured on the training images of {H.data_root}"
    if H.normalisation:
        record["mean"], record["std"], source = H.normalisation
    if own and any(own[key] != record[key] for key in FACTS):
        raise _other_images(H, own, own_path, record, facts)
    grown = before.get("files") if before and before["sha256"] != record["sha256"] else None
    record = {key: record[key] for key in record.keys() - {"labels", "label_names"}}
    labels = _label(H, record, before, own_path, grown)
    H.image_size, H.image_mean, H.image_std = size, record["mean"], record["std"]
    H.image_record, H.image_digest = record, record["sha256"]
    H.normalisation = (record["mean"], record["std"], source)
    valid, test = (np.array(record[key], dtype=np.int64) for key in ("valid", "test"))
    train = train_indices(n, valid, test)
    return tuple(Images(array, part, labels) for part in (train, valid, test))


def epoch_begins_anew(H, old):
    """Whether own images have grown since a checkpoint: its place in an epoch means no more.

    old: the hyperparameters that the checkpoint has recorded.
    """
    record = H.image_record or {}
    before = old.get("image_digest") or record.get("grown_from")
    return before not in (None, record.get("sha256")) and "grown_from" in record


def keep_image_record(H):
    """Writes what load_images has found out, where there are own images, into the run's folder."""
    if H.image_record:
        write_json(Path(H.logdir).with_name("images.json"), H.image_record)
