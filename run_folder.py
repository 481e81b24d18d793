"""The folder of a run: named, made, locked, written from the moment that the run begins."""

import contextlib
import errno
import fcntl
import functools
import os
import socket
from pathlib import Path

from checkpoints import holds_run, remove_run, repair_checkpoints
from errors import UserError, remedy_of
from file_systems import REMEDY, STATE, refusal, try_file_system
from launchers import is_later_attempt
from logs import flush_log
from options import OPTIONS, setting
from own_images import keep_image_record
from processes import from_rank_0


def name_save_dirs(H):
    """Sets H.save_dir to the run's folder, save_dir/desc, and H.logdir to its log."""
    H.save_dir = os.path.join(H.save_dir, H.desc)
    H.logdir = os.path.join(H.save_dir, "log")


def not_written(path, error, done="written"):
    """The UserError for an OSError at a path in the run's folder."""
    reason = error.strerror or error  # as of a stream that can't be sought
    return UserError(
        f"{path} can't be {done} ({reason}): {remedy_of(error)}, or choose another folder with "
        f"--save_dir or --desc"
    )


def make_run_folder(folder):
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise not_written(f"--save_dir: {folder}", error, "made") from None


def enter_folder(H, logprint):
    """Holds what the run is to do against what lies in its folder; H.occupied as refuse_occupied.

    A later attempt of the same job goes on: the run that it finds is its own, else its first
    attempt would have been refused.

    Raises:
        UserError: for --resume beside --overwrite; where that would remove what is to be read.
    """
    if setting(H, "overwrite") and setting(H, "resume"):
        raise UserError("--overwrite starts anew, --resume goes on: leave one of the two out")
    if H.test_eval:
        H.overwrite = False
        return
    there = next(filter(os.path.lexists, (H.save_dir, *Path(H.save_dir).parents)), ".")
    if not os.path.isdir(there):  # told before anything is computed
        error = NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        raise not_written(f"--save_dir: {H.save_dir}", error, "made")
    named = {name: setting(H, name) for name in STARTS if setting(H, name)}
    here = {name: path for name, path in named.items() if _lies_in(path, H.save_dir)}
    if setting(H, "overwrite") and here:
        name, path = next(iter(here.items()))
        raise UserError(
            f"--overwrite would remove what --{name} {path} names: name another folder with --desc"
        )
    if setting(H, "resume") or not from_rank_0(lambda: holds_run(H.save_dir)):
        return
    if is_later_attempt(os.environ) and not here:
        logprint("a later attempt of the same job: it goes on with what it has, as --resume")
        H.resume, H.overwrite = True, False
    elif not (setting(H, "overwrite") or here.keys() - {"init_from"} or setting(H, "dry_run")):
        H.occupied = True


def refuse_occupied(H):
    """Refuses a run into the folder of another, where nothing says what becomes of that one.

    Raises:
        UserError: if enter_folder has found it so.
    """
    if not H.occupied:
        return
    if owner := from_rank_0(lambda: owner_of(H.save_dir)):
        raise _InUse(H.save_dir, owner)
    raise UserError(
        f"{H.save_dir} holds a run: add --resume to go on with it, or --overwrite to remove it "
        f"and start anew, or name another folder with --desc"
    )


# The options that name files to start from.
STARTS = [name for name, kind, *_ in OPTIONS["restore"] if kind is not bool]


def _lies_in(path, folder):
    """Whether a file, or the folder of it that a name stands for, lies in a folder."""
    path, folder = os.path.realpath(path), os.path.realpath(folder)
    return os.path.commonpath([path, folder]) == folder


def begin_run(H):
    """Makes the run's folder and begins to write its log; from now on the run leaves traces.

    Raises:
        UserError: if the folder can't be made or written.
    """

    def begin():
        make_run_folder(H.save_dir)
        try:
            flush_log()
        except OSError as error:
            raise not_written(error.filename or H.save_dir, error) from None

    from_rank_0(begin)


class _InUse(UserError):
    """Another process has the folder."""

    def __init__(self, folder, owner):
        super().__init__(
            f"{folder} holds a run and is in use by {owner}: stop that run first, or name another "
            f"folder with --desc"
        )


def owner_of(folder):
    """Who has locked a run's folder, in words; None where no one has. It writes nothing."""
    try:
        with open(os.path.join(folder, "lock"), "rb+", buffering=0) as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                return _owner(file) if error.errno in (errno.EAGAIN, errno.EACCES) else None
    except OSError:  # none was ever there, or it is not ours to lock
        pass
    return None


def _owner(file):
    file.seek(0)
    return file.read().decode(errors="replace").strip() or "another run"


@functools.cache
def lock_run(folder):
    """Keeps a second training run off a folder, to the end of this process, however it ends.

    The lock is the process's own: loader workers that outlive it don't hold it. What else a run
    needs of the file system is tried here; where that is refused, nothing is left behind.

    Raises:
        UserError: if another process has the folder, or it can't be written as a run needs it.
    """
    path = os.path.join(folder, "lock")
    new = [p for p in (path, folder, *Path(folder).parents) if not os.path.lexists(p)]
    try:
        make_run_folder(folder)
        return _lock(folder, path)
    except _InUse:
        raise
    except UserError:
        for made in new:
            with contextlib.suppress(OSError):
                os.unlink(made) if made == path else os.rmdir(made)
        raise


def _lock(folder, path):
    """The file of lock_run, open and locked."""
    try:
        file = open(path, "ab+", buffering=0)
    except OSError as error:
        raise not_written(path, error, "written or locked") from None
    with contextlib.ExitStack() as stack:
        stack.enter_context(file)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise _InUse(folder, _owner(file)) from None
            if error.errno in STATE:
                raise not_written(path, error, "locked") from None
            remedy = f"{REMEDY}, or have this one mounted with locks (Lustre: -o flock)"
            raise refusal(folder, "lock a file", error, remedy) from None
        try:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            try_file_system(folder)
        except OSError as error:
            raise not_written(folder, error) from None
        stack.pop_all()
    return file


def begin_training(H):
    """begin_run for training: the folder is this run's alone, what a kill left in it repaired.

    With --overwrite, what an earlier run has left in it is removed.
    """

    def prepare():
        lock_run(H.save_dir)
        try:
            if setting(H, "overwrite"):
                remove_run(H.save_dir)
            repair_checkpoints(H.save_dir)
            keep_image_record(H)
        except OSError as error:
            raise not_written(error.filename or H.save_dir, error) from None

    from_rank_0(prepare)
    begin_run(H)
