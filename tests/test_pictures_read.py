"""Pictures as they come: every kind, 16 bits, transparency, odd EXIF data; what is left out."""

import io
import os
import socket
import struct
import subprocess
import sys
import tarfile
import zlib

import numpy as np
import pytest
from fakes import noise, open_all, own_H
from PIL import Image, PngImagePlugin
from runs import ENV, ROOT

from decoding import CUT, DIVIDED, FIRST, LAID, decode, decode_noting, fit
from errors import UserError
from files_to_npy import files_to_npy
from image_files import image_paths, list_images, read_image


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """No test writes to the cache of who runs it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def saved(image, kind, **options):
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def deep_png(levels):
    """A PNG of 16 bits a channel of levels (H, W, C): grey, grey and alpha, RGB or RGBA."""
    height, width, channels = levels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 16, (0, 0, 4, 2, 6)[channels], 0, 0, 0)
    parts = (b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


RGB = Image.fromarray(noise(1, 32)[0])
LOSSLESS = {
    "bmp": ("BMP", {}), "tif": ("TIFF", {}), "lzw.tif": ("TIFF", {"compression": "tiff_lzw"}),
    "ppm": ("PPM", {}), "tga": ("TGA", {}), "jp2": ("JPEG2000", {}), "pcx": ("PCX", {}),
    "sgi": ("SGI", {}), "webp": ("WEBP", {"lossless": True}), "png": ("PNG", {}),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSLESS)
def test_formats_that_keep_every_level(name):
    kind, options = LOSSLESS[name]
    image, notes = decode_noting(saved(RGB, kind, **options))
    assert (np.asarray(image) == np.asarray(RGB)).all() and notes == []


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "CMYK", "YCbCr", "LAB"])
def test_modes_of_eight_bits(mode):
    smooth = RGB.resize((4, 4)).resize((32, 32), Image.Resampling.BICUBIC)
    image = smooth.convert(mode) if mode != "LAB" else Image.new("LAB", (32, 32), (128, 128, 128))
    kind = "PNG" if mode in ("1", "L", "P", "LA") else "TIFF"
    found = np.asarray(decode(saved(image, kind)), int)
    if mode == "LAB":
        assert np.abs(found - 119).max() < 3  # L = 50
    else:
        assert np.abs(found - np.asarray(image.convert("RGB"))).max() <= 2


def test_cmyk_of_a_camera_and_the_first_frame_of_a_gif():
    smooth = RGB.resize((4, 4)).resize((32, 32), Image.Resampling.BICUBIC)
    found = np.asarray(decode(saved(smooth.convert("CMYK"), "JPEG", quality=98)), int)
    assert np.abs(found - np.asarray(smooth)).max() < 12
    frames = [Image.new("RGB", (32, 32), name) for name in ("red", "blue")]
    data = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    image, notes = decode_noting(data)
    assert image.getpixel((3, 3)) == (255, 0, 0) and notes == [FIRST]


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_sixteen_bits_are_divided_grey_and_colour_alike(channels):
    levels = np.random.default_rng(0).integers(0, 65536, (9, 7, channels))
    levels[0, :5] = np.array([255, 256, 257, 65279, 65535])[:, None]
    if channels in (2, 4):
        levels[..., -1] = 65535
    image, notes = decode_noting(deep_png(levels))
    colours = levels[..., : 1 if channels < 3 else 3] // 257
    assert (np.asarray(image) == np.broadcast_to(colours, (9, 7, 3))).all()
    assert notes == [DIVIDED]


def tiff(order, pixels, photometric=2, bits=16, channels=3, planar=1, turn=1):
    """An uncompressed TIFF of 7 x 9 pixels."""
    o = "<" if order == "II" else ">"
    tags = {256: [7], 257: [9], 258: [bits] * channels, 259: [1], 262: [photometric], 273: [200],
            274: [turn], 277: [channels], 278: [9], 279: [len(pixels)], 284: [planar]}  # fmt: skip
    if planar == 2:
        size = len(pixels) // channels
        tags |= {273: [300 + i * size for i in range(channels)], 279: [size] * channels}
    entries, more, at = b"", b"", 8 + 2 + 12 * len(tags) + 4
    for tag, values in tags.items():
        packed = struct.pack(f"{o}{len(values)}I", *values)
        if len(values) > 1:
            packed, more = struct.pack(f"{o}I", at + len(more)), more + packed
        entries += struct.pack(f"{o}HHI", tag, 4, len(values)) + packed
    head = order.encode() + struct.pack(f"{o}HIH", 42, 8, len(tags)) + entries + bytes(4) + more
    return head.ljust(300 if planar == 2 else 200, b"\0") + pixels


def sgi(levels, packed):
    """An SGI file of 16 bits a channel; packed: in runs of one row each."""
    planes = levels[::-1].transpose(2, 0, 1).astype(">u2")
    channels, height, width = planes.shape
    head = struct.pack(
        ">hBBHHHH", 474, packed, 2, 3 if channels > 1 else 2, width, height, channels
    ).ljust(512, b"\0")
    if not packed:
        return head + planes.tobytes()
    runs = [struct.pack(">H", 0x80 | width) + row.tobytes() + bytes(2) for row in
            planes.reshape(-1, width)]  # fmt: skip
    start, n = 512 + 8 * len(runs), len(runs[0])
    table = struct.pack(f">{len(runs)}I", *(start + n * i for i in range(len(runs))))
    return head + table + struct.pack(f">{len(runs)}I", *[n] * len(runs)) + b"".join(runs)


def netpbm(levels, highest, plain):
    kind = {(1, True): 2, (3, True): 3, (1, False): 5, (3, False): 6}[levels.shape[2], plain]
    pixels = levels * highest // 65535
    body = " ".join(map(str, pixels.ravel())).encode() if plain else pixels.astype(">u2").tobytes()
    return b"P%d 7 9 %d\n" % (kind, highest) + body


def twelve_bits(levels):
    """Rows of 7 levels of 12 bits, four bits left over in each."""
    rows = (sum(int(v) << (76 - 12 * i) for i, v in enumerate(row)) for row in levels[..., 0] >> 4)
    return b"".join(row.to_bytes(11, "big") for row in rows)


LEVELS = np.random.default_rng(0).integers(0, 65536, (9, 7, 3))
LEVELS[0, :3] = np.array([0, 255, 65535])[:, None]
GREY = LEVELS[..., :1]
DEEP = {
    "ppm": (lambda: netpbm(LEVELS, 65535, False), LEVELS, 0),
    "ppm of 10 bits": (lambda: netpbm(LEVELS, 1023, False), LEVELS, 1),
    "ppm in digits": (lambda: netpbm(LEVELS, 4095, True), LEVELS, None),
    "pgm": (lambda: netpbm(GREY, 65535, False), GREY, 0),
    "pgm of 12 bits": (lambda: netpbm(GREY, 4095, True), GREY, 1),
    "tiff": (lambda: tiff("II", LEVELS.astype("<u2").tobytes()), LEVELS, 0),
    "tiff MM": (lambda: tiff("MM", LEVELS.astype(">u2").tobytes()), LEVELS, 0),
    "tiff in planes": (
        lambda: tiff("MM", LEVELS.transpose(2, 0, 1).astype(">u2").tobytes(), planar=2), LEVELS, 0,
    ),
    "tiff of negatives": (
        lambda: tiff("II", (65535 - GREY).astype("<u2").tobytes(), 0, channels=1), GREY, 0,
    ),
    "tiff of 12 bits": (lambda: tiff("II", twelve_bits(LEVELS), 1, 12, 1), GREY, 1),
    "tiff, lzw": (
        lambda: saved(Image.fromarray(GREY[..., 0].astype("<u2")), "TIFF", compression="tiff_lzw"),
        GREY, 0,
    ),
    "sgi": (lambda: sgi(LEVELS, 0), LEVELS, 0),
    "sgi, grey": (lambda: sgi(GREY, 0), GREY, 0),
    "sgi in runs": (lambda: sgi(LEVELS, 1), LEVELS, 0),
    "sgi, grey in runs": (lambda: sgi(GREY, 1), GREY, None),
    "jpeg 2000": (
        lambda: saved(Image.fromarray(GREY[..., 0].astype("<u2")), "JPEG2000"), GREY, 0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("turn", range(1, 9))
def test_planes_are_turned_as_pixels_are(turn):
    planes = tiff("MM", LEVELS.transpose(2, 0, 1).astype(">u2").tobytes(), planar=2, turn=turn)
    chunky = tiff("MM", LEVELS.astype(">u2").tobytes(), turn=turn)
    (image, _), (expected, _) = map(decode_noting, (planes, chunky))
    assert np.array_equal(image, expected)


@pytest.mark.parametrize("kind", DEEP)
def test_sixteen_bits_in_other_formats(kind):
    """The third of a case: by how much fewer bits make it differ, None where Pillow rounds."""
    data, levels, off = DEEP[kind]
    image, notes = decode_noting(data())
    wanted = np.broadcast_to(levels // 257, (9, 7, 3))
    found = np.asarray(image, int)
    assert np.abs(found - wanted).max() <= (1 if off is None else off)
    assert (found[0, [0, 2]] == [[0] * 3, [255] * 3]).all()
    assert notes == [CUT if off is None else DIVIDED]


def of_bits(image, bits, old):
    """A JPEG 2000 whose levels have so many bits, of one by Pillow: (level - middle) stays."""
    data = saved(image, "JPEG2000", no_jp2=True)
    at, channels = data.index(b"\xff\x4f\xff\x51") + 42, len(image.getbands())
    assert data[at] == old - 1
    return data[:at] + b"".join(
        bytes([bits - 1]) + data[at + 3 * i + 1 : at + 3 * i + 3] for i in range(channels)
    ) + data[at + 3 * channels :]  # fmt: skip


def test_jpeg_2000_of_other_than_8_bits():
    """Pillow turns the white of such a colour picture into black."""
    levels = np.tile(np.array([0, 1000, 4095]), (8, 8))
    data = of_bits(Image.fromarray((levels - 2048 + 32768).astype(np.uint16)), 12, 16)
    image, notes = decode_noting(data)
    assert (np.asarray(image)[..., 0] == levels * 255 // 4095).all() and notes == [DIVIDED]
    for mode in ("LA", "RGB", "RGBA"):
        assert decode_noting(of_bits(RGB.convert(mode), 8, 8))[1] == []
        for bits in (9, 16):
            with pytest.raises(ValueError, match=f"has {bits} bits a channel.*convert it to PNG"):
                decode(of_bits(RGB.convert(mode), bits, 8))


def test_more_bits_than_the_decoder_gives_are_counted():
    image, notes = decode_noting((ROOT / "tests/data/ten_bits.avif").read_bytes())
    assert notes == [CUT] and image.getpixel((1, 1)) == (0,) * 3
    assert np.abs(np.asarray(image, int)[:, 8:] - 255).max() < 2
    assert decode_noting(saved(RGB, "AVIF"))[1] == []
    for masks, wanted in (((0x3FF00000, 0xFFC00, 0x3FF), [CUT]), ((0xFF0000, 0xFF00, 0xFF), [])):
        head = struct.pack("<4s7I44x8I", b"DDS ", 124, 0x1007, 2, 2, 8, 0, 0, 32, 0x40, 0, 32,
                           *masks, 0)  # fmt: skip
        image, notes = decode_noting(head.ljust(128, b"\0") + b"\xff\xff\xff\x3f" * 4)
        assert notes == wanted and image.getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("digits", [1, 2, 3, 4])
def test_colours_of_an_xpm_by_their_digits(digits):
    """Pillow takes the last six of them, whatever they are of."""
    colours = [b"".join(b"%04x" % (v * 257) for v in c) for c in ((255, 0, 17), (34, 204, 255))]
    names = [b"".join(c[i : i + digits] for i in (0, 4, 8)) for c in colours]
    data = b'/* XPM */\nstatic char * x[] = {\n"2 1 2 1",\n"a c #%s",\n"b c #%s",\n"ab"\n};\n'
    found = np.asarray(decode(data % tuple(names)))
    assert found.tolist() == [[[255, 0, 17], [34, 204, 255]]]


def test_more_than_sixteen_bits_are_refused():
    for kind in (np.float32, np.int32):
        data = saved(Image.fromarray(np.zeros((8, 8), kind)), "TIFF")
        with pytest.raises(ValueError, match="32 bits a channel"):
            decode(data)


def test_transparency_lies_on_the_background():
    pixels = np.dstack([noise(1, 8)[0], np.full((8, 8), 255, np.uint8)])
    image, notes = decode_noting(saved(Image.fromarray(pixels), "PNG"), "black")
    assert (np.asarray(image) == pixels[..., :3]).all() and notes == []  # opaque
    pixels[:4, :, 3] = 0
    pixels[4:, :, 3] = 128
    for name, level in (("white", 255), ("#000000", 0)):
        image, notes = decode_noting(saved(Image.fromarray(pixels), "PNG"), name)
        assert notes == [LAID] and (np.asarray(image)[:4] == level).all()
        half = pixels[4:, :, :3] * (128 / 255) + level * (127 / 255)
        assert np.abs(np.asarray(image)[4:] - half).max() <= 1
    # A palette with a transparent entry, a colour that counts as transparent, of 16 bits too.
    palette = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) % 4).convert("P")
    data = saved(palette, "PNG", transparency=2)
    assert (np.asarray(decode(data, "red"))[0, 2] == (255, 0, 0)).all()
    data = saved(Image.new("RGB", (4, 4), (1, 2, 3)), "PNG", transparency=(1, 2, 3))
    assert (np.asarray(decode(data, "lime")) == (0, 255, 0)).all()
    data = saved(Image.fromarray(np.full((4, 4), 700, np.uint16)), "PNG", transparency=700)
    assert (np.asarray(decode(data, "blue")) == (0, 0, 255)).all()


def test_of_exif_data_nothing_but_the_orientation_is_taken():
    """0x11a, a resolution, is a text here, which Pillow can read and not write."""
    tags = (0x0112, 3, 1, struct.pack("<HH", 6, 0)), (0x011A, 2, 4, b"abc\0")
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(tags))
    exif += b"".join(struct.pack("<HHI", *tag[:3]) + tag[3] for tag in tags) + bytes(4)
    wide = Image.fromarray(noise(1, 32)[0][:16])
    for kind in ("JPEG", "PNG", "WEBP"):
        upright = decode(saved(wide, kind))
        turned = decode(saved(wide, kind, exif=exif))
        assert turned.size == (16, 32)
        wanted = upright.transpose(Image.Transpose.ROTATE_270)
        assert turned.tobytes() == wanted.tobytes()
    assert decode(saved(wide, "TIFF", tiffinfo={0x0112: 6})).size == (16, 32)  # turned once
    odd = exif.replace(
        struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0), struct.pack("<HHI", 0x0112, 2, 4) + b"six\0"
    )
    assert decode(saved(wide, "JPEG", exif=odd)).size == (32, 16)  # no orientation at all


@pytest.mark.parametrize("zipped", [False, True])
def test_a_png_with_megabytes_of_text(zipped):
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "x" * 2_000_000, zip=zipped)
    assert decode(saved(RGB, "PNG", pnginfo=text)).tobytes() == RGB.tobytes()


def test_today_s_pictures_are_fitted_as_before():
    """The square of a long picture is cut out first, of others the whole is resized."""
    for size in ((64, 48), (16 * 20, 20), (30, 30)):
        image = Image.fromarray(
            np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8)
        )
        short = min(size)
        whole = image.resize(
            tuple(round(side * 16 / short) for side in size), Image.Resampling.LANCZOS
        )
        left, top = (whole.width - 16) // 2, (whole.height - 16) // 2
        assert (fit(image, 16) == np.asarray(whole.crop((left, top, left + 16, top + 16)))).all()
    stripes = np.zeros((3, 4000, 3), np.uint8)
    stripes[:, 1990:2010] = 200  # the middle
    for pixels in (stripes, stripes.transpose(1, 0, 2)):
        assert (fit(Image.fromarray(pixels), 8, enlarge=True) == 200).all()
        assert (fit(Image.fromarray(np.repeat(np.repeat(pixels, 4, 0), 4, 1)), 8) == 200).all()


def test_a_very_long_picture_costs_little_memory(tmp_path):
    Image.new("L", (400_000, 3), 7).save(tmp_path / "long.png")
    code = (
        "import resource, sys; from image_files import read_image\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "assert (read_image(sys.argv[1], 64) == 7).all()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    argv = [sys.executable, "-c", code, tmp_path / "long.png"]
    kilobytes = subprocess.check_output(argv, env=ENV, cwd=ROOT, text=True, timeout=600)
    assert int(kilobytes) < 100_000


# ---- folders ---------------------------------------------------------------------------------


def failing_scandir(monkeypatch, folder, number):
    """From now on the folder can't be listed, as of a mode of 000 or a disk that fails."""
    scandir = os.scandir

    def fail(path="."):
        if os.fspath(path).rstrip("/") == str(folder):
            raise OSError(number, os.strerror(number), os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", fail)


@pytest.mark.parametrize("number", [13, 5])
def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch, number):
    for name in ("a", "b/deep"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(3):
            RGB.save(tmp_path / "photos" / name / f"{i}.png")
    failing_scandir(monkeypatch, tmp_path / "photos" / "b" / "deep", number)
    for use in (
        lambda: open_all(own_H(tmp_path / "photos", 8)),
        lambda: files_to_npy(tmp_path / "photos", tmp_path / "out.npy"),
        lambda: image_paths([str(tmp_path / "photos")]),
    ):
        with pytest.raises(UserError, match=f"b/deep can't be read .{os.strerror(number)}"):
            use()
    assert not (tmp_path / "out.npy").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="it takes another user's eyes")
