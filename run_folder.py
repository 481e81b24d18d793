"""The folder of a run: named, made, locked, written from the moment that the run begins."""

import fcntl
import functools
import os
import socket

from checkpoints import repair_checkpoints
from errors import UserError
from logs import flush_log
from own_images import keep_image_record
from processes import from_rank_0


def name_save_dirs(H):
    """Sets H.save_dir to the run's folder, save_dir/desc, and H.logdir to its log."""
    H.save_dir = os.path.join(H.save_dir, H.desc)
    H.logdir = os.path.join(H.save_dir, "log")


def make_run_folder(folder):
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UserError(f"--save_dir: {folder} can't be made ({error.strerror})") from None


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
            raise UserError(
                f"{error.filename or H.save_dir} can't be written ({error.strerror}): make room, "
                f"or choose another folder with --save_dir or --desc"
            ) from None

    from_rank_0(begin)


@functools.cache
def lock_run(folder):
    """Keeps a second training run off a folder, to the end of this process, however it ends.

    The lock is the process's own: loader workers that outlive it don't hold it.

    Raises:
        UserError: if another process has the folder.
    """
    make_run_folder(folder)
    path = os.path.join(folder, "lock")
    try:
        file = open(path, "a+")
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
    except BlockingIOError:
        file.seek(0)
        raise UserError(
            f"{folder} is in use by {file.read().strip() or 'another run'}: stop that run first, "
            f"or name another folder with --desc"
        ) from None
    except OSError as error:
        raise UserError(
            f"{path} can't be written or locked ({error.strerror}): make room, or choose another "
            f"folder with --save_dir"
        ) from None
    return file


def begin_training(H):
    """begin_run for training: the folder is this run's alone, what a kill left in it repaired."""

    def prepare():
        lock_run(H.save_dir)
        try:
            repair_checkpoints(H.save_dir)
            keep_image_record(H)
        except OSError as error:
            raise UserError(
                f"{error.filename or H.save_dir} can't be written ({error.strerror}): make room, "
                f"or choose another folder with --save_dir"
            ) from None

    from_rank_0(prepare)
    begin_run(H)
