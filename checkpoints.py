"""The checkpoint files of a run: written whole, named all at once, repaired after a kill.

A checkpoint is what one save writes: a folder sets/SERIAL-PREFIX, numbered in the order of writing,
which gets that name when all of it is on the disk. PREFIX-model.th and its other names are links
through the one link sets/PREFIX, so that they all change from one to the next in the same instant.
sets/*.partial is what a kill has left of one; the next start removes it. `best` is one of an EMA
and a state.json alone: a run goes on from those that have an opt.th.

A copy that has followed the links holds more: folders sets/PREFIX, plain files PREFIX-*. With a
state.json that vouches for them they are checkpoints too; the next start makes them ordinary ones.
"""

import contextlib
import json
import os
import platform
import re
import shutil
from pathlib import Path

import torch

from errors import UserError, remedy_of
from file_kinds import not_regular
from files import fsync, sha256
from torch_files import contiguous

FILE_NAMES = ("model.th", "model-ema.th", "opt.th", "log.jsonl", "state.json")

_PREFIXES = r"latest|best|iter-\d+"  # of the checkpoints of a run; programs have others

# Of H, what state.json records elsewhere or not at all.
NOT_RECORDED = ("resumed", "image_record", "progress", "given_options", "normalisation", "occupied")

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
            match = re.fullmatch(rf"(\d{{6,}})-({prefix})(?<!\.partial)", name)
            if match and not os.path.islink(os.path.join(folder, "sets", name)):
                found.append((int(match[1]), match[2], os.path.join(folder, "sets", name)))
    return sorted(found, reverse=True)


# ---- whole ones ----------------------------------------------------------------------------


def _state_bytes(stem):
    """What state.json holds, by which a copy of a checkpoint is known; None without one."""
    try:
        return Path(f"{stem}state.json").read_bytes()
    except OSError:
        return None


def read_whole(stem):
    """The content of state.json of a checkpoint all of whose files are what was written.

    stem: what the paths of its files begin with, FOLDER/sets/SERIAL-PREFIX/ or FOLDER/PREFIX-.

    Raises:
        ValueError: naming a file that is missing, cut or another.
    """
    name = "state.json"
    try:
        try:
            state = json.loads(Path(f"{stem}{name}").read_bytes())
            digests = dict(state["sha256"])
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{name} is not what was written") from None
        for name, digest in digests.items():
            if sha256(f"{stem}{name}") != digest:
                raise ValueError(f"{name} is not what was written")
    except FileNotFoundError:
        raise ValueError(f"{name} is missing") from None
    except OSError as error:
        raise ValueError(f"{name} can't be read ({error.strerror})") from None
    return state


def is_whole(stem):
    """Whether read_whole finds nothing wrong."""
    with contextlib.suppress(ValueError):
        return bool(read_whole(stem))
    return False