def test_a_folder_of_mode_000(tmp_path):
    (tmp_path / "photos" / "closed").mkdir(parents=True)
    RGB.save(tmp_path / "photos" / "0.png")
    RGB.save(tmp_path / "photos" / "closed" / "1.png")
    (tmp_path / "photos" / "closed").chmod(0)
    for folder in [tmp_path / "photos", tmp_path, *list(tmp_path.parents)[:-2]]:
        folder.chmod(folder.stat().st_mode | 0o055)
    code = "import os, sys; sys.path.insert(0, sys.argv[1]); from image_files import list_images; "
    code += "os.seteuid(65534); list_images(sys.argv[2])"
    argv = [sys.executable, "-c", code, ROOT, tmp_path / "photos"]
    done = subprocess.run(argv, capture_output=True, text=True, env=ENV, timeout=600)
    assert "closed can't be read (Permission denied)" in done.stderr


def test_an_official_folder_of_faces_that_cannot_be_read(tmp_path, monkeypatch):
    from data import FfhqFiles

    (tmp_path / "00000").mkdir()
    failing_scandir(monkeypatch, tmp_path / "00000", 5)
    with pytest.raises(UserError, match="00000 can't be read"):
        FfhqFiles(tmp_path).missing()


def test_what_is_left_out_is_listed_by_suffix(tmp_path, capsys):
    root = tmp_path / "photos"
    (root / "sub").mkdir(parents=True)
    for i in range(4):
        RGB.save(root / "sub" / f"{i}.png")
    RGB.save(root / "4.gif")
    for i in range(20):
        (root / f"{i}.txt").touch()
    for i in range(6):
        (root / "sub" / f"Thumbs{i}.DB").touch()
    (root / "LICENSE").touch()
    (root / "link").symlink_to("sub")
    (root / ".hidden.png").touch()
    os.mkfifo(root / "x.png")
    (root / "loop.png").symlink_to("loop.png")  # leads to itself: it is listed, and can't be read
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(root)  # the name of a socket may not be long
        server.bind("y.jpg")
        os.chdir(ROOT)
        names, _ = list_images(root)
        assert names == ["4.gif", "loop.png", *(f"sub/{i}.png" for i in range(4))]
        H = own_H(root, 8, bad_images="skip")
        assert sum(map(len, open_all(H))) == 5
        printed = capsys.readouterr().out
        assert "left out: 30 other files: 20 .txt, 6 .db, " in printed
        for words in ("1 without a suffix", "1 links to folders", "1 x.png, a FIFO",
                      "1 y.jpg, a socket"):  # fmt: skip
            assert words in printed
        assert files_to_npy(root / "sub", tmp_path / "out.npy") == (4, 32, 32, 3)
        assert "left out: 6 other files: 6 .db" in capsys.readouterr().out
        with pytest.raises(UserError, match="x.png is a FIFO"):
            read_image(root / "x.png", 8)


