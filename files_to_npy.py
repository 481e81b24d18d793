"""Turns a folder of images, a plain tar of them, or box-filtered ImageNet into one .npy file.

    python files_to_npy.py images/ images.npy
    python files_to_npy.py train_32x32.tar imagenet32-train.npy --expect 1281149
    python files_to_npy.py train_data_batch_1.npz ... imagenet32_box-train.npy

The result is uint8 (n, H, W, 3), in the order of the images' names (by code points, the path below
SOURCE) and not in that of the tar or the file system; .npz files follow one another as given.
"""

import interrupts  # noqa: F401  the first: a Ctrl-C while the others are imported is one line

# isort: split
import math
import tarfile
import zipfile
import zlib
from array import array
from collections import Counter
from pathlib import Path, PurePosixPath

import numpy as np
from tqdm import tqdm

from decoding import SUFFIXES, decode_noting
from endings import run_command
from errors import UserError, one_line
from file_kinds import not_regular, what_file
from image_files import describe_left_out, list_images, write_npy
from options import OneLineParser, colour
from options import path as path_type

# Counts that betray the data set most easily taken for the small ImageNet of 2016.
BOX_FILTERED_COUNTS = (1_281_167, 50_000)
DAMAGED_ZIP = (zipfile.BadZipFile, zlib.error)


def files_to_npy(source, out, expect=None, force=False, side=None, background="white"):
    """Write the images in source to out; return the shape, (n, H, W, 3).

    Images become RGB as decoding.decode_noting makes them; those that are not simply read are
    counted. Other files than SUFFIXES are left out, which is printed. Memory is that of the names
    (under 200 bytes an image) and one image.
    out appears when it is whole: until then the data is in out + ".part", deleted on an error and
    overwritten by the next call.

    Args:
        source: path of a folder (searched to any depth) or of an uncompressed tar, or a list of
            paths of Imagenet32's or Imagenet64's .npz files.
        out: path of the .npy file to write.
        expect: the number of images there must be, or None.
        force: replace out where it exists.
        side: the width and height in pixels that the images must have, or None.
        background: colour that transparency is laid on, by name or as #rrggbb.

    Raises:
        UserError: out exists (without force) or cannot be written; source is none of those, is
            damaged, or has other than `expect` images or pixels than `side`; an image, which is
            named, does not decode, has 32 bits a channel or another size than the first.
    """
    out, notes = Path(out), Counter()
    if out.is_dir() or (out.exists() and not force):
        raise UserError(f"{out} exists already; name another file, or add --force to replace it")
    if isinstance(source, list):
        shapes = [_npz_shape(path) for path in source]
        for path, shape in zip(source, shapes, strict=True):
            if shape[1:] != shapes[0][1:]:
                raise UserError(f"{path} holds images of {shape[1:]}, {source[0]} of another size")
        n, chunks = sum(shape[0] for shape in shapes), _npz_images(source)
        source = f"{len(source)} .npz files"
    else:
        source = Path(source)
        names, left_out, read = _list_folder(source) if source.is_dir() else _list_tar(source)
        if left_out:
            print(one_line(f"{source}: {describe_left_out(left_out)}"))
        if not names:
            raise UserError(f"{source} holds no image; it needs {', '.join(SUFFIXES)} files")
        n, chunks = len(names), _images(names, read, background, notes)
    if expect not in (None, n):
        why = "it is incomplete or the wrong one"
        if n in BOX_FILTERED_COUNTS:
            why = "that is the count of the other, box-filtered downsampled ImageNet"
        raise UserError(f"{source} holds {n} images where {expect} are expected; {why}")
    with tqdm(desc=one_line(out.name), total=n, unit=" images", disable=None) as bar:
        shape = write_npy(out, _checked(chunks, side, bar))
    if notes:
        print("; ".join(f"{k:,} {note.format(background=background)}" for note, k in notes.items()))
    return shape


def _checked(chunks, side, bar):
    for chunk in chunks:
        _, height, width, _ = chunk.shape
        if side and (height, width) != (side, side):
            raise UserError(f"the images are {width}x{height}, not {side}x{side} as expected")
        yield chunk
        bar.update(len(chunk))


def _images(names, read, background, notes):
    """The images, each (1, H, W, 3); counts in notes those that were not simply read."""
    size = None
    for i, name in enumerate(names):
        try:
            image, words = decode_noting(read(i), background)
            notes.update(words)
        except (ValueError, OSError, tarfile.TarError) as error:
            raise UserError(f"{name} {error}; replace, convert or remove it") from None
        if size and image.size != size:
            raise UserError(
                f"{name} is {image.width}x{image.height}, the first image, {names[0]}, is "
                f"{size[0]}x{size[1]}; all must have one size: leave it out or resize it"
            )
        size = image.size  # (W, H)
        yield np.asarray(image)[None]


def _list_folder(folder):
    """(names, left_out, read) as _list_tar's, for a folder."""
    names, left_out = list_images(folder)
    return names, left_out, lambda i: (folder / names[i]).read_bytes()


