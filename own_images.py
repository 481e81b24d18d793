"""The user's own images: any folder of pictures, or one .npy, as a data set.

A folder is packed once into an .npy of its own; mean, standard deviation and split are measured
once, then kept in the run's folder as images.json.
"""

import fcntl
import hashlib
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from batches import Images, begin_worker, cores
from errors import UserError
from files import read_json, write_json
from image_files import SUFFIXES, NpyImages, decode, fit, list_images, open_npy, write_npy
from launchers import world
from options import setting

# ---- packing -------------------------------------------------------------------------------


class _ToPack(Dataset):
    """Item i: (image i of a folder, uint8 (S, S, 3), or None; None, or why it can't be used)."""

    def __init__(self, root, names, size):
        self.root, self.names, self.size = root, names, size

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        try:
            return fit(decode((self.root / self.names[i]).read_bytes()), self.size), None
        except OSError as error:
            return None, f"can't be read ({error.strerror})"
        except ValueError as error:
            return None, str(error)


def pack_images(root, names, size, out):
    """Writes the images of a folder, fitted to `size`, as one .npy; returns {name: why not}.

    Raises:
        UserError: if there is no room for them, or not one can be used.
    """
    needed, free = len(names) * size * size * 3, shutil.disk_usage(out.parent).free
    if needed > free:
        raise UserError(
            f"{len(names):,} images of {size} x {size} need {needed:,} bytes, {out.parent} has "
            f"{free:,} free: make room"
        )
    bad = {}

    def chunks():
        loader = DataLoader(
            _ToPack(root, names, size),
            batch_size=16,
            num_workers=cores() if len(names) > 100 else 0,
            collate_fn=list,
            worker_init_fn=begin_worker,
            generator=torch.Generator(),
        )
        numbers = iter(names)
        with tqdm(desc=f"packing {root}", total=len(names), unit=" images", disable=None) as bar:
            for batch in loader:
                for image, reason in batch:
                    name = next(numbers)
                    if reason:
                        bad[name] = reason
                    else:
                        yield image[None]
                bar.update(len(batch))
        if len(bad) == len(names):
            name, reason = next(iter(bad.items()))
            raise UserError(f"{root}: none of {len(names)} images can be used; {name} {reason}")

    write_npy(out, chunks())
    return bad


def cache_folders(root):
    """Where packed images of a folder may lie: in it, or where it is read-only in the user's cache.

    The latter is ${XDG_CACHE_HOME:-~/.cache}/vdvae.
    """
    root = Path(root).resolve()
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return [root / ".vdvae", home / "vdvae" / hashlib.sha256(str(root).encode()).hexdigest()[:16]]


def cached(root, name, source, make):
    """make(folder)'s manifest, made once: (one of cache_folders(root), manifest).

    The manifest is kept in it as NAME.json with `source`, which says what it was made from: while
    that is the same, it is not made again. Of all processes of a host one makes it, the others
    wait.

    Raises:
        UserError: if there is no place to write.
    """

    def fresh(folder):
        manifest = read_json(folder / f"{name}.json") or {}
        return manifest if manifest.get("source") == source else None

    folders = cache_folders(root)
    for folder in folders:
        if manifest := fresh(folder):
            return folder, manifest
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = open(folder / f"{name}.lock", "w")
            break
        except OSError as error:
            reason = error.strerror
    else:
        raise UserError(
            f"what is made of {root} can be written neither to {folders[0]} nor to {folders[1]} "
            f"({reason}): set XDG_CACHE_HOME to a folder with room"
        )
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
        manifest = fresh(folder)  # where another process was first
        if not manifest:
            (folder / f"{name}.json").unlink(missing_ok=True)
            manifest = {"source": source, **make(folder)}
            write_json(folder / f"{name}.json", manifest)
    return folder, manifest


def state_of(root, names):
    """A hash over files' names, sizes, times of change and permissions."""
    listing = []
    for name in names:
        try:
            stat = os.stat(root / name)
            listing.append((name, stat.st_size, stat.st_mtime_ns, stat.st_mode))
        except OSError:  # such as a link to nothing, which is packed as unreadable
            listing.append((name,))
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def packed_images(root, size):
    """The images below a folder at `size`: (NpyImages, manifest), packed where none is cached.

    The manifest holds measure's facts, the names of the `files` in the array's order, and `bad`,
    a dict of those that can't be used, each with its reason.

    Raises:
        UserError: for a folder without images, or no place to write.
    """
    names, left_out = list_images(root)
    if not names:
        raise UserError(f"{root} holds no image: --data_root needs {', '.join(SUFFIXES)} files")

    def pack(folder):
        if left_out:
            print(f"leaving out {len(left_out)} other files below {root}, first {left_out[0]}")
        out = folder / f"{size}.npy"
        bad = pack_images(root, names, size, out)
        files = [name for name in names if name not in bad]
        print(f"packed {len(files):,} images of {root} in {out}", flush=True)
        return {**measure(NpyImages(out)), "bad": bad, "files": files}

    folder, manifest = cached(root, str(size), state_of(root, names), pack)
    shape = (len(manifest["files"]), size, size, 3)
    return open_npy(folder / f"{size}.npy", shape, f"delete {folder} to pack anew"), manifest


