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
from pictures import picture_of

GRID_LIMIT = 1024  # images of a grid; a larger one is nothing to look at


def check_out(args):
    """Holds --out against what the command can write.

    Raises:
        UserError: for another kind of file, or latents that go to no .npz.
    """
    suffix = Path(args.out).suffix.lower()
    if args.command == "encode" and suffix != ".npz":
        raise UserError(f"--out {args.out}: latents go to an .npz file, name one")
    if suffix == ".npy" or suffix != ".png" and suffix in Image.registered_extensions():
        raise UserError(
            f"--out {args.out}: images go to NAME.png, NAME.npz or a folder, whose name must not "
            f"end in {suffix}"
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


def check_settings(path, args):
    """Keeps what decides the images of unfinished output in a file, `path`.

    Raises:
        UserError: if the file is there and tells of other settings, naming the first.
    """
    settings = {"weights": sha256(args.restore_ema_path)}
    settings |= {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS}
    settings = json.loads(json.dumps(settings))  # as they are read back
    found = read_settings(path)
    for key in {**settings, **found} if found is not None else ():
        if found.get(key) != settings.get(key):
            raise UserError(
                f"{path} tells of images made with {key} {found.get(key)}, not "
                f"{settings.get(key)}: name another --out, or add --force to start anew"
            )
    if found is None:
        replace(path, lambda partial: partial.write_text(json.dumps(settings)))


class NpzFile:
    """An .npz of arr_0, uint8 (n, S, S, c), as FID tools read it, made from NAME.npz.part.

    With labels also of arr_1, int64 (n,).

    The .part holds nothing but pixels: its length tells how many images are done.
    """

    remedy = "; the same command then goes on"

    def __init__(self, args, shape, labels):
        self.out, self.shape, self.labels = Path(args.out), shape, labels
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
        check_settings(self.settings, args)
        # Whole batches only: what follows is then, bit for bit, what a run in one go makes.
        whole = args.n_batch * math.prod(self.shape)
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
        self.done = self.file.tell() // math.prod(self.shape)

    def write(self, images):
        self.file.write(images.tobytes())
        self.file.flush()

    def finish(self, n):
        self.file.close()
        header = {"descr": "|u1", "fortran_order": False, "shape": (n, *self.shape)}

        def write(path):
            with zipfile.ZipFile(path, "w") as archive:
                with archive.open("arr_0.npy", "w", force_zip64=True) as npy:
                    np.lib.format.write_array_header_1_0(npy, header)
                    with open(self.part, "rb") as pixels:
                        shutil.copyfileobj(pixels, npy, 1 << 20)
                if self.labels is not None:
                    with archive.open("arr_1.npy", "w") as npy:
                        np.lib.format.write_array(npy, np.asarray(self.labels(range(n))))

        os.truncate(self.part, n * math.prod(self.shape))  # an earlier run may have made more
        replace(self.out, write)
        self.part.unlink()
        self.settings.unlink()


class Folder:
    """A folder of 000000.png, 000001.png, ..."""

    remedy = "; the same command then goes on"

    def __init__(self, args):
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
        check_settings(settings, args)
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


def write_images(args, model, n, make, draw, labels=None):
    """Makes images 0 to n - 1 and writes them to args.out, a batch at a time.

    Args:
        n: how many.
        make: indices (a range) → their images, uint8 (len, S, S, c).
        draw: all images → the labelled grid.
        labels: indices → their labels, int64 (len,), which an .npz holds too.

    Raises:
        UserError: if args.out exists, is too large a grid or can't be written.
    """
    kind = {".png": Grid, ".npz": NpzFile}.get(Path(args.out).suffix.lower(), Folder)
    if kind is Grid and n > GRID_LIMIT:
        raise UserError(f"{n} images in one grid are too many: give --out a .npz or a folder")
    with writing(args, kind.remedy):
        size, channels = model.H.image_size, channels_of(model.H)
        of_kind = {Grid: (draw,), NpzFile: ((size, size, channels), labels), Folder: ()}
        sink = kind(args, *of_kind[kind])
        with tqdm(total=n, initial=min(sink.done, n), unit=" images", disable=None) as bar:
            for first in range(sink.done, n, args.n_batch):
                indices = range(first, min(first + args.n_batch, n))
                sink.write(make(indices))
                bar.update(len(indices))
        sink.finish(n)
    print(one_line(f"{args.out}: {n} images of {model.H.image_size} pixels"))
