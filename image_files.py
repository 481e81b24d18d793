"""Files of images: pictures decoded, folders listed, .npy files read image by image."""

import io
import math
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from errors import UserError, reason_of
from files import fsync

# ---- pictures ------------------------------------------------------------------------------

# PIL modes that become RGB as one expects: grey is repeated in the three channels, palette entries
# are looked up, alpha is dropped. Others, such as 16-bit grey, would silently be clipped.
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def decode(data):
    """The image that a file holds, a PIL image of mode RGB, turned upright as its EXIF data say.

    Raises:
        ValueError: with the reason, for bytes that don't decode, or a mode that does not fit RGB.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP"))
        if image.mode in MODES:
            return ImageOps.exif_transpose(image).convert("RGB")
    except UnidentifiedImageError:  # whose message names an object in memory
        raise ValueError("cannot be decoded (no PNG, JPEG or WebP)") from None
    except Exception as error:  # damaged bytes make PIL's decoders raise nearly anything
        raise ValueError(f"cannot be decoded ({reason_of(error)})") from None
    raise ValueError(f"has mode {image.mode}, which is not 8-bit RGB, grey or palette")


def fit(image, size):
    """A PIL image as uint8 (size, size, 3): short side to `size` (Lanczos), the middle cut out.

    Raises:
        ValueError: for an image with a side shorter than `size`.
    """
    short = min(image.size)
    if short < size:
        raise ValueError(f"is {image.width} x {image.height} pixels, smaller than {size}")
    width, height = (round(side * size / short) for side in image.size)
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def read_image(path, size):
    """An image file's middle square as uint8 (size, size, 3), as own images are packed.

    A smaller image is enlarged (bicubic).

    Raises:
        UserError: for a file that can't be read, or is not 8-bit RGB, grey or palette.
    """
    try:
        image = decode(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror}): name an image file") from None
    except ValueError as error:
        raise UserError(f"{path} {error}: name another image file") from None
    return fit(ImageOps.cover(image, (size, size)) if min(image.size) < size else image, size)


def read_images(paths, size):
    """uint8 (n, size, size, 3) of image files, as read_image."""
    return np.stack([read_image(path, size) for path in paths])


def list_images(folder):
    """(names, left_out) of the files below a folder, sorted paths relative to it.

    names end in one of SUFFIXES; left_out are other files and links to folders. Names that begin
    with a dot, such as the `._*.png` of some systems, are passed over.
    """
    names, left_out = [], []
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        links = [name for name in folders if os.path.islink(os.path.join(root, name))]
        for name in files + links:
            if not name.startswith("."):
                path = Path(root, name).relative_to(folder).as_posix()
                (names if path.lower().endswith(SUFFIXES) else left_out).append(path)
    return sorted(names), left_out


# ---- .npy files ----------------------------------------------------------------------------


class NpyImages:
    """A .npy file of uint8 images (n, S, S, 3) on the disk: an index reads the images it names.

    It reads where a memory map would fault: one request an image instead of one a page, without
    the 128 KiB that a fault reads around it, and what was read stays out of this process's memory
    (the system may keep it). A pickled one, as loader workers may get it, holds the path alone.
    """

    def __init__(self, path):
        self.path = path
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
            if os.preadv(self.file.fileno(), [image], start) != image.nbytes:
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
        raise UserError(f"{path} does not exist: {remedy}") from None
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