def open_own(H):
    """(NpyImages, facts as of measure) of --data_root, a folder of images or one .npy.

    Raises:
        UserError: as packed_images and open_npy; for images that can't be used, unless --bad_images
            is skip; and for a missing or wrong --image_size.
    """
    root = Path(H.data_root)
    if root.suffix == ".npy" and not root.is_dir():
        try:
            found = NpyImages(root).shape
        except (OSError, ValueError) as error:
            raise UserError(f"--data_root {root} is no complete .npy file ({error})") from None
        n, size = (found + (0, 0))[:2]
        size = setting(H, "image_size") or size
        array = open_npy(root, (n, size, size, 3), "convert it, or name another --image_size")
        state = state_of(root.parent, [root.name])
        return array, cached(root.parent, root.name, state, lambda _: measure(array))[1]
    if not root.is_dir():
        raise UserError(f"--data_root {root} is no folder: name one of images, or an .npy file")
    if not setting(H, "image_size"):
        raise UserError("--dataset images needs --image_size: the pixels of a side to resize to")
    array, facts = packed_images(root, setting(H, "image_size"))
    if bad := facts["bad"]:
        named = ", ".join(f"{name} {why}" for name, why in list(bad.items())[:3])
        problem = (
            f"{len(bad)} of {len(bad) + len(array)} images below {root} can't be used "
            f"({named}{', ...' if len(bad) > 3 else ''}; all in "
            f"{Path(array.path).with_suffix('.json')})"
        )
        if setting(H, "bad_images") != "skip":
            raise UserError(f"{problem}: mend or remove them, or add --bad_images skip")
        if world().rank == 0:
            print(f"going on although {problem}", flush=True)
    return array, facts


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


def read_record(path, keys):
    """The images.json of a run beside `path`, or None where there is none.

    Raises:
        UserError: if it is none, or lacks one of keys.
    """
    path = Path(path).with_name("images.json")
    record = read_json(path)
    if record and not keys <= record.keys():
        raise UserError(f"{path} lacks one of {', '.join(keys)}: delete it to measure anew")
    return record


def load_images(H):
    """The user's own images; sets H.image_size, H.image_mean, H.image_std and H.image_record.

    The record has mean, std and split, and is images.json in the run's folder once the run trains,
    see keep_image_record. A run that restores the weights of another takes the mean and std of that
    one, and its split where the images are the same.

    Raises:
        UserError: as open_own; if the run's folder tells of other images, or of another mean and
            std than the restored weights'; for fewer than 3 images or such of one level only.
    """
    array, facts = open_own(H)
    n, size = array.shape[:2]
    if n < 3 or not facts["std"]:
        raise UserError(
            f"{H.data_root} holds {n} images of standard deviation {facts['std']:g}: a split in "
            f"three needs 3 images, and levels that differ"
        )
    valid, test = split_own(n)
    record = {"image_size": size, "n_images": n, "valid": valid.tolist(), "test": test.tolist()}
    record |= {key: facts[key] for key in ("mean", "std", "sha256")}
    paths = [path for path in (H.restore_ema_path, H.restore_path, H.logdir) if path]
    known = [found for path in paths if (found := read_record(path, record.keys()))]
    if known:  # the restored weights' comes first: it is what they were trained with
        same = known[0]["sha256"] == record["sha256"]
        record |= known[0] if same else {key: known[0][key] for key in ("mean", "std")}
    if H.logdir:
        path, own = Path(H.logdir).with_name("images.json"), read_record(H.logdir, record.keys())
        if own and own != record:
            others = f"{own['n_images']} other images of {own['image_size']} pixels than the {n} of"
            others += f" {size} of {H.data_root}"
            if own["sha256"] == record["sha256"]:
                others = "another mean, std or split than the restored weights'"
            raise UserError(f"{path} tells of {others}: choose another --desc, or delete it")
    H.image_size, H.image_mean, H.image_std = size, record["mean"], record["std"]
    H.image_record = record
    valid, test = (np.array(record[key], dtype=np.int64) for key in ("valid", "test"))
    train = train_indices(n, valid, test)
    return Images(array, train), Images(array, valid), Images(array, test)


def keep_image_record(H):
    """Writes what load_images has found out, where there are own images, into the run's folder."""
    if H.image_record:
        write_json(Path(H.logdir).with_name("images.json"), H.image_record)
