"""What a file is, as its first bytes tell, for messages on one that is not what was expected."""

import os
import stat
import tarfile
import zipfile

# How files begin: (bytes, what it is).
BEGINNINGS = (
    (b"version https://git-lfs.github.com/spec/", "a git-lfs pointer, not the file itself"),
    (b"\x1f\x8b", "compressed by gzip"),
    (b"BZh", "compressed by bzip2"),
    (b"\xfd7zXZ\x00", "compressed by xz"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"Rar!", "a RAR archive"),
    (b"%PDF-", "a PDF file"),
    (b"\x89PNG\r\n\x1a\n", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"GIF8", "a GIF picture"),
    (b"\x93NUMPY", "an .npy file"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (b"SQLite format 3", "a database"),
    (b"\x7fELF", "a program"),
)
REMEDIES = {
    "a git-lfs pointer, not the file itself": "run `git lfs pull` in its folder",
    "a web page": "fetch the file itself: the address led to a page about it, or to a log-in",
    "compressed by gzip": "unpack it first (gunzip, or tar xzf of a .tar.gz)",
    "compressed by bzip2": "unpack it first (bunzip2)",
    "compressed by xz": "unpack it first (unxz)",
    "compressed by zstd": "unpack it first (unzstd)",
    "a tar archive": "unpack it first (tar xf)",
    "zero bytes and nothing else": "fetch it anew: room for it was made, and it never came",
    "a zip archive without its end": "fetch it anew: it broke off",
    "a 7z archive": "unpack it first",
    "a RAR archive": "unpack it first",
}


def not_regular(path):
    """What a path is that is no regular file, such as "a FIFO"; None for a file, or nothing.

    To open a FIFO, a socket or a device may wait for ever.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return None
    if stat.S_ISDIR(mode):
        return "a folder"
    if stat.S_ISFIFO(mode):
        return "a FIFO"
    if stat.S_ISSOCK(mode):
        return "a socket"
    return None if stat.S_ISREG(mode) else "a device"


def kind_of(head):
    """What the first bytes of a file tell that it is, or None where they tell nothing."""
    if not head:
        return "empty"
    for beginning, kind in BEGINNINGS:
        if head.startswith(beginning):
            return kind
    if not head.strip(b"\0"):
        return "zero bytes and nothing else"
    if head[257:262] == b"ustar":
        return "a tar archive"
    if head[8:10] == b'{"' and int.from_bytes(head[:8], "little") < 2**30:
        return "a safetensors file"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<body", b"<!--")):
        return "a web page"
    if text.startswith((b"{", b"[")) and _is_text(head):
        return "JSON"
    return "text" if _is_text(head) else None


def _is_text(head):
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        if error.start < max(1, len(head) - 3):  # not merely cut within a letter
            return False
        text = head[: error.start].decode()
    return all(c.isprintable() or c in "\n\r\t" for c in text)


def what_file(path):
    """(what a file is, or None where nothing tells it; what to do about it, or None)."""
    if kind := not_regular(path):
        return kind, None
    try:
        with open(path, "rb") as file:
            kind = kind_of(head := file.read(1024))
        if kind is None and zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
            if any(name.endswith(".npy") for name in names):
                kind = "an .npz file"
            elif any(name.endswith("/constants.pkl") for name in names) and any(
                "/code/" in name for name in names
            ):
                kind = "a TorchScript program"
            elif not any(name.endswith("data.pkl") for name in names):
                kind = f"a zip archive of {', '.join(names[:3])}{', ...' * (len(names) > 3)}"
        elif head.startswith(b"PK\3\4"):  # as files of torch.save do
            kind = "a zip archive without its end"
        if kind is None and tarfile.is_tarfile(path):
            kind = "a tar archive"
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError):
        return None, None
    return kind, REMEDIES.get(kind)
