"""One picture: the bytes of a file → its pixels in RGB, upright, of 8 bits."""

import io
import math
import re
import struct
import sys
import warnings

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageColor, ImageOps, PngImagePlugin
from PIL import UnidentifiedImageError as Unidentified

from errors import reason_of
from file_kinds import REMEDIES, kind_of

# What is read, whatever a file's name says. Left out are icons, which come with folders and are no
# pictures of a set, and formats that other programs decode, such as EPS.
FORMATS = (
    "PNG JPEG WEBP BMP DIB GIF TIFF PPM TGA JPEG2000 AVIF PCX SGI SUN QOI PSD DDS XBM XPM".split()
)
SUFFIXES = tuple(
    ".png .jpg .jpeg .webp .apng .avif .bmp .dds .dib .gif .j2k .jfif .jp2 .jpe .pbm .pcx .pgm "
    ".pnm .ppm .psd .qoi .ras .sgi .tga .tif .tiff .xbm .xpm".split()
)

# Texts in a PNG count for nothing here; Pillow's limits on them, 1 and 64 MiB, refuse the picture.
PngImagePlugin.MAX_TEXT_CHUNK = max(PngImagePlugin.MAX_TEXT_CHUNK, 2**28)
PngImagePlugin.MAX_TEXT_MEMORY = max(PngImagePlugin.MAX_TEXT_MEMORY, 2**29)

# What is said of pictures that were not simply read.
LAID = "with transparency, laid on {background}"
DIVIDED = "of 9 to 16 bits a channel, divided to 8 (16 by 257)"
CUT = "of more than 8 bits a channel, cut to 8 by their decoder"
FIRST = "of several frames, the first taken"

# Frames that are no pictures after each other: previews of a camera, layers.
NO_SEQUENCE = ("JPEG", "MPO", "PSD")


def decode(data, background="white"):
    """The image that a file holds, as decode_noting."""
    return decode_noting(data, background)[0]


def decode_noting(data, background="white"):
    """(a file's image: PIL, mode RGB, upright as its EXIF data say; its notes: FIRST, ...).

    Grey is repeated in the three channels, palette entries are looked up, CMYK becomes RGB.

    Args:
        data: the file's bytes.
        background: colour that transparency is laid on, by name or as #rrggbb.

    Raises:
        ValueError: with the reason, for bytes that don't decode, or 32 bits a channel.
    """
    notes = []
    try:
        with warnings.catch_warnings(action="ignore"):  # of damaged EXIF data and the like
            data = _of_two_digits(data) if data.startswith(b"/* XPM */") else data
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            if image.format not in NO_SEQUENCE and getattr(image, "is_animated", False):
                notes.append(FIRST)
            # Before image.load(), which forgets how the file is laid out.
            levels, note = _deep_levels(image, data)
            notes += [note] * (note is not None)
            plain_ycbcr = _take_plain_ycbcr(image)
            image.load()
            turn = _turn(image)
            if plain_ycbcr:
                image = Image.frombytes("YCbCr", image.size, image.tobytes())
            if levels is not None:
                image = _of_levels(levels, image)
            if image.mode not in ("I", "F"):
                image, laid = _to_rgb(image, background)
                image = image.transpose(turn) if turn is not None else image
                return image, notes + [LAID] * laid
    except Unidentified:  # whose message names an object in memory
        kind = kind_of(data[:1024])
        what = f"it is {kind}" if kind else "no format that is read"
        remedy = f": {REMEDIES[kind]}" if kind in REMEDIES else ""
        raise ValueError(f"cannot be decoded ({what}){remedy}") from None
    except Exception as error:  # damaged bytes make PIL's decoders raise nearly anything
        raise ValueError(f"cannot be decoded ({reason_of(error)})") from None
    raise ValueError(f"has 32 bits a channel or signed levels (mode {image.mode}), not 8 or 16")


