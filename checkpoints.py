"""The checkpoint files of a run: written whole, named all at once, repaired after a kill.

A checkpoint is what one save writes: a folder sets/SERIAL-PREFIX, numbered in the order of writing,
which gets that name when all of it is on the disk. PREFIX-model.th and its other names are links
through the one link sets/PREFIX, so that they all change from one to the next in the same instant.
sets/*.partial is what a kill has left of one; the next start removes it.
"""

import json
import os
import platform
import re
import shutil
from pathlib import Path

import torch

from files import fsync, sha256

FILE_NAMES = ("model.th", "model-ema.th", "opt.th", "log.jsonl", "state.json")

# Of H, what state.json records elsewhere or not at all.
NOT_RECORDED = ("resumed", "image_record", "progress")

# ---- folders -------------------------------------------------------------------------------


def _link(path, target):
    """Makes path a symbolic link to target, in one step whatever was there."""
    if os.path.islink(path) and os.readlink(path) == target:
        return
    partial = f"{path}.partial"
    Path(partial).unlink(missing_ok=True)
    try:
        os.symlink(target, partial)
        os.replace(partial, path)
    finally:
        Path(partial).unlink(missing_ok=True)


def complete_checkpoints(folder, prefix=".+"):
    """The complete checkpoints in a run's folder, newest first: [(serial, prefix, path)]."""
    found = []
    if os.path.isdir(os.path.join(folder, "sets")):
        for name in os.listdir(os.path.join(folder, "sets")):
            match = re.fullmatch(rf"(\d+)-({prefix})(?<!\.partial)", name)
            if match and not os.path.islink(os.path.join(folder, "sets", name)):
                found.append((int(match[1]), match[2], os.path.join(folder, "sets", name)))
    return sorted(found, reverse=True)


def _make_checkpoint(folder, prefix, fill):
    """Makes a checkpoint: fill(partial folder) writes its files.

    Raises:
        OSError: if that fails; nothing of it is left.
    """
    sets = os.path.join(folder, "sets")
    os.makedirs(sets, exist_ok=True)
    serial = 1 + max((serial for serial, _, _ in complete_checkpoints(folder)), default=0)
    path = os.path.join(sets, f"{serial:06}-{prefix}")
    partial = f"{path}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # of a save that could not even clean up
    try:
        os.mkdir(partial)
        fill(partial)
        for name in os.listdir(partial):
            fsync(os.path.join(partial, name))
        fsync(partial)
        os.rename(partial, path)
    except RuntimeError as error:
        # torch.save meets a full disk with an error of its own.
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    fsync(sets)


def _name_newest(folder, prefix):
    """Makes PREFIX-* the names of the newest complete one; `latest` keeps the one before it."""
    (_, _, newest), *older = complete_checkpoints(folder, re.escape(prefix))

    def name_files(also_plain):
        for name in os.listdir(newest):
            path = os.path.join(folder, f"{prefix}-{name}")
            if also_plain or not os.path.lexists(path):
                _link(path, os.path.join("sets", prefix, name))

    name_files(also_plain=False)
    _link(os.path.join(folder, "sets", prefix), os.path.basename(newest))  # the instant
    name_files(also_plain=True)
    fsync(os.path.join(folder, "sets"))
    fsync(folder)
    for _, _, path in older[1 if prefix == "latest" else 0 :]:
        _remove_checkpoint(path)


def _import_plain_files(folder, prefix):
    """Makes a checkpoint of another program's files under our names, so that none is lost."""
    paths = {name: os.path.join(folder, f"{prefix}-{name}") for name in FILE_NAMES}
    paths = {name: path for name, path in paths.items() if os.path.exists(path)}

    def fill(partial):
        for name, path in paths.items():
            # An import that was interrupted has made links of some of them.
            os.link(os.path.realpath(path), os.path.join(partial, name))

    if not all(map(os.path.islink, paths.values())):
        _make_checkpoint(folder, prefix, fill)
        _name_newest(folder, prefix)


def _remove_checkpoint(path):
    os.rename(path, f"{path}.partial")  # no kill leaves half of one that counts as complete
    # NFS keeps files that another process reads; the next start removes what is left.
    shutil.rmtree(f"{path}.partial", ignore_errors=True)


def remove_old_checkpoints(folder, keep):
    """Removes the checkpoints iter-N but for the newest `keep`, and their names."""
    for _, prefix, path in complete_checkpoints(folder, r"iter-\d+")[keep:]:
        _remove_checkpoint(path)
        for name in FILE_NAMES:
            Path(folder, f"{prefix}-{name}").unlink(missing_ok=True)
        Path(folder, "sets", prefix).unlink(missing_ok=True)


def repair_checkpoints(folder):
    """Ends what a kill has interrupted: half a checkpoint goes, a complete one gets its names."""
    folder, sets = Path(folder), Path(folder, "sets")
    for path in sets.glob("*.partial"):
        path.unlink() if path.is_symlink() else shutil.rmtree(path)
    for prefix in {prefix for _, prefix, _ in complete_checkpoints(folder)}:
        _import_plain_files(folder, prefix)
        _name_newest(folder, prefix)
    for path in [*folder.glob("*"), *sets.glob("*")]:
        if path.is_symlink() and not path.exists():
            if path.parent == sets or path.readlink().parts[:1] == ("sets",):
                path.unlink()
    for path in folder.glob("samples-*.partial"):
        path.unlink()


# ---- a save --------------------------------------------------------------------------------


def write_checkpoint(path, vae, ema_vae, optimizer, H):
    """Writes path-model.th, path-model-ema.th, path-opt.th, path-log.jsonl, path-state.json.

    The last holds H.progress (where the run stands, see resuming.Progress) beside all else that
    defines how it goes on.

    The noise of a step is a function of (seed, rank, step), the order of the images one of (seed,
    epoch): with these numbers in it, no random generator's state is worth keeping.
    """
    folder, prefix = os.path.split(os.path.abspath(path))

    def fill(partial):
        for name, owner in (("model.th", vae), ("model-ema.th", ema_vae), ("opt.th", optimizer)):
            with open(os.path.join(partial, name), "wb") as file:
                torch.save(owner.state_dict(), file)
        log = os.path.join(H.save_dir, "log.jsonl")
        if os.path.exists(log):
            shutil.copyfile(log, os.path.join(partial, "log.jsonl"))
        content = {
            **(getattr(H, "progress", None) or {}),
            "hparams": {k: v for k, v in H.items() if k not in NOT_RECORDED},
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "sha256": {name: sha256(os.path.join(partial, name)) for name in os.listdir(partial)},
        }
        # It is the last file of a checkpoint.
        with open(os.path.join(partial, "state.json"), "w") as file:
            file.write(json.dumps(content, default=str))

    _import_plain_files(folder, prefix)
    _make_checkpoint(folder, prefix, fill)
    _name_newest(folder, prefix)
