"""Weights: from a .th file to the tensors of a known network."""

import json
import os
import re
import warnings
from pathlib import Path

import torch

from errors import UserError, reason_of
from image_sets import IMAGE_SETS
from launchers import resolve_device
from options import OPTIONS, Hyperparams
from own_images import read_record
from presets import get_hparams, preset_of, shapes_of
from utils import maybe_download
from vae import VAE


def read_torch_file(path):
    """What torch.save wrote, on the CPU: tensors and plain containers, nothing that runs code.

    Raises:
        UserError: for a file that is missing, truncated, foreign or holds other objects.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # of old or odd formats: it reads, or not
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: check the path of the --restore option") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder: name the .th file in it") from None
    except Exception as error:  # a damaged file raises nearly anything
        reason = reason_of(error)
        if "weights_only" in str(error).lower().replace(" ", "_"):
            reason = "it holds objects other than tensors, which could run code"
        raise UserError(f"{path} is no complete checkpoint ({reason}): fetch it anew") from None


def read_weights(path, map_ddp=True):
    """The state dict of a VAE in model.th or model-ema.th, ours or released, on the CPU.

    map_ddp drops the `module.` that names in model.th start with.

    Raises:
        UserError: for a file that can't be read or holds something else.
    """
    state = read_torch_file(path)
    if not isinstance(state, dict) or not all(map(_is_plain, state.values())) or not state:
        raise UserError(f"{path} holds no state dict of tensors: name a model.th or model-ema.th")
    if map_ddp:
        state = {str(name).removeprefix("module."): t for name, t in state.items()}
    return state


def _is_plain(value):
    """Whether a file's entry is an ordinary tensor."""
    return torch.is_tensor(value) and value.layout == torch.strided


def check_weights(model, state, path, asked="asked for"):
    """Holds a state dict, read from `path`, against a VAE's; `asked` says who wants that one.

    Raises:
        UserError: if it is that of another model, naming its preset.
    """
    wanted, found = shapes_of(model.state_dict()), shapes_of(state)
    if found != wanted:
        known = preset_of(found)
        preset = known and known.hparam_sets
        odd = [n for n in [*wanted, *found] if wanted.get(n) != found.get(n)]
        what = f"the {preset} model" if preset else "a model of none of the presets"
        raise UserError(
            f"{path} holds {what}, not the one {asked} ({len(odd)} entries differ; "
            f"{odd[0]}: {found.get(odd[0], 'absent')} in the file, "
            f"{wanted.get(odd[0], 'absent')} in the model): "
            + (f"use --hps {preset}" if preset else "use the options it was trained with")
        )
    for name, t in model.state_dict().items():
        if t.is_floating_point() != state[name].is_floating_point():
            raise UserError(
                f"{path} holds {state[name].dtype} as {name}, the model {t.dtype}: name a model.th "
                f"or model-ema.th"
            )
    for name, t in state.items():
        if t.is_floating_point() and not t.isfinite().all():
            raise UserError(
                f"{path} holds weights that are no numbers, or infinite ({name}): restore an "
                f"earlier checkpoint"
            )


# What the shapes of the weights depend on, beside what the network is fed.
NETWORK = {"dataset", "image_size", "image_channels"} | {name for name, *_ in OPTIONS["network"]}


def recorded_hparams(path):
    """Hyperparameters of the run that wrote the weights `path`, or None where nothing tells them.

    They stand in PREFIX-state.json beside PREFIX-model.th and PREFIX-model-ema.th, or beside the
    file that `path` is a link to.

    Raises:
        UserError: if that file is damaged, or tells of no network.
    """
    for place in (Path(path), Path(os.path.realpath(path))):
        name, ours = re.subn(r"(^|-)model(-ema)?\.th$", r"\1state.json", place.name)
        state = place.with_name(name)
        if ours and state.exists():
            break
    else:
        return None
    try:
        H = Hyperparams(json.loads(state.read_bytes())["hparams"])
        if H.dataset not in (None, *IMAGE_SETS):
            raise ValueError(f"unknown dataset {H.dataset!r}")
        H.hparam_sets = H.hparam_sets or "own network"  # of a program, not of train.py
        with torch.device("meta"):
            VAE(H)
    except Exception as error:  # a damaged file raises nearly anything
        raise UserError(
            f"{state} does not tell the network of {path} ({reason_of(error)}): name its preset "
            f"(--hps) and the other options of the network it was trained with, or move "
            f"{state.name} away"
        ) from None
    return H


def load_model(path, hps=None, device=None):
    """A trained VAE ready to use, in one process: load_model("cifar10-seed0-…-model-ema.th").

    Args:
        path: model-ema.th (the better weights) or model.th, ours or released; a str or Path, or an
            address.
        hps: what get_hparams gives, or a preset's name; None: as recorded by the run beside the
            weights (recorded_hparams), else the preset that the shapes in the file tell.
        device: "cpu", "cuda" or "cuda:1", also as a torch.device; None: CUDA where there is one.

    Returns:
        VAE without gradients; its H holds the hyperparameters, image_size and device among them.

    Raises:
        UserError: for a file that can't be read, or is of no preset or another model; as
            recorded_hparams.
    """
    path = maybe_download(os.fspath(path))
    state, recorded = read_weights(path), None if hps else recorded_hparams(path)
    H = get_hparams(hps) if isinstance(hps, str) else hps or recorded or preset_of(shapes_of(state))
    if H is None:
        raise UserError(
            f"{path} holds a model of none of the presets: name the preset (--hps) and the other "
            f"options of the network it was trained with"
        )
    H = Hyperparams(H, device=resolve_device(device))
    if H.dataset == "images":  # what is measured of them lies in the run's folder
        facts = read_record(path, {"mean", "std"}) or {}
        H.update({f"image_{key}": facts[key] for key in ("mean", "std") if facts})
    with torch.device("meta"):
        model = VAE(H)
    asked = "that the run beside it has recorded" if recorded else "asked for"
    check_weights(model, state, path, asked)
    model.to_empty(device="cpu").load_state_dict(state)  # initial weights would be a waste
    return model.requires_grad_(False).eval().to(H.device)
