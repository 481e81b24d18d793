"""Where a run goes on: the newest whole checkpoint of its folder, the last line of a log."""

import contextlib
import json
import math
import os
import re
from collections import deque
from pathlib import Path

from checkpoints import complete_checkpoints, read_whole, stems_of_checkpoints
from errors import UserError
from file_kinds import not_regular
from options import DEFAULTS, OPTIONS, PUBLISHED, setting
from own_images import epoch_begins_anew
from processes import from_rank_0
from run_folder import STARTS, enter_folder, lock_run
from starting import starting_paths
from weights import NETWORK


class Progress:
    """Where a run stands: what state.json records of it, as H.progress.

    Attributes:
        step: steps taken. first_step: those taken before the run's first start.
        epoch, position: the epoch, and its images that all ranks together have used.
        skips: skipped updates in a row.
        best: {elbo, step} of the lowest evaluation so far. stale: evaluations since.
        saved_best: that of the files `best`; a run that went back may have come further before.
        stats: training_step's dicts of the last steps, which the next log line averages.
    """

    def __init__(self, H, step, epoch, lowest=math.inf):
        resumed = H.resumed or {}
        self.step, self.epoch = step, epoch
        self.first_step = resumed.get("first_step", step)
        self.position, self.skips = resumed.get("position", 0), resumed.get("skips", 0)
        self.best = resumed.get("best") or {"elbo": lowest, "step": None}
        self.stale = resumed.get("stale", 0)
        goes_on = H.resumed or setting(H, "resume")
        self.saved_best = saved_best(H.save_dir) if goes_on else self.best["elbo"]
        self.stats = deque(resumed.get("stats", ()), maxlen=H.iters_per_print)

    def advance(self, stats, n_images):
        """Counts a step of n_images, of all ranks together."""
        self.stats.append(stats)
        self.step += 1
        self.position += n_images
        self.skips = self.skips + 1 if stats["skipped_updates"] else 0

    def judge(self, elbo):
        """Counts an evaluation."""
        self.stale += 1
        if elbo < self.best["elbo"]:
            self.best, self.stale = {"elbo": elbo, "step": self.step}, 0

    def record(self):
        """What state.json holds of it."""
        record = vars(self) | {"stats": list(self.stats)}
        del record["saved_best"]
        return record | {"best": self.best if math.isfinite(self.best["elbo"]) else None}


# What may differ between two starts of a run without a word.
PLACES = set(
    "resume test_eval save_dir desc logdir port timeout rank local_rank patience former_options "
    "grow image_digest label label_counts n_told".split()
) | {name for name, *_ in OPTIONS["restore"]}


def find_start(H, logprint):
    """Says what the run starts from, before anything else is read; see also enter_folder.

    With --resume, H restores the newest whole checkpoint of the run's folder, if it has one, and
    nothing that other options name; H.resumed is that checkpoint's state.json, else None. Options
    that the run did not know when it began keep their former meaning, unless they are given.

    Raises:
        UserError: as enter_folder; if the folder is in use, or no checkpoint is whole; for
            --init_from beside --restore_*.
    """
    others = [f"--{name}" for name in STARTS if name != "init_from" and setting(H, name)]
    if setting(H, "init_from") and others:
        raise UserError(
            f"--init_from starts a new training, {others[0]} goes on with one: leave one of the "
            f"two out"
        )
    log = H.restore_log_path
    if log and not setting(H, "resume") and not log.startswith(("http://", "https://")):
        from_rank_0(lambda: read_log(log))  # a wrong one is told before all that takes time
    enter_folder(H, logprint)
    if not setting(H, "resume"):
        return

    def find():
        if not H.test_eval and os.path.isdir(H.save_dir):
            lock_run(H.save_dir)
        newest = newest_checkpoint(H.save_dir, logprint)
        if newest is None and not any(starting_paths(H)):
            if not (H.test_eval or setting(H, "dry_run")):
                refuse_a_lone_best(H.save_dir)
            refuse_half_a_checkpoint(H.save_dir)
        return newest

    found = from_rank_0(find)
    if found is None:
        logprint(f"nothing to resume in {H.save_dir}: a new run starts")
        return
    stem, H.resumed = found
    logprint(f"resuming from {name_of(stem)}: step {H.resumed['step']}, epoch {H.resumed['epoch']}")
    old = H.resumed["hparams"]
    former = DEFAULTS.keys() - PUBLISHED - old.keys() | set(old.get("former_options") or ())
    former -= {*(H.given_options or ()), *(H.taken_options or ())}
    for name in former:
        H[name] = DEFAULTS[name]
    H.former_options = sorted(former)
    H.restore_path = f"{stem}model.th"
    H.restore_ema_path = f"{stem}model-ema.th"
    H.restore_optimizer_path = f"{stem}opt.th"
    H.restore_log_path = H.init_from = None


