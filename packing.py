"""A folder of pictures packed once: one .npy of a size, kept beside a manifest of what is in it."""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from batches import begin_worker, cores, of_channels
from decoding import SUFFIXES, decode_as_before, decode_noting, fit
from errors import UserError, one_line
from files import read_json, replace, write_json
from image_files import NpyImages, describe_left_out, list_images, open_npy, write_npy
from resources import naming_shortages


class Packing(NamedTuple):
    """How pictures become an array: what of it changes their levels is part of the cache's key.

    Version 1, of runs from before version 2, dropped alpha and took few kinds of pictures. Pictures
    of one channel are grey by Pillow's L.
    """

    version: int = 2
    background: str | None = "#ffffff"
    channels: int = 3

    def suffixes(self):
        return SUFFIXES if self.version > 1 else (".png", ".jpg", ".jpeg", ".webp")

    def decode(self, data):
        """(image, notes) as decode_noting."""
        if self.version > 1:
            return decode_noting(data, self.background)
        return decode_as_before(data), []

    def fit(self, image, size):
        """A decoded image as uint8 (size, size, channels), as decoding.fit."""
        levels = fit(image, size)
        return levels if self.channels == 3 else of_channels(levels[None], 1)[0]

    def name(self, size):
        """What the array and its manifest are called, in the cache's folder."""
        if self.version == 1:
            kind = "-v1"
        else:
            kind = "" if self.background == Packing().background else f"-{self.background[1:]}"
        return f"{size}{kind}{'-grey' * (self.channels == 1)}"

    def source(self, root, names):
        """What the manifest says that the array was made of."""
        state = state_of(root, names)
        if self.version == 1 and self.channels == 3:
            return state
        source = {"files": state, "packing": self.version, "background": self.background}
        return source if self.channels == 3 else source | {"channels": self.channels}

    def __str__(self):
        if self.version == 1:
            return "alpha dropped, PNG, JPEG and WebP of 8 bits alone"
        return f"transparency on {self.background}{', grey' * (self.channels == 1)}"


# ---- packing -------------------------------------------------------------------------------


class _ToPack(Dataset):
    """Item i: (image i of a folder, uint8 (S, S, c), its notes), or (None, why it has no use)."""

    def __init__(self, root, names, size, how):
        self.root, self.names, self.size, self.how = root, names, size, how

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        try:
            image, notes = self.how.decode((self.root / self.names[i]).read_bytes())
            return self.how.fit(image, self.size), notes
        except OSError as error:
            return None, f"can't be read ({error.strerror})"
        except ValueError as error:
            return None, str(error)


def pack_images(root, names, size, out, how):
    """Writes the images of a folder, fitted to `size`, as one .npy.

    Returns:
        ({name: why it can't be used}, {note of decode_noting: how many images have it}).

    Raises:
        UserError: if there is no room for them, or not one can be used.
    """
    needed, free = len(names) * size * size * how.channels, shutil.disk_usage(out.parent).free
    if needed > free:
        raise UserError(
            f"{len(names):,} images of {size} x {size} need {needed:,} bytes, {out.parent} has "
            f"{free:,} free: make room"
        )
    bad, notes = {}, Counter()

    def chunks():
        loader = DataLoader(
            _ToPack(root, names, size, how),
            batch_size=16,
            num_workers=cores() if len(names) > 100 and cores() > 1 else 0,
            collate_fn=list,
            worker_init_fn=begin_worker,
            generator=torch.Generator(),
        )
        numbers, title = iter(names), one_line(f"packing {root}")
        remedy = "start again, or on one core, where packing starts no processes (taskset -c 0)"
        with (
            naming_shortages(remedy),
            tqdm(desc=title, total=len(names), unit=" images", disable=None) as bar,
        ):
            for batch in loader:
                for image, words in batch:
                    name = next(numbers)
                    if image is None:
                        bad[name] = words
                    else:
                        notes.update(words)
                        yield image[None]
                bar.update(len(batch))
        if len(bad) == len(names):
            name, reason = next(iter(bad.items()))
            raise UserError(f"{root}: none of {len(names)} images can be used; {name} {reason}")

    write_npy(out, chunks())
    return bad, dict(notes)


# ---- the cache -----------------------------------------------------------------------------


def cache_folders(root):
    """Where packed images of a folder may lie: in it, or where it is read-only in the user's cache.

    The latter is ${XDG_CACHE_HOME:-~/.cache}/vdvae; a user without a home folder has none.
    """
    root = Path(root).resolve()
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    if not home.is_absolute():  # `~` stands for nothing
        return [root / ".vdvae"]
    own = hashlib.sha256(os.fsencode(root)).hexdigest()[:16]
    return [root / ".vdvae", home / "vdvae" / own]