def _turn(image):
    """The transposition that makes a loaded image upright, or None.

    Of the EXIF data nothing but the orientation is read: other tags may be of any wrong type.
    """
    try:
        return {
            2: Image.Transpose.FLIP_LEFT_RIGHT,
            3: Image.Transpose.ROTATE_180,
            4: Image.Transpose.FLIP_TOP_BOTTOM,
            5: Image.Transpose.TRANSPOSE,
            6: Image.Transpose.ROTATE_270,
            7: Image.Transpose.TRANSVERSE,
            8: Image.Transpose.ROTATE_90,
        }.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # as of damaged bytes: a picture without a known orientation
        return None


def _take_plain_ycbcr(image):
    """Whether it is an uncompressed TIFF in YCbCr, whose bytes then load as if they were RGB.

    Pillow before 13 takes such a file for one of four bytes a pixel, and so for cut off.
    """
    raw = [tile.args[0] for tile in image.tile if tile.codec_name == "raw" and tile.args]
    found = image.format == "TIFF" and image.tag_v2.get(262) == 6 and {*raw} == {"RGBX"}
    if found:
        image.tile = [tile._replace(args=("RGB", *tile.args[1:])) for tile in image.tile]
    return found


def _of_two_digits(data):
    """An XPM file whose colours have two digits a channel, the only ones that Pillow reads right.

    X11 allows of 1 to 4: of one, twice the same are taken, of more the first two.
    """

    def colour(match):
        start, digits = match.groups()
        n = len(digits) // 3
        parts = [digits[i : i + n] for i in range(0, 3 * n, n)]
        return start + b"".join(part * 2 if n == 1 else part[:2] for part in parts)

    return re.sub(rb"(\sc\s+#)((?:[0-9A-Fa-f]{3}){1,4})(?=[\s\"])", colour, data)


def rgb_of(colour):
    """(red, green, blue) of a colour's name or #rrggbb."""
    return ImageColor.getrgb(colour)[:3]


def _to_rgb(image, background):
    """(an image in mode RGB, whether something of it was transparent, and lies on background)."""
    if image.mode == "LAB":
        profiles = [ImageCms.createProfile(name) for name in ("LAB", "sRGB")]
        return ImageCms.profileToProfile(image, *profiles, outputMode="RGB"), False
    if not image.has_transparency_data:
        return image.convert("RGB"), False
    image = image.convert("RGBA")
    if image.getchannel("A").getextrema()[0] == 255:
        return image.convert("RGB"), False
    flat = Image.new("RGBA", image.size, (*rgb_of(background), 255))
    return Image.alpha_composite(flat, image).convert("RGB"), True


# ---- more than 8 bits a channel ------------------------------------------------------------


def _deep_levels(image, data):
    """(levels (H, W) or (H, W, C), 0 to 65535, of an opened image of 9 to 16 bits a channel, note).

    Without levels, what Pillow makes of it is taken: its note is CUT where it has more than 8 bits.

    Raises:
        ValueError: for such that Pillow reads wrongly.
    """
    read = {"AVIF": _avif, "DDS": _dds, "JPEG2000": _jpeg_2000, "PPM": _ppm, "SGI": _sgi,
            "TIFF": _tiff}.get(image.format, _raw)  # fmt: skip
    return read(image, data) if image.tile else (None, None)


