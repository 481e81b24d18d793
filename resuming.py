"""Where a run goes on: the newest whole checkpoint of its folder, the last line of a log."""

import contextlib
import json
import math
import os
from collections import deque
from pathlib import Path

from checkpoints import complete_checkpoints
from errors import UserError
from files import sha256
from options import OPTIONS, setting
from processes import from_rank_0
from run_folder import lock_run
from weights import NETWORK


class Progress:
    """Where a run stands: what state.json records of it, as H.progress.

    Attributes:
        step: steps taken. first_step: those taken before the run's first start.
        epoch, position: the epoch, and its images that all ranks together have used.
        skips: skipped updates in a row.
        stats: training_step's dicts of the last steps, which the next log line averages.
    """

    def __init__(self, H, step, epoch):
        resumed = H.resumed or {}
        self.step, self.epoch = step, epoch
        self.first_step = resumed.get("first_step", step)
        self.position, self.skips = resumed.get("position", 0), resumed.get("skips", 0)
        self.stats = deque(resumed.get("stats", ()), maxlen=H.iters_per_print)

    def advance(self, stats, n_images):
        """Counts a step of n_images, of all ranks together."""
        self.stats.append(stats)
        self.step += 1
        self.position += n_images
        self.skips = self.skips + 1 if stats["skipped_updates"] else 0

    def record(self):
        """What state.json holds of it."""
        return vars(self) | {"stats": list(self.stats)}


# What may differ between two starts of a run without a word.
PLACES = {"resume", "test_eval", "save_dir", "logdir", "port", "timeout", "rank", "local_rank"} | {
    name for name, *_ in OPTIONS["restore"]
}


def resume_run(H, logprint):
    """With --resume, makes H restore the newest whole checkpoint of the run's folder, if any.

    H.resumed is that checkpoint's state.json, else None.

    Raises:
        UserError: if the folder is in use, none is whole, or the network is another now.
    """
    if not setting(H, "resume"):
        if not H.test_eval and complete_checkpoints(H.save_dir):
            logprint(f"{H.save_dir} has files of an earlier run; a new one starts (no --resume)")
        return

    def find():
        if not H.test_eval and os.path.isdir(H.save_dir):
            lock_run(H.save_dir)
        return newest_checkpoint(H.save_dir, logprint)

    found = from_rank_0(find)
    if found is None:
        logprint(f"nothing to resume in {H.save_dir}: a new run starts")
        return
    path, H.resumed = found
    logprint(f"resuming from {path}: step {H.resumed['step']}, epoch {H.resumed['epoch']}")
    old = H.resumed["hparams"]
    for key in sorted((old.keys() & H.keys()) - PLACES):
        if old[key] == H[key]:
            continue
        change = f"{key} is {H[key]!r} now; the run had {old[key]!r}"
        if key in NETWORK:
            raise UserError(f"--resume: {change}, and the network depends on it: set it back")
        logprint(f"WARNING: {change}: it goes on, but not bit for bit as without a break")
    H.restore_path = os.path.join(path, "model.th")
    H.restore_ema_path = os.path.join(path, "model-ema.th")
    H.restore_optimizer_path = os.path.join(path, "opt.th")
    H.restore_log_path = None


def newest_checkpoint(folder, logprint):
    """(path, content of state.json) of the newest whole checkpoint; None where there is none.

    Raises:
        UserError: if there are checkpoints, but none is whole.
    """
    damaged = None
    for _, _, path in complete_checkpoints(folder):
        if not os.path.exists(os.path.join(path, "state.json")):
            continue  # another program's files, see checkpoints._import_plain_files
        try:
            state = json.loads(Path(path, "state.json").read_text())
            for name, digest in state["sha256"].items():
                if sha256(os.path.join(path, name)) != digest:
                    raise ValueError(f"{name} is not what was written")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            damaged = f"{path} is damaged ({error})"
            logprint(f"WARNING: {damaged}: an older checkpoint is used")
            continue
        if "step" in state:  # else a program's own, of save_model
            return path, state
    if damaged:
        raise UserError(
            f"--resume: {damaged}, and no older checkpoint is whole: move it away first"
        )
    return None


def read_log(path):
    """(lowest eval elbo or inf, largest step, largest epoch) in a log.jsonl.

    A line that a kill cut short is passed over.

    Raises:
        UserError: for a file that is missing, or holds no `train_loss` line.
    """
    events = []
    try:
        with open(path, "rb") as file:
            for line in file:
                with contextlib.suppress(ValueError, RecursionError):
                    events.append(json.loads(line))
        events = [e for e in events if isinstance(e, dict)]
        evals = [float(e["elbo"]) for e in events if e.get("type") == "eval_loss"]
        trains = [e for e in events if e.get("type") == "train_loss"]
        iterate, epoch = (max(int(e[key]) for e in trains) for key in ("step", "epoch"))
        if min(iterate, epoch) < 0:
            raise ValueError
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror}): check its path") from None
    except (ValueError, KeyError, TypeError, OverflowError):
        raise UserError(
            f"{path} is no log.jsonl with train_loss lines, each a JSON object with step and "
            f"epoch: name a PREFIX-log.jsonl"
        ) from None
    return min(evals, default=math.inf), iterate, epoch
