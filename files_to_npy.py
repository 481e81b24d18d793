"""Turns a folder of images, or a plain tar of them, into one .npy file.

    python files_to_npy.py images/ images.npy
    python files_to_npy.py train_32x32.tar imagenet32-train.npy --expect 1281149

The result is uint8 (n, H, W, 3), in the order of the images' names (by code points, the path below
SOURCE) and not in that of the tar or the file system.
"""

import argparse
import io
import os
import tarfile
from array import array
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from hps import UserError

SUFFIXES = (".png", ".jpg", ".jpeg")
# PIL modes that become RGB as one expects: grey is repeated in the three channels, palette entries
# are looked up, alpha is dropped. Others, such as 16-bit grey, would silently be clipped.
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")
# Counts that betray the data set most easily taken for the small ImageNet of 2016.
BOX_FILTERED_COUNTS = (1_281_167, 50_000)


def files_to_npy(source, out, expect=None, force=False):
    """Write the images in source to out; return the shape, (n, H, W, 3).

    Grey and palette images become RGB, alpha is dropped. Files not named .png, .jpg or .jpeg are
    left out, and how many is printed. Memory is that of the names (under 200 bytes an image) and
    one image. out appears when it is whole: until then the data is in out + ".part", deleted on an
    error and overwritten by the next call.

    Args:
        source: path of a folder (searched to any depth) or of an uncompressed tar.
        out: path of the .npy file to write.
        expect: the number of images there must be, or None.
        force: replace out where it exists.

    Raises:
        UserError: out exists (without force) or cannot be written; source is neither folder nor
            tar, is damaged, or has other than `expect` images; an image, which is named, does not
            decode, has a mode that does not fit in RGB or another size than the first.
    """
    source, out = Path(source), Path(out)
    if out.is_dir() or (out.exists() and not force):
        raise UserError(f"{out} exists already; name another file, or add --force to replace it")
    names, left_out, read = _list_folder(source) if source.is_dir() else _list_tar(source)
    if left_out:
        print(f"leaving out {len(left_out)} files that are no PNG or JPEG, first {left_out[0]}")
    if not names:
        raise UserError(f"{source} holds no image; it needs {', '.join(SUFFIXES)} files")
    if expect not in (None, len(names)):
        why = "it is incomplete or the wrong one"
        if len(names) in BOX_FILTERED_COUNTS:
            why = "that is the count of the other, box-filtered downsampled ImageNet"
        raise UserError(f"{source} holds {len(names)} images where {expect} are expected; {why}")

    part = out.with_name(out.name + ".part")
    try:
        # Written in sequence, not through a memory map, whose pages would count as our memory.
        with open(part, "wb", buffering=1 << 20) as file:
            for i, name in enumerate(tqdm(names, desc=out.name, unit=" images", disable=None)):
                image = _decode(name, read, i)
                if i == 0:
                    size = image.size  # (W, H)
                    shape = (len(names), image.height, image.width, 3)
                    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(file, header)
                if image.size != size:
                    raise UserError(
                        f"{name} is {image.width}x{image.height}, the first image, {names[0]}, is "
                        f"{size[0]}x{size[1]}; all must have one size: leave it out or resize it"
                    )
                file.write(image.tobytes())  # (H, W, 3)
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave the final name on missing data
        os.replace(part, out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}; check folder and space") from None
    finally:
        if part.is_file():  # not after os.replace
            part.unlink()
    return shape


def _decode(name, read, i):
    """Image i, called name, as a PIL image of mode RGB."""
    try:
        image = Image.open(io.BytesIO(read(i)))
        mode = image.mode
        rgb = image.convert("RGB") if mode in MODES else None
    except Exception as error:  # damaged bytes make PIL's decoders raise nearly anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{name} cannot be decoded ({reason}); replace or remove it") from None
    if rgb is None:
        raise UserError(
            f"{name} has mode {mode}, which is not 8-bit RGB, grey or palette; convert it"
        )
    return rgb


def _list_folder(folder):
    """(names, left_out, read) as _list_tar's, for a folder. Links to folders are left out."""
    names, left_out = [], []
    for root, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(root, name))]
        for name in files + links:
            path = Path(root, name).relative_to(folder).as_posix()
            (names if path.lower().endswith(SUFFIXES) else left_out).append(path)
    names.sort()
    return names, left_out, lambda i: (folder / names[i]).read_bytes()


def _list_tar(path):
    """(names, left_out, read) of a tar, from its headers alone.

    names is the sorted list of the images' names, left_out that of other members but folders;
    read(i) returns the bytes of names[i].
    """
    names, left_out, places = [], [], array("q")  # places: offset and size of each image, in bytes
    try:
        tar = tarfile.open(path, "r:")
        while (member := tar.next()) is not None:
            tar.members.clear()  # tarfile would keep them all, about 1 kB each
            if member.name.lower().endswith(SUFFIXES):
                if not member.isreg() or member.issparse():
                    raise UserError(f"{member.name} in {path} is no plain file; pack it as one")
                names.append(member.name)
                places.extend((member.offset_data, member.size))
            elif not member.isdir():
                left_out.append(member.name)
        # tarfile takes a damaged header for the end; the real end is a block of zeros.
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"damaged or cut off at byte {tar.offset}")
    except (OSError, tarfile.TarError) as error:
        raise UserError(
            f"{path} is neither a folder nor a plain tar ({error}); unpack a compressed tar, "
            "download a damaged one again"
        ) from None
    order = sorted(range(len(names)), key=names.__getitem__)
    names = [names[i] for i in order]
    places = np.asarray(places).reshape(-1, 2)[order]  # (n, 2)

    def read(i):
        tar.fileobj.seek(places[i, 0])
        return tar.fileobj.read(places[i, 1])

    return names, left_out, read


def main():
    parser = argparse.ArgumentParser(
        description="Turn a folder of images, or a plain tar of them, into one .npy file: uint8 "
        "(n, H, W, 3), in the order of their names. Grey and palette images become RGB."
    )
    parser.add_argument("source", help="folder, searched to any depth, or uncompressed tar")
    parser.add_argument("out", help="the .npy file to write")
    parser.add_argument("--expect", type=int, metavar="N", help="fail unless there are N images")
    parser.add_argument("--force", action="store_true", help="replace OUT where it exists")
    args = parser.parse_args()
    shape = files_to_npy(args.source, args.out, args.expect, args.force)
    print(f"{args.out}: uint8 {shape}")


if __name__ == "__main__":
    import utils

    utils.run_command(main)