def _raw(image, data):
    """Of a file whose levels are bytes in rows, maybe compressed.

    Of colours Pillow keeps the upper byte alone. Read once more as if their bytes stood in the
    other order, the image is that of their lower bytes.
    """
    if image.mode.startswith("I;16"):
        return np.asarray(image).astype(np.int64), DIVIDED
    arguments = image.tile[0].args
    raw = arguments if isinstance(arguments, str) else arguments[0] if arguments else None
    if not isinstance(raw, str) or not raw.endswith((";16B", ";16L", ";16N")):
        return None, None
    if raw.endswith("N"):  # native
        other = raw[:-1] + {"little": "B", "big": "L"}[sys.byteorder]
    else:
        other = raw[:-1] + {"B": "L", "L": "B"}[raw[-1]]
    lower = Image.open(io.BytesIO(data), formats=FORMATS)
    if raw == "LA;16B":  # of which there is no other order: four bytes a pixel
        lower.tile = [tile._replace(args="RGBA") for tile in lower.tile]
        grey_alpha = np.asarray(lower).astype(np.int64)  # (H, W, 4)
        return grey_alpha[..., [0, 0, 0, 2]] * 256 + grey_alpha[..., [1, 1, 1, 3]], DIVIDED
    lower.tile = [
        tile._replace(args=other if isinstance(tile.args, str) else (other, *tile.args[1:]))
        for tile in lower.tile
    ]
    lower = np.asarray(lower).astype(np.int64)
    upper = np.asarray(Image.open(io.BytesIO(data), formats=FORMATS)).astype(np.int64)
    return upper * 256 + lower, DIVIDED


def _tiff(image, data):
    tags = image.tag_v2
    bits, planar, strips = tags.get(258, (1,))[0], tags.get(284) == 2, tags.get(273)
    if planar and bits == 16 and len(image.getbands()) > 1:
        if tags.get(259, 1) != 1:
            return None, CUT
        if not strips:
            raise ValueError("TIFF of 16 bits in tiles of one channel: convert it to PNG")
        # Uncompressed, Pillow takes each byte for a level. The strips are the channels' rows.
        parts = [data[at : at + n] for at, n in zip(strips, tags[279], strict=True)]
        levels = np.frombuffer(b"".join(parts), "<u2" if data[:2] == b"II" else ">u2")
        levels = levels.reshape(len(image.getbands()), tags[257], tags[256])
        levels, turn = levels.transpose(1, 2, 0).astype(np.int64), tags.get(274)
        # As Pillow turns what it loads, and then knows of no turn any more.
        levels = levels.transpose(1, 0, 2) if turn in (5, 6, 7, 8) else levels
        levels = levels[::-1] if turn in (3, 4, 7, 8) else levels
        return levels[:, ::-1] if turn in (2, 3, 6, 7) else levels, DIVIDED
    twelve = image.tile[0].args[0] == "I;12"
    levels, note = _raw(image, data)
    if levels is not None and twelve:
        levels = levels * 65535 // 4095
    if levels is not None and levels.ndim == 2 and tags.get(262) == 0:  # 0 is white
        levels = 65535 - levels
    return levels, note