def _locked(folder, name):
    """A file of a folder, open, and locked until it is closed; waits where another has it.

    Raises:
        OSError: where there is no writing or no locking; nothing is left behind.
    """
    path, new_folder = folder / name, not folder.exists()
    new = not path.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(path, "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for _ in range(2):  # what is made may take hours, and then gets its name so
            replace(f"{path}.trial", Path.touch, durable=True)
        os.unlink(f"{path}.trial")
    except OSError:
        lock.close()
        for left in [Path(f"{path}.trial"), *[path] * new, *[folder] * new_folder]:
            with contextlib.suppress(OSError):
                left.rmdir() if left == folder else left.unlink()
        raise
    return lock


def fresh(folder, name, source):
    """The manifest NAME.json in a folder, if it is of that source; else None."""
    manifest = read_json(folder / f"{name}.json") or {}
    return manifest if manifest.get("source") == source else None


def cached(root, name, source, make):
    """make(folder)'s manifest, made once: (one of cache_folders(root), manifest).

    The manifest is kept in it as NAME.json with `source`, which says what it was made from: while
    that is the same, it is not made again; make puts away the one of another source. Of all
    processes of a host one makes it, the others wait.

    Raises:
        UserError: if there is no place to write.
    """
    folders = cache_folders(root)
    for folder in folders:
        if manifest := fresh(folder, name, source):
            return folder, manifest
    for folder in folders:
        try:
            lock = _locked(folder, f"{name}.lock")
            break
        except OSError as error:
            reason = error.strerror
    else:
        raise UserError(
            f"what is made of {root} can be written and locked neither in "
            f"{' nor in '.join(map(str, folders))} ({reason}): set XDG_CACHE_HOME to a folder with "
            f"room and locks, such as one of a local disk"
        )
    with lock:
        manifest = fresh(folder, name, source)  # where another process was first
        if not manifest:
            _put_away(folder, name)
            manifest = {"source": source, **make(folder)}
            try:
                write_json(folder / f"{name}.json", manifest)
            except OSError as error:
                raise UserError(
                    f"{folder / name}.json can't be written ({error.strerror}): make room, or make "
                    f"{folder} read-only and set XDG_CACHE_HOME to a folder of another disk"
                ) from None
    return folder, manifest


def _put_away(folder, name):
    """Lets a manifest that holds no more go; one with names of files gets another name.

    These names tell which images a run knows that has not recorded them itself, and the array of
    version 1 is what such a run goes on with.
    """
    path = folder / f"{name}.json"
    manifest = read_json(path) or {}
    if "files" not in manifest:
        path.unlink(missing_ok=True)
        return
    old = folder / f"{name}.{manifest['sha256'][:8]}.json"
    array = path.with_suffix(".npy")
    if isinstance(manifest.get("source"), str) and array.exists():  # version 1
        os.replace(array, old.with_suffix(".npy"))
    os.replace(path, old)


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


def manifests(root, size):
    """(path, manifest) of all packings of a folder at a size that its caches know, old ones too."""
    for folder in cache_folders(root):
        for path in sorted(folder.glob(f"{size}*.json")):
            if re.fullmatch(rf"{size}([.-].*)?\.json", path.name):
                manifest = read_json(path) or {}
                if "files" in manifest:
                    yield path, manifest


def names_in_packing(root, size, sha256):
    """The names of the images that have this sha256 (own_images.measure), in order, or None."""
    found = (
        manifest["files"] for _, manifest in manifests(root, size) if manifest["sha256"] == sha256
    )
    return next(found, None)


def packed_images(root, size, measure, how=Packing()):  # noqa: B008  it is immutable
    """The images below a folder at `size`: (NpyImages, manifest), packed where none is cached.

    The manifest holds the facts of measure(array), the names of the `files` in the array's order,
    `bad`, a dict of those that can't be used, each with its reason, and `notes`, how many were not
    simply read.

    Raises:
        UserError: for a folder without images, or no place to write.
    """
    suffixes = how.suffixes()
    names, left_out = list_images(root, suffixes)
    if not names:
        raise UserError(f"{root} holds no image: --data_root needs {', '.join(suffixes)} files")
    source = how.source(root, names)

    def opened(folder, name, manifest):
        shape = (len(manifest["files"]), size, size, how.channels)
        remedy = f"move {folder / name}.* away to pack anew"
        return open_npy(folder / f"{name}.npy", shape, remedy), manifest

    def pack(folder):
        if left_out:
            print(one_line(f"{root}: {describe_left_out(left_out)}"))
        out = folder / f"{how.name(size)}.npy"
        bad, notes = pack_images(root, names, size, out, how)
        files = [name for name in names if name not in bad]
        words = [f"{n:,} {note.format(background=how.background)}" for note, n in notes.items()]
        counted = f" ({'; '.join(words)})" if words else ""
        print(one_line(f"packed {len(files):,} images of {root} in {out}{counted}"), flush=True)
        return {**measure(NpyImages(out)), "bad": bad, "files": files, "notes": notes}

    if how.version == 1:  # such as was made before there was another
        for path, manifest in manifests(root, size):
            if manifest["source"] == source and path.with_suffix(".npy").exists():
                return opened(path.parent, path.stem, manifest)
    folder, manifest = cached(root, how.name(size), source, pack)
    return opened(folder, how.name(size), manifest)
