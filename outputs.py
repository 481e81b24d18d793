"""Where made images go: a labelled grid, an .npz, a folder, each continued after a break.

`args` are sample.py's: out, force, n_batch, restore_ema_path, with all that decides the images.
"""

import contextlib
import fcntl
import json
import math
import os
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from errors import UserError, one_line, remedy_of
from files import replace, sha256
from image_sets import channels_of
from pictures import picture_of, strip
from weights import weights_hash

GRID_LIMIT = 1024  # images of a grid; a larger one is nothing to look at


# What commands write that makes no images: (words, the file without --out, its suffix).
FILES = {
    "encode": ("latents go", "latents.npz", ".npz"),
    "embed": ("embeddings go", "embeddings.npz", ".npz"),
    "score": ("scores go", "scores.csv", ".csv"),
    "export": ("a model goes", "model.safetensors", ".safetensors"),
}


# Commands that make a sequence, and the suffixes of moving pictures.
MOVING, MOTION = ("interpolate", "progressive"), (".gif", ".webp")

FRAMES_PER_SECOND = 8

WIDEST = {".gif": 65535, ".webp": 16383}  # pixels, as their formats have it


def check_out(args):
    """Holds --out against what the command can write; sets it where it is not given.

    Raises:
        UserError: for another kind of file than the command's.
    """
    args.out = args.out or FILES.get(args.command, ("", f"{args.command}.png"))[1]
    suffix = Path(args.out).suffix.lower()
    if args.command in FILES:
        what, _, wanted = FILES[args.command]
        if suffix != wanted:
            raise UserError(f"--out {args.out}: {what} to NAME{wanted}, name one")
        return
    if suffix in MOTION and args.command in MOVING:
        return
    if suffix == ".npy" or suffix != ".png" and suffix in Image.registered_extensions():
        also = f"; of {', '.join(MOVING)} also to {', '.join(MOTION)}" if suffix in MOTION else ""
        raise UserError(
            f"--out {args.out}: images go to NAME.png, NAME.npz or a folder, whose name must not "
            f"end in {suffix}{also}"
        )


def check_room(args, needed):
    """Raises UserError where the disk of the output has less free than it needs.

    needed: bytes, those of a .part included.
    """
    folder = Path(args.out).absolute().parent
    with contextlib.suppress(OSError):  # a folder that is not there is told of by check_free
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise UserError(
                f"--out {args.out} needs {needed:,} bytes, the parts that it is made of included, "
                f"and its disk has {free:,} free: make room, or name an --out elsewhere"
            )


def check_free(args):
    """Raises UserError where the output can't be written or, without --force, exists."""
    if os.path.isdir(args.out):
        raise UserError(f"{args.out} is a folder: name another --out")
    if os.path.exists(args.out) and not args.force:
        raise UserError(f"{args.out} exists already: name another --out, or add --force")
    Path(f"{args.out}.partial").touch()  # as replace does in the end
    Path(f"{args.out}.partial").unlink()