def _ppm(image, data):
    if image.mode == "I":  # which Pillow has scaled to 65535
        return np.asarray(image).astype(np.int64), DIVIDED
    codec, _, offset, arguments = image.tile[0]
    highest = arguments[1] if codec.startswith("ppm") else 255
    if image.mode != "RGB" or highest < 256:
        return None, None
    if codec == "ppm_plain":  # in decimal digits, which Pillow has rounded
        return None, CUT
    levels = np.frombuffer(data, ">u2", image.width * image.height * 3, offset).astype(np.int64)
    levels = np.minimum((levels * 65535 + highest // 2) // highest, 65535)
    return levels.reshape(image.height, image.width, 3), DIVIDED


def _sgi(image, data):
    if image.tile[0].codec_name == "SGI16":  # channel by channel, from the lowest row on
        shape = (len(image.getbands()), image.height, image.width)
        levels = np.frombuffer(data, ">u2", math.prod(shape), 512).reshape(shape)
        levels = levels[:, ::-1].transpose(1, 2, 0).astype(np.int64)
        return (levels if shape[0] > 1 else levels[..., 0]), DIVIDED
    if image.tile[0].args[0] == "L;16B":  # of which there is no other order
        return None, CUT
    return _raw(image, data)


def _jpeg_2000(image, data):
    """Of colours Pillow rounds the levels to 8 bits, and the highest become 0: white is black."""
    siz = data.index(b"\xff\x4f\xff\x51")  # where the codestream begins
    (channels,) = struct.unpack_from(">H", data, siz + 40)
    bits = max((depth & 127) + 1 for depth in data[siz + 42 : siz + 42 + 3 * channels : 3])
    if bits <= 8:
        return None, None
    if not image.mode.startswith("I;16") or bits > 16:
        raise ValueError(
            f"JPEG 2000 has {bits} bits a channel, and is read up to 8, of grey 10 to 16 too: "
            f"convert it to PNG"
        )
    levels = np.asarray(image).astype(np.int64) >> (16 - bits)  # which Pillow has shifted
    return levels * 65535 // (2**bits - 1), DIVIDED


def _avif(image, data):
    at = data.find(b"av1C")  # version, profile, then tier and depth
    return None, CUT if at >= 0 and data[at + 6] & 0x40 else None


def _dds(image, data):
    if getattr(image, "pixel_format", "").startswith("BC6H"):
        raise ValueError("DDS of high dynamic range (BC6H): convert it to 8 or 16 bits a channel")
    masks = image.tile[0].args[1] if image.tile[0].codec_name == "dds_rgb" else ()
    return None, CUT if any(mask.bit_count() > 8 for mask in masks) else None


def _of_levels(levels, image):
    """A loaded image's levels (H, W) or (H, W, C) of 16 bits as an image of 8, floor(level / 257).

    The level or colour that its file gives as transparent is so.
    """
    pixels, key = (levels // 257).astype(np.uint8), image.info.get("transparency")
    if isinstance(key, int | tuple) and (levels.ndim == 2 or levels.shape[2] == 3):
        grey = pixels[..., None] if levels.ndim == 2 else pixels  # (H, W, 1 or 3)
        differs = levels.reshape(*grey.shape) != np.asarray(key)
        alpha = differs.any(axis=2, keepdims=True) * np.uint8(255)
        return Image.fromarray(np.dstack([np.broadcast_to(grey, (*grey.shape[:2], 3)), alpha]))
    mode = "L" if levels.ndim == 2 else image.mode
    return Image.frombytes(mode, image.size, np.ascontiguousarray(pixels).tobytes())


# ---- the middle square ---------------------------------------------------------------------

# The long side over the short one from which on the middle is cut out before anything else: a
# square of 64 pixels of one of 3 x 400,000 took 4.3 GiB. No panorama that one trains on is so long.
LONG = 16


def _middle(image):
    """An image, of a very long one the middle."""
    short, long = min(image.size), max(image.size)
    if long <= LONG * short:
        return image
    start = (long - LONG * short) // 2
    box = (start, 0, start + LONG * short, short)
    return image.crop(box if image.width == long else (box[1], box[0], box[3], box[2]))


def fit(image, size, enlarge=False):
    """A PIL image as uint8 (size, size, 3): short side to `size` (Lanczos), the middle cut out.

    enlarge: a smaller one is made larger first (bicubic).

    Raises:
        ValueError: for an image with a side shorter than `size`, without enlarge.
    """
    short = min(image.size)
    if short < size and not enlarge:
        raise ValueError(f"is {image.width} x {image.height} pixels, smaller than {size}")
    image = _middle(image)
    if short < size:
        image = ImageOps.cover(image, (size, size))
        short = min(image.size)
    width, height = (round(side * size / short) for side in image.size)
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


# ---- as before -----------------------------------------------------------------------------


def decode_as_before(data):
    """The image of a file as packing of version 1 took it: alpha dropped, few kinds read.

    Raises:
        ValueError: with the reason, for what it refused.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP"))
        if image.mode in ("1", "L", "LA", "P", "PA", "RGB", "RGBA"):
            return ImageOps.exif_transpose(image).convert("RGB")
    except Unidentified:
        raise ValueError("cannot be decoded (no PNG, JPEG or WebP)") from None
    except Exception as error:  # as in decode_noting
        raise ValueError(f"cannot be decoded ({reason_of(error)})") from None
    raise ValueError(f"has mode {image.mode}, which is not 8-bit RGB, grey or palette")
