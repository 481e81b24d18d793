"""Files that are whole or not there: written beside their place, then renamed."""

import errno
import hashlib
import json
import os
import stat
from pathlib import Path

from errors import UserError
from file_kinds import not_regular

# What file systems answer that know no fsync of a folder: network drives, and some in user space.
NO_SUCH_CALL = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF}


def fsync(path):
    """Waits until a file, or a folder's list of names where that can be asked, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_SUCH_CALL or not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from None
    finally:
        os.close(descriptor)


def replace(path, write, durable=False):
    """Writes a file through write(temporary Path): `path` is the old one or the new one, whole.

    durable: what was written is on the disk before the name changes.
    """
    partial = Path(f"{path}.partial")
    try:
        write(partial)
        if durable:
            fsync(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path, content):
    """Writes a JSON file."""
    replace(path, lambda partial: partial.write_text(json.dumps(content, indent=1)))


def read_json(path, remedy="delete it to have it made anew"):
    """What a JSON file holds, or None where there is none.

    remedy: what a user can do about one that can't be read.

    Raises:
        UserError: for a file that is no JSON object.
    """
    try:
        if special := not_regular(path):
            raise ValueError(f"it is {special}")
        content = json.loads(Path(path).read_bytes())
        if not isinstance(content, dict):
            raise ValueError("no JSON object")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read ({error}): {remedy}") from None
    return content


def sha256(path):
    """The sha256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
