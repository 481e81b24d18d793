"""What stands beside weights of the run that wrote them: its hyperparameters, its mean and std."""

import json
import os
import re
from pathlib import Path
from typing import NamedTuple

from errors import UserError, reason_of
from image_sets import IMAGE_SETS
from options import Hyperparams
from own_images import place_of_record, read_record
from presets import preset_of
from safetensors_files import hparams_in, metadata_of


def state_beside(path):
    """(PREFIX-state.json, the hyperparameters in it) of weights, or None where there is none.

    It stands beside PREFIX-model.th and PREFIX-model-ema.th, or beside the file that `path` is a
    link to. A file of safetensors may tell them itself; it is its own state.json then.

    Raises:
        UserError: if it is damaged.
    """
    try:
        if (content := metadata_of(path)) is not None:
            return Path(path), Hyperparams(hparams_in(content))
    except UserError:
        raise
    except Exception as error:  # as below
        raise no_network(path, path, error) from None
    for place in (Path(path), Path(os.path.realpath(path))):
        name, ours = re.subn(r"(^|-)model(-ema)?\.th$", r"\1state.json", place.name)
        state = place.with_name(name)
        if ours and state.exists():
            break
    else:
        return None
    try:
        return state, Hyperparams(json.loads(state.read_bytes())["hparams"])
    except Exception as error:  # a damaged file raises nearly anything
        raise no_network(state, path, error) from None


def no_network(state, path, error):
    """The UserError for a state.json that does not tell what it should of the weights `path`."""
    if str(state) == str(path):
        return UserError(
            f"{path} has metadata that tell no network ({reason_of(error)}): export its model anew"
        )
    return UserError(
        f"{state} does not tell the network of {path} ({reason_of(error)}): name its preset "
        f"(--hps) and the other options of the network it was trained with, or move "
        f"{state.name} away"
    )


class Normalisation(NamedTuple):
    """input = (level - mean) / std, in levels of 0 to 255; `source` says where they stand."""

    mean: float
    std: float
    source: str


def published_normalisation(dataset):
    """The Normalisation of a published data set; None of own images."""
    facts = IMAGE_SETS.get(dataset)
    if not facts or facts.mean is None:
        return None
    return Normalisation(facts.mean, facts.std, f"the facts of {dataset}")


def normalisation_of(path, shapes=None, named=False):
    """What the weights in the file `path` were trained with, or None where nothing tells it.

    The first of: images.json beside the file, or beside the one that it is a link to; what the run
    that wrote them has recorded; the facts of the data set that they were trained on, as that run
    or else the preset that they are tells.

    Args:
        shapes: a function that gives presets.shapes_of the weights, called where it is needed;
            None: facts of a data set don't count.
        named: whether the user has named the network, as the remedy for a damaged state.json.

    Raises:
        UserError: for a damaged images.json, or state.json unless `named`.
    """
    for place in dict.fromkeys((str(path), os.path.realpath(path))):
        if record := read_record(place, {"mean", "std"}):
            return Normalisation(record["mean"], record["std"], str(place_of_record(place)))
    try:
        state, H = state_beside(path) or (None, None)
    except UserError:
        if not named:
            raise
        state, H = None, None
    if H and None not in (H.image_mean, H.image_std):
        return Normalisation(H.image_mean, H.image_std, str(state))
    if not shapes:
        return None
    if known := published_normalisation(H.dataset) if H else None:
        return known._replace(source=f"{known.source}, as {state} tells")
    H = preset_of(shapes())
    if known := published_normalisation(H.dataset) if H else None:
        return known._replace(source=f"{known.source}, of whose preset {path} is")
    return None