def resume_run(H, logprint):
    """Holds the options of a resumed run, when all are known, against those it had.

    Raises:
        UserError: if the network is another now.
    """
    old = H.resumed["hparams"] if H.resumed else {}
    for key in sorted((old.keys() & H.keys()) - PLACES):
        if old[key] == H[key]:
            continue
        change = f"{key} is {H[key]!r} now; the run had {old[key]!r}"
        if key in NETWORK:
            raise UserError(f"--resume: {change}, and the network depends on it: set it back")
        logprint(f"WARNING: {change}: it goes on, but not bit for bit as without a break")
    if H.resumed and epoch_begins_anew(H, old):
        H.resumed["position"] = 0
        logprint(f"the images have grown in number: epoch {H.resumed['epoch']} begins anew")


def saved_best(folder):
    """The elbo of the files `best` in a run's folder; inf where there are no whole ones."""
    try:
        return float(json.loads(Path(folder, "best-state.json").read_bytes())["best"]["elbo"])
    except (OSError, ValueError, KeyError, TypeError):
        return math.inf


def newest_checkpoint(folder, logprint):
    """(stem, content of state.json) of the newest whole checkpoint; None where there is none.

    The stem is what the paths of its files begin with, as of checkpoints.read_whole.

    Raises:
        UserError: if there are checkpoints, but none is whole.
    """
    damaged = None
    for stem in stems_of_checkpoints(folder):
        name = name_of(stem)
        if re.fullmatch(r"(\d+-)?best", os.path.basename(stem.rstrip("-/"))):
            continue  # an EMA alone: nothing to go on from
        if not os.path.exists(f"{stem}state.json"):  # or another program's, that we have imported
            logprint(f"WARNING: {name} has no state.json to go on from: an older one is used")
            continue
        try:
            state = read_whole(stem)
        except ValueError as error:
            damaged = f"{name} is damaged ({error})"
            logprint(f"WARNING: {damaged}: an older checkpoint is used")
            continue
        if "step" in state:  # else a program's own, of save_model
            return stem, state
    if damaged:
        raise UserError(
            f"--resume: {damaged}, and no older checkpoint is whole: copy it anew where it is a "
            f"copy, else move it away"
        )
    return None


def name_of(stem):
    """A checkpoint's name in a message."""
    return stem.removesuffix(os.sep) if stem.endswith(os.sep) else f"{stem}*"


def refuse_a_lone_best(folder):
    """Raises UserError for a best-model-ema.th without its state, which is of no run here."""
    if Path(folder, "best-model-ema.th").exists() and not Path(folder, "best-state.json").exists():
        raise UserError(
            f"--resume: {folder} holds best-model-ema.th without best-state.json, which a new run "
            f"would replace, and nothing to go on from: move it away, or name another --desc"
        )


def refuse_half_a_checkpoint(folder):
    """Holds a folder without a checkpoint against what half a copy of one leaves.

    Raises:
        UserError: for files of `latest` or iter-N without the state.json or the weights beside.
    """
    complete = complete_checkpoints(folder, r"latest|iter-\d+")
    stems = {f"{path}{os.sep}" for _, _, path in complete}
    for path in Path(folder).glob("*.th"):
        if match := re.fullmatch(r"((latest|iter-\d+)-)(model|model-ema|opt)\.th", path.name):
            stems.add(os.path.join(folder, match[1]))
    for path in (Path(f"{stem}{name}") for stem in sorted(stems) for name in ESSENTIAL):
        if not path.exists():
            link = path.is_symlink() and f" (a link to {path.readlink()}, which is not there)"
            raise UserError(
                f"--resume: {path} is missing{link or ''}, and no other checkpoint is here: copy "
                f"it too, or name weights to start from with --restore_path"
            )


# Without these files nothing can go on.
ESSENTIAL = ("state.json", "model.th")


def read_log(path):
    """(lowest eval elbo or inf, largest step, largest epoch) in a log.jsonl.

    A line that a kill cut short is passed over.

    Raises:
        UserError: for a file that is missing, or holds no `train_loss` line.
    """
    events = []
    if special := not_regular(path):  # which could wait for ever
        raise UserError(f"{path} is {special}: name a PREFIX-log.jsonl")
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