@contextlib.contextmanager
def writing(args, remedy=""):
    """Turns an OSError of the body into a UserError that names --out."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{args.out} can't be written ({error.strerror}): {remedy_of(error)} or name another "
            f"--out{remedy}"
        ) from None


# Options that change no image, beside the weights' path, for which their hash stands.
NOT_SETTINGS = ("restore_ema_path", "hps", "device", "n_batch", "n", "out", "force", "function")


def read_settings(path):
    """What check_settings has kept in a file, or None where there is none.

    Raises:
        UserError: for a file that is no JSON object.
    """
    try:
        settings = json.loads(path.read_bytes())
        if not isinstance(settings, dict):
            raise ValueError("no JSON object")
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(
            f"{path} does not tell what images it belongs to ({error}): name another --out"
        ) from None
    return settings


def check_settings(path, args, weights):
    """Keeps what decides the images of unfinished output in a file, `path`.

    weights: of weights.weights_hash; files of before have the sha256 of the weights' file.

    Raises:
        UserError: if the file is there and tells of other settings, naming the first.
    """
    settings = {"weights": weights}
    settings |= {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS}
    settings = json.loads(json.dumps(settings))  # as they are read back
    found = read_settings(path)
    if found and found.get("weights") != weights:
        if found.get("weights") == (of_file := sha256(args.restore_ema_path)):
            settings["weights"] = of_file
    for key in {**settings, **found} if found is not None else ():
        if found.get(key) != settings.get(key):
            raise UserError(
                f"{path} tells of images made with {key} {found.get(key)}, not "
                f"{settings.get(key)}: name another --out, or add --force to start anew"
            )
    if found is None:
        replace(path, lambda partial: partial.write_text(json.dumps(settings)))


class NpzFile:
    """An .npz of one large array, a row an image, made from NAME.npz.part.

    The .part holds nothing but rows: its length tells how many images are done.

    Args:
        shape, dtype: of a row. The default type and name of the array are those of pictures, uint8
            (n, S, S, c), as FID tools read them.
        labels: indices → the labels of pictures, int64 (len,), which become arr_1.
    """

    remedy = "; the same command then goes on"

    def __init__(self, args, weights, shape, labels=None, dtype=np.uint8, name="arr_0"):
        self.out, self.shape, self.labels = Path(args.out), shape, labels
        self.dtype, self.name = np.dtype(dtype), name
        self.row = math.prod(shape) * self.dtype.itemsize  # bytes
        self.part, self.settings = (
            self.out.with_name(f"{self.out.name}.part{suffix}") for suffix in ("", ".json")
        )
        check_free(args)
        if args.force:
            self.part.unlink(missing_ok=True)
            self.settings.unlink(missing_ok=True)
        if self.part.exists() and not self.settings.exists():
            raise UserError(
                f"{self.part} is there without {self.settings.name}, which tells what it is: name "
                f"another --out, or add --force to replace it"
            )
        check_settings(self.settings, args, weights)
        # Whole batches only: what follows is then, bit for bit, what a run in one go makes.
        whole = args.n_batch * self.row
        new = not self.part.exists()
        self.file = open(self.part, "ab")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{self.part} is being written by another process: wait, or name another --out"
            ) from None
        except OSError as error:
            if new:
                self.part.unlink()
                self.settings.unlink()
            raise UserError(
                f"{self.part} can't be locked on its file system ({error.strerror}), which keeps "
                f"others off it: name an --out on a local disk, or a folder"
            ) from None
        self.file.truncate(self.file.tell() // whole * whole)
        self.done = self.file.tell() // self.row

    def write(self, rows):
        self.file.write(rows.tobytes())
        self.file.flush()

    def rows(self, n):
        """The first n rows, read from the disk where they are looked at."""
        return np.memmap(self.part, self.dtype, "r", shape=(n, *self.shape))

    def finish(self, n, kept=None, **others):
        """Makes the .npz of the first n rows, or of those whose numbers `kept` has.

        others: further arrays, by name.
        """
        self.file.close()
        shape = (n if kept is None else len(kept), *self.shape)
        descr = np.lib.format.dtype_to_descr(self.dtype)
        header = {"descr": descr, "fortran_order": False, "shape": shape}

        def write(path):
            with zipfile.ZipFile(path, "w") as archive:
                with archive.open(f"{self.name}.npy", "w", force_zip64=True) as npy:
                    np.lib.format.write_array_header_1_0(npy, header)
                    with open(self.part, "rb") as part:
                        if kept is None:
                            shutil.copyfileobj(part, npy, 1 << 20)
                        for i in () if kept is None else kept:
                            part.seek(int(i) * self.row)
                            npy.write(part.read(self.row))
                if self.labels is not None:
                    others["arr_1"] = self.labels(range(n))
                for name, array in others.items():
                    with archive.open(f"{name}.npy", "w", force_zip64=True) as npy:
                        np.lib.format.write_array(npy, np.asarray(array), allow_pickle=False)

        os.truncate(self.part, n * self.row)  # an earlier run may have made more
        replace(self.out, write)
        self.remove()

    def remove(self):
        """Removes what the array was made from."""
        self.file.close()
        self.part.unlink()
        self.settings.unlink()


class Folder:
    """A folder of 000000.png, 000001.png, ..."""

    remedy = "; the same command then goes on"

    def __init__(self, args, weights):
        self.folder = Path(args.out)
        self.folder.mkdir(parents=True, exist_ok=True)
        settings = self.folder / "settings.json"
        # Other programs have files of that name too.
        ours = "weights" in (read_settings(settings) or ())
        # A kill before the first image leaves the name at most that the settings are written under.
        if not ours and any(p.name != f"{settings.name}.partial" for p in self.folder.iterdir()):
            raise UserError(f"{self.folder} holds other files: name a new folder with --out")
        if args.force and ours:
            self.remove_from(0)
            settings.unlink()
        check_settings(settings, args, weights)
        self.done = 0
        while self.path(self.done).exists():
            self.done += 1
        self.done -= self.done % args.n_batch

    def path(self, i):
        return self.folder / f"{i:06}.png"

    def remove_from(self, n):
        """Removes image n and all behind it, and what a kill has left of any."""
        for path in self.folder.iterdir():
            match = re.fullmatch(r"(\d{6,})\.png(\.partial)?", path.name, re.ASCII)
            if match and (int(match[1]) >= n or match[2]):
                path.unlink()

    def write(self, images):
        for image in images:
            replace(self.path(self.done), lambda p, i=image: picture_of(i).save(p, "PNG"))
            self.done += 1

    def finish(self, n):
        self.remove_from(n)  # an earlier run may have made more


class Grid:
    """One picture with labels, drawn at the end by draw(images) → PIL image."""

    remedy = ""

    def __init__(self, args, draw):
        check_free(args)
        self.out, self.draw, self.images, self.done = args.out, draw, [], 0

    def write(self, images):
        self.images.append(images)

    def finish(self, n):
        picture = self.draw(np.concatenate(self.images))
        replace(self.out, lambda path: picture.save(path, "PNG"))


class Motion:
    """A moving picture, for ever: frames of `n_frame` images side by side, as large as in a Grid.

    A .webp keeps every level; a .gif has 256 colours a frame.
    """

    remedy = ""

    def __init__(self, args, n_frame):
        check_free(args)
        self.out, self.n_frame, self.images, self.done = args.out, n_frame, [], 0

    def write(self, images):
        self.images.append(images)

    def finish(self, n):
        images, suffix = np.concatenate(self.images), Path(self.out).suffix.lower()
        frames = [strip(images[i : i + self.n_frame]) for i in range(0, n, self.n_frame)]
        if frames[0].width > WIDEST[suffix]:
            raise UserError(
                f"{self.n_frame} images in a row are {frames[0].width} pixels wide, a {suffix} has "
                f"{WIDEST[suffix]} at most: take fewer, or another --out"
            )
        time = 1000 / FRAMES_PER_SECOND  # milliseconds
        if suffix == ".gif":  # which counts in hundredths of a second
            ends = [round(i * time / 10) * 10 for i in range(len(frames) + 1)]
            options = {"format": "GIF", "duration": np.diff(ends).tolist()}
        else:
            options = {"format": "WEBP", "duration": round(time), "lossless": True}
        options |= {"save_all": True, "append_images": frames[1:], "loop": 0}
        replace(self.out, lambda path: frames[0].save(path, **options))


def write_images(args, model, n, make, draw, labels=None, n_frame=1):
    """Makes images 0 to n - 1 and writes them to args.out, a batch at a time.

    Args:
        n: how many.
        make: indices (a range) → their images, uint8 (len, S, S, c).
        draw: all images → the labelled grid.
        labels: indices → their labels, int64 (len,), which an .npz holds too.
        n_frame: images of a frame, where they move.

    Raises:
        UserError: if args.out exists, is too large a grid or can't be written.
    """
    kinds = {".png": Grid, ".npz": NpzFile} | dict.fromkeys(MOTION, Motion)
    kind = kinds.get(Path(args.out).suffix.lower(), Folder)
    if kind in (Grid, Motion) and n > GRID_LIMIT:
        raise UserError(f"{n} images in one grid are too many: give --out a .npz or a folder")
    with writing(args, kind.remedy):
        if kind in (Grid, Motion):
            sink = kind(args, draw if kind is Grid else n_frame)
        else:
            size, channels = model.H.image_size, channels_of(model.H)
            of_kind = {NpzFile: ((size, size, channels), labels), Folder: ()}
            sink = kind(args, weights_hash(model), *of_kind[kind])
        with tqdm(total=n, initial=min(sink.done, n), unit=" images", disable=None) as bar:
            for first in range(sink.done, n, args.n_batch):
                indices = range(first, min(first + args.n_batch, n))
                sink.write(make(indices))
                bar.update(len(indices))
        sink.finish(n)
    print(one_line(f"{args.out}: {n} images of {model.H.image_size} pixels"))
