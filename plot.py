# PYTHON_ARGCOMPLETE_OK
"""Learning curves of runs as a picture: `python plot.py RUN...`.

    python plot.py saved_models/digits saved_models/photos32 --out curves.png

A RUN is a folder with a log.jsonl, or such a file, of ours or of the original code.
"""

import interrupts  # noqa: F401  the first: a Ctrl-C while the others are imported is one line

# isort: split
import json
import math
import os
import time
from pathlib import Path

import numpy as np

from bounds import nats_to_bits
from endings import run_command
from errors import UserError, one_line, reason_of
from options import OneLineParser
from options import path as path_type
from pictures import draw_curves


def columns(points, names):
    """{name: array} of a list of dicts; only weights_bits_per_dim may lack, and then is NaN."""
    lacking = {"weights_bits_per_dim": math.nan}
    return {name: np.array([(lacking | p)[name] for p in points], dtype=float) for name in names}


def read_log(path):
    """The curves of a log.jsonl, as draw_curves takes them.

    Where a run went back to an earlier step, what it had logged beyond that step is left out. A
    line that a kill cut short, or that a run is still writing, is passed over.

    Raises:
        UserError: for a file that can't be read, or holds no train_loss line.
    """
    train, evals, hparams, start = [], [], {}, None
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise ValueError("it is no file of lines")  # a pipe would be waited for, for ever
        with open(path, encoding="utf-8") as file:
            for line in file:
                try:
                    event = json.loads(line)
                except (json.JSONDecodeError, RecursionError):
                    continue
                start = start or time.mktime(time.strptime(event["time"]))
                if event.get("type") == "hparam":
                    hparams[event["key"]] = event["value"]
                if event.get("type") not in ("train_loss", "eval_loss"):
                    continue
                seconds = time.mktime(time.strptime(event["time"])) - start
                finite = "elbo_filtered" if event["type"] == "train_loss" else "filtered_elbo"
                point = event | {
                    "hours": seconds / 3600,
                    "bits": nats_to_bits(event.get(finite, event["elbo"])),
                }
                if event["type"] == "eval_loss":
                    evals.append(point)
                else:
                    # The original logs a sum alone, over as many steps as there were.
                    window = max(1, min(hparams.get("iters_per_print", math.inf), event["step"]))
                    point.setdefault("skip_rate", event["skipped_updates"] / window)
                    while train and train[-1]["step"] >= event["step"]:
                        train.pop()
                    while evals and evals[-1]["step"] >= event["step"]:
                        evals.pop()
                    train.append(point)
        shared = ("step", "hours", "bits")
        told = {event["labels"] for event in evals if "labels" in event}
        train = columns(train, (*shared, "grad_norm", "skip_rate"))
        evals = columns(evals, (*shared, "weights_bits_per_dim"))
        evals["labels"] = " or ".join(sorted(map(str, told)))
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror}): name a run's folder") from None
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise UserError(
            f"{path} is no log.jsonl of a run ({reason_of(error)}): name another"
        ) from None
    if not len(train["step"]):
        raise UserError(
            f"{path} holds no train_loss line: name the log.jsonl of a run that has logged a step"
        )
    return train, evals


def main():
    parser = OneLineParser(prog="plot.py", description=__doc__.split("\n")[0])
    parser.add_argument(
        "runs", nargs="+", type=path_type, metavar="RUN", help="folder of a run, or a log.jsonl"
    )
    parser.add_argument(
        "--out", type=path_type, default="curves.png", help="picture to write, replaced if there"
    )
    args = parser.parse_args()
    args.out = args.out if Path(args.out).suffix else f"{args.out}.png"  # as matplotlib adds it
    runs = {}
    for run in args.runs:
        path = Path(run, "log.jsonl") if os.path.isdir(run) else Path(run)
        runs[run.rstrip("/")] = read_log(path)
    try:
        draw_curves(args.out, runs)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"--out {args.out} can't be written ({error}): name a .png") from None
    print(one_line(f"{args.out}: {', '.join(runs)}"))


if __name__ == "__main__":
    run_command(main)