def test_packing_counts_what_it_did_not_simply_read(tmp_path, capsys):
    root = tmp_path / "photos"
    root.mkdir()
    for i in range(4):
        RGB.save(root / f"a{i}.bmp")
    for i in range(3):
        (root / f"b{i}.png").write_bytes(deep_png(np.full((16, 16, 3), 257 * (40 + i))))
    clear = Image.new("RGBA", (16, 16), (9, 9, 9, 0))
    for i in range(2):
        clear.save(root / f"c{i}.png")
    clear.save(
        root / "d.gif", save_all=True, append_images=[clear.rotate(90), RGB.resize((16, 16))]
    )
    H = own_H(root, 16)
    parts = open_all(H)
    array = parts[0].array[np.arange(10)]
    assert (array[4:7] == np.arange(40, 43)[:, None, None, None]).all()
    assert (array[7:] == 255).all()
    printed = capsys.readouterr().out
    for words in ("packed 10 images", "3 of 9 to 16 bits a channel, divided to 8",
                  "3 with transparency, laid on #ffffff", "1 of several frames"):  # fmt: skip
        assert words in printed
    # Each background is an array of its own, beside which the other stays.
    black = open_all(own_H(root, 16, background="#0a0b0c"))
    assert (black[0].array[np.arange(7, 10)] == (10, 11, 12)).all()
    assert (parts[0].array[np.arange(7, 10)] == 255).all()
    capsys.readouterr()
    open_all(own_H(root, 16))
    open_all(own_H(root, 16, background="#0A0B0C".lower()))
    assert capsys.readouterr().out == ""


def test_a_git_lfs_pointer_among_pictures(tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"
    (tmp_path / "a.png").write_bytes(pointer)
    with pytest.raises(UserError, match="git-lfs pointer.*git lfs pull"):
        read_image(tmp_path / "a.png", 8)


def test_names_with_a_dot_in_a_tar_are_passed_over_as_in_a_folder(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("./v/1.png", "./v/._1.png", "__MACOSX/v/._1.png", ".git/2.png", "v/2.PNG"):
            data = b"no picture" if "._" in name or ".git" in name else saved(RGB, "PNG")
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    assert files_to_npy(tmp_path / "a.tar", tmp_path / "out.npy") == (2, 32, 32, 3)
