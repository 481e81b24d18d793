"""The picture that `make demo` ends with: digits by their labels, originals, reconstructions."""

import interrupts  # noqa: F401  the first: a Ctrl-C while the others are imported is one line

# isort: split
import os

import numpy as np
import torch

from data import set_up_data
from endings import run_command
from errors import UserError, one_line
from files import replace
from options import OneLineParser
from options import path as path_type
from pictures import labelled_grid
from presets import get_hparams
from synthesis import draw_samples, reconstruct
from weights import load_model

COLUMNS = 16
TEMPERATURE = 0.8

NEXT = """what to try next, in this folder:
    source .venv/bin/activate
    python sample.py --restore_ema_path {weights} samples --label 3,8 --n 32
    python sample.py --restore_ema_path {weights} progressive --label 7
    python plot.py {run}"""


@torch.inference_mode()
def main():
    parser = OneLineParser(prog="demo.py", description=__doc__)
    parser.add_argument("run", type=path_type, help="folder of a run of the preset digits")
    run = parser.parse_args().run
    weights, out = (os.path.join(run, name) for name in ("latest-model-ema.th", "digits.png"))
    model, columns = load_model(weights), range(COLUMNS)
    names = model.H.label_names
    if not names:
        raise UserError(
            f"{run} is of an earlier version, whose digits had no labels: name another folder, as "
            f"in make demo SAVE=runs"
        )
    rows = [
        draw_samples(
            model,
            range(label * COLUMNS, (label + 1) * COLUMNS),
            TEMPERATURE,
            labels=[label] * COLUMNS,
        )
        for label in range(len(names))
    ]
    _, _, test, _ = set_up_data(get_hparams("digits", test_eval=True))
    images, labels = zip(*(test[i] for i in columns), strict=True)
    originals, labels = np.stack(images), torch.stack(labels)
    layers = len(model.decoder.dec_blocks)
    rows += [
        originals,
        reconstruct(model, originals, columns, layers, labels=labels, from_labels=labels),
    ]
    words = [*names, "test images", "reconstructed"]
    title = f"samples by label at t = {TEMPERATURE}; below, what the latents keep of test images"
    picture = labelled_grid(rows, words, title=title)
    replace(out, lambda partial: picture.save(partial, "PNG"))
    print(one_line(f"samples: {out}"))
    print(NEXT.format(weights=weights, run=run))


if __name__ == "__main__":
    run_command(main)
