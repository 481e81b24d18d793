"""Files of images: folders listed, .npy files read image by image."""

import math
import os
from collections import Counter
from pathlib import Path

import numpy as np

from decoding import SUFFIXES, decode, fit
from errors import MissingFiles, UserError, one_line
from file_kinds import not_regular
from files import fsync
from logs import print_line

# ---- pictures ------------------------------------------------------------------------------


def read_sized(path, size, background="white"):
    """(an image file's middle square as uint8 (size, size, 3), the (width, height) of the file's).

    It is made as own images are packed. A smaller image is enlarged (bicubic); transparency is laid
    on the background.

    Raises:
        UserError: for a file that can't be read as a picture of 8 or 16 bits a channel.
    """
    if kind := not_regular(path):
        raise UserError(f"{path} is {kind}: name an image file")
    try:
        image = decode(Path(path).read_bytes(), background)
        return fit(image, size, enlarge=True), image.size
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror}): name an image file") from None
    except ValueError as error:
        raise UserError(f"{path} {error}: name another image file") from None


def read_image(path, size, background="white"):
    """An image file's middle square as uint8 (size, size, 3), as read_sized."""
    return read_sized(path, size, background)[0]


def read_readable(paths, size, background="white"):
    """What can be read of image files, and why the others can't.

    Returns:
        (images uint8 (m, size, size, 3), their numbers among the paths, their (width, height) in
        the files, {number: reason} of the others, as read_sized).
    """
    images, numbers, sizes, reasons = [np.empty((0, size, size, 3), np.uint8)], [], [], {}
    for i, path in enumerate(paths):
        try:
            image, of_file = read_sized(path, size, background)
        except UserError as error:
            reasons[i] = str(error)
            continue
        images.append(image[None])
        numbers.append(i)
        sizes.append(of_file)
    return np.concatenate(images), numbers, sizes, reasons


def read_images(paths, size, background="white"):
    """uint8 (n, size, size, 3) of image files, as read_image."""
    return np.stack([read_image(path, size, background) for path in paths])


def list_images(folder, suffixes=SUFFIXES):
    """(names, left_out) of the files below a folder, sorted paths relative to it.

    names end in one of the suffixes; left_out are other files, links to folders and what is no
    regular file, as a dict that describe_left_out takes. Names that begin with a dot, such as the
    `._*.png` of some systems, are passed over.

    Raises:
        UserError: for a folder below it that can't be read.
    """
    names, left_out = [], Counter()

    def walk(path, prefix):
        try:
            with os.scandir(path) as found:
                entries = sorted(found, key=lambda entry: entry.name)
            entries = [entry for entry in entries if not entry.name.startswith(".")]
            folders = {entry.name for entry in entries if _is(os.DirEntry.is_dir, entry)}
        except OSError as error:
            raise UserError(
                f"{error.filename or path} can't be read ({error.strerror}), so the images in it "
                f"are not known: change its permissions or look after the disk, or move it away"
            ) from None
        for entry in entries:
            if entry.name in folders:
                if entry.is_symlink():
                    left_out["links to folders"] += 1
                else:
                    walk(entry.path, f"{prefix}{entry.name}/")
            elif not _is(os.DirEntry.is_file, entry) and (special := not_regular(entry.path)):
                left_out[f"{prefix}{entry.name}, {special}"] += 1
            elif entry.name.lower().endswith(suffixes):
                names.append(prefix + entry.name)
            else:
                left_out[Path(entry.name).suffix.lower() or "without a suffix"] += 1

    walk(folder, "")
    return sorted(names), left_out


def _is(kind, entry):
    """kind(entry), False for a link that leads nowhere or to itself."""
    try:
        return kind(entry)
    except OSError:
        if entry.is_symlink():
            return False
        raise


def describe_left_out(left_out):
    """list_images' left_out as a line: "left out: 26 other files: 20 .txt, 6 .db"."""
    n, kinds = sum(left_out.values()), left_out.most_common()
    listed = ", ".join(f"{count} {kind}" for kind, count in kinds[:8])
    more = ", ..." * (len(kinds) > 8)
    return one_line(f"left out: {n:,} other file{'s' * (n > 1)}: {listed}{more}")


def image_paths(paths):
    """The image files that paths name: themselves, or of a folder all below it, sorted by name.

    A path may begin with `~`, which a shell leaves as it is in quotes.

    Raises:
        UserError: for a folder without any, or as list_images.
    """
    found = []
    for path in map(os.path.expanduser, paths):
        if not os.path.isdir(path):
            found.append(path)
            continue
        names, left_out = list_images(path)
        if not names:
            raise UserError(f"{path} holds no image: it needs {', '.join(SUFFIXES)} files")
        if left_out:
            print_line(f"{one_line(path)}: {describe_left_out(left_out)}")
        found += [os.path.join(path, name) for name in names]
    return found


