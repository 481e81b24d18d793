"""One file to share of a model: its weights, with all that a user of them would ask for beside.

That is the network, what it is fed, the names of its labels, the record of its own images, the
figures of its last evaluation. docs/library.md lists the keys.
"""

import contextlib
import json
import math
import os
from pathlib import Path

from errors import one_line
from files import replace
from image_sets import channels_of
from labels import labels_of
from outputs import check_free, check_room, writing
from own_images import read_record
from records import published_normalisation, state_beside
from safetensors_files import metadata_of, write_safetensors
from weights import NETWORK, weights_hash

# ---- figures -------------------------------------------------------------------------------

FIGURES = "elbo distortion rate bits_per_dim iw_elbo iw_bits_per_dim".split()


def _events(path):
    """The lines of a log.jsonl that are JSON objects; none where there is no such file."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        for line in file:
            with contextlib.suppress(ValueError, RecursionError):
                event = json.loads(line)
                if isinstance(event, dict):
                    yield event


def _figures_in(event, split, step):
    """What an evaluation's line tells; what it does not is None."""
    found = {"split": split, "step": event.get("step", step), "labels": event.get("labels")}
    found["n_images"] = event.get("n_images")
    for name in FIGURES:
        value = event.get(name)
        finite = isinstance(value, int | float) and math.isfinite(value)
        found[name] = value if finite else None
    return found


def figures_of(path, weights):
    """{validation, test: the figures of the last evaluation of weights in the file, or None}.

    That on the validation set is the last in their run's log up to their step, of an EMA alone,
    for it is what is evaluated. That on the test set is the last that names them, by
    weights.weights_hash, in the log beside them.
    """
    path, step = Path(path), None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        step = json.loads(state_beside(path)[0].read_bytes())["step"]
    own = path.with_name(path.name.rpartition("model")[0] + "log.jsonl")
    figures = {"validation": None, "test": None}
    is_average = path.name.endswith(("model-ema.th", "model-ema.safetensors"))
    whole = own if own.exists() or step is None else path.with_name("log.jsonl")
    for event in _events(whole) if is_average else ():
        at = event.get("step", 0)
        if event.get("type") != "eval_loss" or not isinstance(at, int):
            continue
        if step is None or at <= step:
            figures["validation"] = _figures_in(event, "validation", step)
    for event in _events(path.with_name("log.jsonl")):
        if event.get("type") == "test_loss" and event.get("weights") == weights:
            figures["test"] = _figures_in(event, "test", step)
    return figures


# ---- the file ------------------------------------------------------------------------------


def content_of(model, path, with_names=False):
    """What a file to share tells of a model beside its weights, which are in the file `path`.

    with_names: also the names of its own images' files.
    """
    H, before = model.H, metadata_of(path)
    mean, std = H.image_mean, H.image_std
    if (known := published_normalisation(H.dataset)) and None in (mean, std):
        mean, std = known[:2]
    record = None
    if H.dataset == "images":
        places = dict.fromkeys((str(path), os.path.realpath(path)))
        record = next(filter(None, (read_record(place, set()) for place in places)), None)
    if record and not with_names:
        record = {key: value for key, value in record.items() if key != "files"}
    # Of labels also what tells how often each was trained on, and whether none ever was.
    of_labels = {"label_counts", "label_dropout"} if labels_of(H) else set()
    names = (NETWORK | of_labels) - {"image_size", "image_channels", "label_names"}
    return {
        "preset": H.hparam_sets,
        "hparams": {key: H[key] for key in sorted(names) if H.get(key) is not None},
        "image_size": H.image_size,
        "image_channels": channels_of(H),
        "mean": mean,
        "std": std,
        "background": H.background,
        "label_names": H.label_names or None,
        "images": record,
        "figures": before.get("figures") if before else figures_of(path, weights_hash(model)),
    }


def write_model(args, model):
    """Writes what args names as args.out.

    Raises:
        UserError: if it exists, or can't be written.
    """
    content = content_of(model, args.restore_ema_path, args.with_names)
    state = model.state_dict()
    n = sum(t.numel() for t in state.values())
    with writing(args):
        check_free(args)
        check_room(args, 4 * n)
        replace(args.out, lambda path: write_safetensors(path, state, content))
    known = [name for name, figures in (content["figures"] or {}).items() if figures]
    print(
        one_line(
            f"{args.out}: {n:,} parameters of {content['preset']}; figures: "
            f"{', '.join(known) or 'none'}; record of images: "
            f"{'none' if content['images'] is None else 'yes'}"
        )
    )