def _list_tar(path):
    """(names, left_out, read) of a tar, from its headers alone.

    names is the sorted list of the images' names, left_out counts other members but folders as
    list_images does; read(i) returns the bytes of names[i]. As in a folder, names that begin with a
    dot are passed over, such as the `._1.png` that tar writes on macOS.
    """
    names, left_out, places = (
        [],
        Counter(),
        array("q"),
    )  # places: offset and size of each image, in bytes
    try:
        if special := not_regular(path):
            raise tarfile.ReadError(f"it is {special}")
        tar = tarfile.open(path, "r:")
        while (member := tar.next()) is not None:
            tar.members.clear()  # tarfile would keep them all, about 1 kB each
            parts = PurePosixPath(member.name).parts
            if any(part.startswith(".") and part != ".." for part in parts):
                continue
            if member.name.lower().endswith(SUFFIXES):
                if not member.isreg() or member.issparse():
                    raise UserError(f"{member.name} in {path} is no plain file; pack it as one")
                names.append(member.name)
                places.extend((member.offset_data, member.size))
            elif not member.isdir():
                left_out[PurePosixPath(member.name).suffix.lower() or "without a suffix"] += 1
        # tarfile takes a damaged header for the end; the real end is a block of zeros.
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"damaged or cut off at byte {tar.offset}")
    except (OSError, tarfile.TarError) as error:
        kind, _ = what_file(path)
        reason = error if kind in (None, "a tar archive") else f"it is {kind}"
        raise UserError(
            f"{path} is neither a folder nor a plain tar ({reason}); "
            f"unpack a compressed tar, download a damaged one again"
        ) from None
    order = sorted(range(len(names)), key=names.__getitem__)
    names = [names[i] for i in order]
    places = np.asarray(places).reshape(-1, 2)[order]  # (n, 2)

    def read(i):
        tar.fileobj.seek(places[i, 0])
        return tar.fileobj.read(places[i, 1])

    return names, left_out, read


def _open_npz(path):
    """The member data.npy of an .npz file, opened and read up to its header's end, and its shape.

    It is read as bytes in sequence, so that neither can a pickle in it run nor the file, of up to
    1.6 GB, fill the memory. The shape is (n, S, S).
    """
    try:
        file = zipfile.ZipFile(path).open("data.npy")
        version = np.lib.format.read_magic(file)
        read_header = getattr(np.lib.format, f"read_array_header_{version[0]}_0")
        shape, fortran_order, dtype = read_header(file)
    except (OSError, KeyError, ValueError, AttributeError, *DAMAGED_ZIP) as error:
        raise UserError(f"{path} is no .npz file with images called data ({error})") from None
    size = math.isqrt(shape[-1] // 3) if shape else 0
    if dtype != np.uint8 or fortran_order or not size or shape != (shape[0], 3 * size**2):
        raise UserError(f"{path} holds data of {dtype} {shape}, not uint8 (n, 3 * S * S)")
    return file, (shape[0], size, size)


def _npz_shape(path):
    file, shape = _open_npz(path)
    file.close()
    return shape


def _npz_images(paths):
    """The images of .npz files, whose rows are three planes of S * S, as (k, S, S, 3)."""
    for path in paths:
        file, (n, size, _) = _open_npz(path)
        row = 3 * size**2
        with file:
            for first in range(0, n, 1024):
                k = min(1024, n - first)
                try:
                    planes = np.frombuffer(file.read(k * row), np.uint8)
                    planes = planes.reshape(k, 3, size, size)
                except (OSError, EOFError, ValueError, *DAMAGED_ZIP) as error:
                    raise UserError(f"{path} is damaged ({error}): fetch it anew") from None
                yield planes.transpose(0, 2, 3, 1)


def main():
    parser = OneLineParser(
        prog="files_to_npy.py",
        description="Turn a folder of images, a plain tar of them, or the .npz files of the "
        "box-filtered ImageNet into one .npy file: uint8 (n, H, W, 3), in the order of their "
        "names. All images become RGB of 8 bits.",
    )
    parser.add_argument(
        "source",
        type=path_type,
        nargs="+",
        help="a folder, searched to any depth, an uncompressed tar, or .npz's",
    )
    parser.add_argument("out", type=path_type, help="the .npy file to write")
    parser.add_argument("--expect", type=int, metavar="N", help="fail unless there are N images")
    parser.add_argument("--side", type=int, metavar="S", help="fail unless they are S x S pixels")
    parser.add_argument("--background", type=colour, default="white", metavar="COLOUR",
                        help="laid under transparent images: a name or #rrggbb")  # fmt: skip
    parser.add_argument("--force", action="store_true", help="replace OUT where it exists")
    args = parser.parse_args()
    npz = all(path.endswith(".npz") for path in args.source)
    if not npz and len(args.source) > 1:
        raise UserError(f"{len(args.source)} sources: only .npz files can be several")
    source = args.source if npz else args.source[0]
    shape = files_to_npy(source, args.out, args.expect, args.force, args.side, args.background)
    print(one_line(f"{args.out}: uint8 {shape}"))


if __name__ == "__main__":
    run_command(main)