# ---- .npy files ----------------------------------------------------------------------------


class NpyImages:
    """A .npy file of uint8 images (n, S, S, 3) on the disk: an index reads the images it names.

    It reads where a memory map would fault: one request an image instead of one a page, without
    the 128 KiB that a fault reads around it, and what was read stays out of this process's memory
    (the system may keep it). A pickled one, as loader workers may get it, holds the path alone.
    """

    def __init__(self, path):
        self.path = path
        if (special := not_regular(path)) not in (None, "a folder"):  # which could wait for ever
            raise ValueError(f"it is {special}")
        array = np.lib.format.open_memmap(path, mode="r")  # which checks the header and the size
        self.shape, self.offset = array.shape, array.offset
        self.kind = f"{array.dtype} {array.shape}{'' if array.flags.c_contiguous else ' (Fortran)'}"
        self.file = open(path, "rb", buffering=0)
        if extra := os.path.getsize(path) - self.offset - array.nbytes:
            raise ValueError(f"{extra:,} bytes follow the array")

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, numbers):
        images = np.empty((len(numbers), *self.shape[1:]), np.uint8)  # (N, S, S, 3)
        for image, number in zip(images, numbers, strict=True):
            start = self.offset + int(number) * image.nbytes
            try:
                read = os.preadv(self.file.fileno(), [image], start)
            except OSError as error:
                raise UserError(
                    f"{self.path} can't be read ({error.strerror}): look after its disk, then "
                    f"start again"
                ) from None
            if read != image.nbytes:
                raise UserError(f"{self.path} ends before its image {number}: it was cut off")
        return images

    def __reduce__(self):
        return NpyImages, (self.path,)


class ImageArray:
    """Some images of an array or file, uint8 (n, S, S, 3), that index and slice like an array."""

    dtype, ndim = np.dtype(np.uint8), 4

    def __init__(self, array, indices):
        self.array, self.indices = array, np.asarray(indices)

    @property
    def shape(self):
        return (len(self.indices), *self.array.shape[1:])

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, key):
        """Images by a number, a slice or an array of numbers; behind it, an index into them."""
        first, *rest = key if isinstance(key, tuple) else (key,)
        if first is Ellipsis:
            return np.asarray(self)[key]
        numbers = self.indices[first]
        images = self.array[np.atleast_1d(numbers)]  # (k, S, S, 3)
        images = images[0] if np.ndim(numbers) == 0 else images
        return images[(*[slice(None)] * np.ndim(numbers), *rest)] if rest else images

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.array[self.indices], dtype)


def open_npy(path, shape, remedy):
    """Opens a .npy file of uint8 images of the given shape (n, S, S, 3).

    Raises:
        UserError: for a file that is missing, damaged, or of another type or shape.
    """
    expected = f"uint8 {shape}"
    try:
        array = NpyImages(path)
    except FileNotFoundError:
        raise MissingFiles(f"{path} does not exist: {remedy}") from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is no complete .npy file of {expected} ({error}; it has "
            f"{os.path.getsize(path):,} bytes, expected are {math.prod(shape) + 128:,}): {remedy}"
        ) from None
    if array.kind != expected:
        raise UserError(f"{path} holds {array.kind}, not {expected}: {remedy}")
    return array


def write_npy(path, chunks):
    """Writes uint8 arrays (k, H, W, 3), one after another, as one .npy file; returns its shape.

    The file appears when it is whole: until then the data is in path + ".part", deleted on an
    error and overwritten by the next call.

    Raises:
        UserError: if it can't be written.
    """
    part, shape = Path(f"{path}.part"), (0,)
    try:
        # Written in sequence, not through a memory map, whose pages would count as our memory.
        with open(part, "wb", buffering=1 << 20) as file:
            for chunk in chunks:
                shape = (shape[0] + len(chunk), *chunk.shape[1:])
                if file.tell() == 0:
                    _write_header(file, shape)
                file.write(np.ascontiguousarray(chunk))
            file.seek(0)
            _write_header(file, shape)  # numpy leaves room for the count to grow
        fsync(part)  # or a power cut could leave the final name on missing data
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; check folder and space") from None
    finally:
        part.unlink(missing_ok=True)
    return shape


def _write_header(file, shape):
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
