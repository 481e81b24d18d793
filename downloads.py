"""Files from an address: fetched once, kept under a name that tells of which address they are."""

import contextlib
import filecmp
import hashlib
import json
import os
import shutil
import sys
import urllib.error
import urllib.request
from pathlib import Path

from errors import UserError, one_line, reason_of
from file_kinds import what_file
from files import read_json, replace
from logs import print_line
from safetensors_files import read_tensors

SILENCE_S = 60  # seconds without a byte after which a server is given up


def maybe_download(path, filename=None):
    """A local path for `path`: itself, or for an http(s) URL the file it is fetched to, once.

    That is `filename`, else the address's last part in the current folder, as programs expect.
    Which address a file is of stands beside it, in FILE.address: where another's has the name
    already, the file goes to DIGEST-FILE, with 8 digits of the address's sha256. Only what opens is
    kept.

    Raises:
        UserError: if the URL can't be fetched, or leads to something else than a file of its kind.
    """
    if not path.startswith(("http://", "https://")):
        return path
    filename = filename or os.path.basename(path)
    if filename in ("", ".", ".."):
        raise UserError(f"{path} is the address of a folder: name a file in it")
    if _is_of(filename, path):
        return filename
    folder, name = os.path.split(filename)
    own_name = os.path.join(folder, f"{hashlib.sha256(path.encode()).hexdigest()[:8]}-{name}")
    if _is_of(own_name, path):
        return own_name
    partial = f"{filename}.part{os.getpid()}"
    try:
        try:
            _fetch(path, partial)
        except ConnectionError as error:
            if os.path.exists(filename) and not _address(filename):
                print_line(
                    f"WARNING: {path} can't be reached ({error}): {filename}, which is there and "
                    f"may be of another address, is taken for it",
                    sys.stderr,
                )
                return filename
            raise UserError(
                f"{path} can't be fetched ({error}): check the address, or download it by hand"
            ) from None
        _check_opens(path, name, partial)
        # Nobody knows of what address it is, or another process has just fetched it.
        same = os.path.isfile(filename) and _address(filename) in (None, path)
        if not os.path.lexists(filename):
            os.replace(partial, filename)
        elif same and filecmp.cmp(partial, filename, shallow=False):
            pass
        else:
            if os.path.lexists(own_name) and not filecmp.cmp(partial, own_name, shallow=False):
                raise UserError(f"{own_name} is not what {path} sends any more: move it away")
            print_line(one_line(f"{filename} is of another address: {path} goes to {own_name}"))
            filename = own_name
            os.replace(partial, filename)
        keep_address(filename, path)
    except OSError as error:
        raise UserError(
            f"{filename} can't be written ({error.strerror}): start in a folder with room, or "
            f"download {path} by hand"
        ) from None
    finally:
        Path(partial).unlink(missing_ok=True)
    return filename


def keep_address(filename, path):
    """Notes beside a file which address it is of."""
    note = {"address": path, **_state(filename)}
    replace(f"{filename}.address", lambda p: p.write_text(json.dumps(note)))


def _state(path):
    """What changes where a file is replaced."""
    found = os.stat(path)
    return {"bytes": found.st_size, "mtime_ns": found.st_mtime_ns}


def _address(filename):
    """The address that a file is known to be of, or None."""
    try:
        note = read_json(f"{filename}.address") or {}
        same = all(note.get(key) == value for key, value in _state(filename).items())
    except (OSError, UserError):
        return None
    return note.get("address") if same else None


def _is_of(filename, path):
    return os.path.isfile(filename) and _address(filename) == path


def _fetch(path, partial):
    """Writes what an address sends to a file.

    Raises:
        UserError: if the server refuses.
        ConnectionError: if it can't be reached, breaks off, or sends what is no HTTP.
        OSError: if the file can't be written.
    """
    try:
        with _naming_failures():
            answer = urllib.request.urlopen(path, timeout=SILENCE_S)
        with answer, open(partial, "wb") as file:
            shutil.copyfileobj(_Reader(answer), file, 1 << 20)
            length = answer.headers.get("Content-Length") or ""
            if length.isdecimal() and int(length) != file.tell():
                raise _Broken(f"it broke off after {file.tell():,} of {int(length):,} bytes")
    except urllib.error.HTTPError as error:
        remedy = "check the address" if error.code < 500 else "try again later"
        raise UserError(f"{path} can't be fetched ({error}): {remedy}") from None
    except _Broken as error:
        raise ConnectionError(str(error)) from None


class _Broken(Exception):
    """The address, its server or what that sends has failed: no error of the file written to."""


@contextlib.contextmanager
def _naming_failures():
    """Makes _Broken of whatever an address and its server bring about.

    Of which there is no list: OSError, HTTPException, ValueError, LookupError, UnicodeError...
    """
    try:
        yield
    except urllib.error.HTTPError:  # the server's word
        raise
    except Exception as error:
        raise _Broken(reason_of(error)) from None


class _Reader:
    """An answer whose errors are _Broken."""

    def __init__(self, answer):
        self.answer = answer

    def read(self, n):
        with _naming_failures():
            return self.answer.read(n)


def _check_opens(path, name, partial):
    """Holds what was fetched against the kind of file that its name tells."""
    kind, _ = what_file(partial)
    if name.endswith((".th", ".safetensors")):
        try:
            read_tensors(partial)
        except UserError as error:
            reason = str(error).replace(partial, "what it sends")
            raise UserError(f"{path}: {reason} (nothing is kept)") from None
    elif kind in ("a web page", "a git-lfs pointer, not the file itself", "empty"):
        raise UserError(f"{path} leads to no file: it is {kind}; check the address")