def _step_of(stem):
    """The step that state.json tells, -1 where it tells none."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return int(json.loads(Path(f"{stem}state.json").read_bytes())["step"])
    return -1


def _copied_folders(folder):
    """Names of ours in sets/ that are folders, where only a copy holds such in place of links."""
    paths = Path(folder, "sets").glob("*")
    real = [path.name for path in paths if path.is_dir() and not path.is_symlink()]
    return sorted(name for name in real if re.fullmatch(_PREFIXES, name))


def _copies(folder):
    """(prefix, stem) of what a copy that followed links holds of checkpoints, with a state.json."""
    for prefix in _copied_folders(folder):
        if os.path.exists(path := os.path.join(folder, "sets", prefix, "state.json")):
            yield prefix, path.removesuffix("state.json")
    for path in sorted(Path(folder).glob("*-state.json")):
        prefix = path.name.removesuffix("-state.json")
        if not path.is_symlink() and re.fullmatch(_PREFIXES, prefix):
            yield prefix, str(path).removesuffix("state.json")


def stems_of_checkpoints(folder):
    """Stems, as of read_whole, of all that may be a checkpoint in a run's folder, newest first.

    A copy stands behind the one that it is a copy of. Of others `latest` is the newest, for so it
    is called; the rest have their place by their step.
    """
    stems = [f"{path}{os.sep}" for _, _, path in complete_checkpoints(folder)]
    for prefix, stem in _copies(folder):
        state, step = _state_bytes(stem), _step_of(stem)
        twins = [i for i, other in enumerate(stems) if _state_bytes(other) == state]
        older = [i for i, other in enumerate(stems) if _step_of(other) < step]
        if twins:
            stems.insert(twins[0] + 1, stem)
        elif prefix == "latest":
            stems.insert(0, stem)
        else:
            stems.insert(min(older, default=len(stems)), stem)
    return stems


# ---- changes -------------------------------------------------------------------------------


def _make_checkpoint(folder, prefix, fill, serial=None):
    """Makes a checkpoint, fill(partial folder) writing its files, and names it.

    serial: its number, by default the next.

    Raises:
        OSError: if that fails; nothing of it is left.
    """
    sets = os.path.join(folder, "sets")
    os.makedirs(sets, exist_ok=True)
    # `best` is numbered by itself: it is none of those that a run could go on from.
    family = "best" if prefix == "best" else "(?!best$).+"
    path = os.path.join(sets, f"{serial or _next_serial(folder, family):06}-{prefix}")
    partial = f"{path}.partial"
    for left in Path(sets).glob("*.partial"):  # by a save that could not even clean up
        shutil.rmtree(left, ignore_errors=True)
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
    try:
        fsync(sets)
        _name_newest(folder, prefix)
    except OSError:
        # Else each save that fails here would leave a whole checkpoint, until the disk is full.
        link = os.path.join(sets, prefix)
        if not (os.path.islink(link) and os.readlink(link) == os.path.basename(path)):
            _remove_checkpoint(path)
        raise


def _next_serial(folder, family=".+"):
    return 1 + max((serial for serial, _, _ in complete_checkpoints(folder, family)), default=0)


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
    try:
        name_files(also_plain=True)
        fsync(os.path.join(folder, "sets"))
        fsync(folder)
    finally:
        for _, _, path in older[1 if prefix == "latest" else 0 :]:
            _remove_checkpoint(path)


def _import_plain_files(folder, prefix):
    """Makes a checkpoint of plain files under our names, so that none is lost.

    They are another program's, or a copy's.
    """
    paths = {name: os.path.join(folder, f"{prefix}-{name}") for name in FILE_NAMES}
    paths = {name: path for name, path in paths.items() if os.path.exists(path)}
    if all(map(os.path.islink, paths.values())):
        return
    is_new, serial = _place_of_copy(folder, prefix, os.path.join(folder, f"{prefix}-"))

    def fill(partial):
        for name, path in paths.items():
            # An import that was interrupted has made links of some of them.
            path, copy = os.path.realpath(path), os.path.join(partial, name)
            try:
                os.link(path, copy)
            except OSError:  # exFAT has no links
                shutil.copyfile(path, copy)

    if is_new:
        _make_checkpoint(folder, prefix, fill, serial)


def _place_of_copy(folder, prefix, stem):
    """(whether files of these paths are no copy of a whole checkpoint of the folder, their serial).

    A damaged one, of which they are a whole copy, is removed: they take its place.
    """
    state, step = _state_bytes(stem), _step_of(stem)
    complete = complete_checkpoints(folder)
    for serial, other, path in complete if state is not None else ():
        if other == prefix and _state_bytes(f"{path}{os.sep}") == state:
            if is_whole(f"{path}{os.sep}") or not is_whole(stem):
                return False, serial
            _remove_checkpoint(path)
            return True, serial
    if prefix == "latest" or step < 0:
        return True, _next_serial(folder)
    others = [(serial, f"{path}{os.sep}") for serial, other, path in complete if other != "best"]
    older = [serial for serial, other in others if _step_of(other) <= step]
    serial = 1 + max(older, default=0)
    taken = os.path.lexists(os.path.join(folder, "sets", f"{serial:06}-{prefix}"))
    return True, _next_serial(folder) if taken else serial


def _import_folder(folder, prefix):
    """Makes a checkpoint of a folder sets/PREFIX, which only a copy holds in place of a link."""
    path = os.path.join(folder, "sets", prefix)
    if os.path.islink(path) or not os.path.isdir(path):
        return
    is_new, serial = _place_of_copy(folder, prefix, f"{path}{os.sep}")
    others = [f"{p}{os.sep}" for _, _, p in complete_checkpoints(folder, re.escape(prefix))]
    if is_new and (is_whole(f"{path}{os.sep}") or not any(map(is_whole, others))):
        os.rename(path, os.path.join(folder, "sets", f"{serial:06}-{prefix}"))
    else:
        _remove_checkpoint(path)


def _remove_checkpoint(path):
    if set(os.listdir(path)) - set(FILE_NAMES):  # something else lies in it: that stays
        kept = os.path.join(os.path.dirname(path), f"kept-{os.path.basename(path)}")
        while os.path.lexists(kept):
            kept += "_"
        os.rename(path, kept)
        for name in FILE_NAMES:
            Path(kept, name).unlink(missing_ok=True)
        return
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


# What a run makes in its folder, beside its lock and the folder `sets`.
_OURS = (
    rf"({_PREFIXES})-(" + "|".join(map(re.escape, FILE_NAMES)) + r")"
    r"|log\.(jsonl|txt)|images\.json|samples-\d+\.png|rates-(\d+|test)\.png"
    r"|events\.out\.tfevents\..+"
)


def holds_run(folder):
    """Whether a run has left something in a folder: a checkpoint, latest-model.th, a step's log.

    Or the best of a run whose large files have been deleted.
    """
    try:
        if complete_checkpoints(folder) or any(_copies(folder)):
            return True
        names = "latest-model.th", "best-model-ema.th"
        if any(os.path.lexists(os.path.join(folder, name)) for name in names):
            return True
        log = os.path.join(folder, "log.jsonl")
        if not_regular(log):  # which flush_log then says
            return False
        with open(log, "rb") as file:
            return any(b'"train_loss"' in line for line in file)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise UserError(
            f"{error.filename} can't be read ({error.strerror}): {remedy_of(error)}, or name "
            f"another folder with --save_dir or --desc"
        ) from None


def remove_run(folder):
    """Removes the files of a run from its folder, all else stays."""
    sets = Path(folder, "sets")
    for _, _, path in complete_checkpoints(folder, _PREFIXES):
        _remove_checkpoint(path)
    for path in list(sets.iterdir()) if sets.is_dir() else ():
        if re.fullmatch(_PREFIXES, path.name):  # a link, or in a copy a folder
            path.unlink() if path.is_symlink() else _remove_checkpoint(path)
    if sets.is_dir() and not any(sets.iterdir()):
        sets.rmdir()
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        ours = re.fullmatch(rf"({_OURS})(\.partial)?", name)
        if ours and (os.path.islink(path) or os.path.isfile(path)):
            os.unlink(path)


def repair_checkpoints(folder):
    """Ends what a kill has interrupted: half a checkpoint goes, a complete one gets its names."""
    folder, sets = Path(folder), Path(folder, "sets")
    ours = "|".join(map(re.escape, FILE_NAMES))
    for path in [*sets.glob("*.partial"), *folder.glob("*.partial")]:
        mine = r"\d{6,}-.+" if path.parent == sets else rf"(.+-({ours})|samples-.*)\.partial"
        if path.is_symlink() or re.fullmatch(mine, path.name):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    copied = dict.fromkeys(_copied_folders(folder), -1)
    for prefix, stem in _copies(folder):
        copied[prefix] = max(copied.get(prefix, -1), _step_of(stem))
    for prefix in sorted(copied, key=lambda p: (copied[p], p)):  # so `latest` is the newest
        _import_folder(folder, prefix)
        _import_plain_files(folder, prefix)
    for prefix in {prefix for _, prefix, _ in complete_checkpoints(folder)}:
        _import_folder(folder, prefix)
        _import_plain_files(folder, prefix)
        _name_newest(folder, prefix)
    for path in [*folder.glob("*"), *sets.glob("*")]:
        if path.is_symlink() and not path.exists():
            if path.parent == sets or path.readlink().parts[:1] == ("sets",):
                path.unlink()


# ---- a save --------------------------------------------------------------------------------


def write_checkpoint(path, vae, ema_vae, optimizer, H):
    """Writes path-model.th, path-model-ema.th, path-opt.th, path-log.jsonl, path-state.json.

    The last holds H.progress (where the run stands, see resuming.Progress) beside all else that
    defines how it goes on. With vae and optimizer None, the EMA and the state are all.

    The noise of a step is a function of (seed, rank, step), the order of the images one of (seed,
    epoch): with these numbers in it, no random generator's state is worth keeping.
    """
    folder, prefix = os.path.split(os.path.abspath(path))

    def fill(partial):
        owners = {"model.th": vae, "model-ema.th": ema_vae, "opt.th": optimizer}
        for name, owner in owners.items():
            if owner is None:
                continue
            with open(os.path.join(partial, name), "wb") as file:
                torch.save(contiguous(owner.state_dict()), file)
        log = os.path.join(H.save_dir, "log.jsonl")
        if os.path.exists(log) and optimizer is not None:
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

    _import_folder(folder, prefix)
    _import_plain_files(folder, prefix)
    _make_checkpoint(folder, prefix, fill)
