"""What a run needs of the file system of its folder, tried before it is needed."""

import contextlib
import errno
import os
import shutil
from pathlib import Path

from errors import UNREACHABLE, UserError
from files import fsync

# No trait of a file system, but its state: there may be room, or rights, another time.
STATE = {
    getattr(errno, name)
    for name in "ENOSPC EDQUOT EFBIG EROFS EIO ENOMEM EMFILE ENFILE EINTR".split()
} | UNREACHABLE
REMEDY = "choose a folder on another one with --save_dir, such as a local disk"


def refusal(folder, what, error, remedy=REMEDY):
    """The UserError of a file system that refuses what a run needs."""
    return UserError(
        f"{folder}: its file system refuses to {what} ({error.strerror or error}), which a run "
        f"needs: {remedy}"
    )


def _hold(fact):
    """Raises OSError where a call has done nothing, or something else than it says."""
    if not fact:
        raise OSError(errno.EINVAL, "it did not happen")


def _append(path):
    for _ in range(2):
        with open(path, "ab+") as file:
            file.write(b"a line\n")
    _hold(path.read_bytes() == 2 * b"a line\n")


def _rename_folder(old, new):
    os.rename(old, new)
    _hold((new / "file").exists() and not old.exists())


def _replace_file(path):
    new = path.with_name("new")
    new.write_bytes(b"new")
    os.replace(new, path)
    _hold(path.read_bytes() == b"new" and not new.exists())


def _link(trial):
    os.symlink("folder", trial / "link")
    os.symlink(os.path.join("link", "file"), trial / "name")
    _hold((trial / "name").is_symlink() and (trial / "name").read_bytes() == b"new")


def _replace_link(trial):
    os.symlink("elsewhere", trial / "new")
    os.replace(trial / "new", trial / "link")
    _hold(os.readlink(trial / "link") == "elsewhere")


def _remove(trial):
    shutil.rmtree(trial)
    _hold(not trial.exists())


def try_file_system(folder):
    """Does once, in a folder that is removed again, all that the saves of a run are made of.

    Raises:
        UserError: naming what the file system refuses.
        OSError: where the folder can't be written for want of room or rights.
    """
    trial = Path(folder, f"trial-{os.getpid()}.partial")
    shutil.rmtree(trial, ignore_errors=True)
    old, new = trial / "old", trial / "folder"
    os.makedirs(old)
    try:
        for what, act in (
            ("append to a file", lambda: _append(old / "file")),
            ("write a file to the disk (fsync)", lambda: fsync(old / "file")),
            ("tell that the names in a folder are on the disk (fsync)", lambda: fsync(old)),
            ("rename a folder", lambda: _rename_folder(old, new)),
            ("rename a file over another", lambda: _replace_file(new / "file")),
            ("make symbolic links", lambda: _link(trial)),
            ("rename a symbolic link over another", lambda: _replace_link(trial)),
            ("remove files and folders", lambda: _remove(trial)),
        ):
            try:
                act()
            except OSError as error:
                if error.errno in STATE:
                    raise
                raise refusal(folder, what, error) from None
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(trial)
