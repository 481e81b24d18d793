"""Weights: from a file to the tensors of a known network."""

import hashlib
import os

import torch

from errors import UserError
from image_sets import IMAGE_SETS
from labels import labels_of
from launchers import resolve_device
from options import OPTIONS, Hyperparams
from presets import get_hparams, preset_of, shapes_of
from records import no_network, normalisation_of, state_beside
from safetensors_files import metadata_of, read_tensors
from torch_files import what_content, why_not_plain
from utils import maybe_download
from vae import VAE

# Parts of names that wrappers of a model put before or between its own: DataParallel and its
# kin, torch.compile, FSDP, activation checkpointing.
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def read_weights(path, map_ddp=True):
    """The state dict of a VAE in model.th or model-ema.th, ours or released, on the CPU.

    It may be a file of safetensors as well.

    map_ddp drops the `module.` that names in model.th start with, and what other wrappers of a
    model put into names (WRAPPERS), in any order.

    Raises:
        UserError: for a file that can't be read or holds something else.
    """
    state = read_tensors(path)
    if not isinstance(state, dict) or not state or not any(map(torch.is_tensor, state.values())):
        what, remedy = what_content(state)
        raise UserError(f"{path} holds no state dict of tensors, but {what}: {remedy}")
    for name, t in state.items():
        if reason := why_not_plain(t):
            raise UserError(
                f"{path} holds no state dict of tensors alone: {name} is {reason}; save the model "
                f"anew with plain tensors, or name another model.th or model-ema.th"
            )
    if not map_ddp:
        return state
    own = {}
    for name, t in state.items():
        short = ".".join(part for part in str(name).split(".") if part not in WRAPPERS)
        if short in own:
            raise UserError(f"{path} holds {short} twice, of two wrappers: name a model-ema.th")
        own[short] = t
    return own


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


def weights_hash(model):
    """A sha256, in hex, over the names and the float32 values of a model's weights.

    The same for the same weights in another kind of file, or of another precision that holds them.
    """
    digest = hashlib.sha256()
    for name, t in sorted(model.state_dict().items()):
        values = t.detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name} {tuple(t.shape)}\n".encode())
        digest.update(values.numpy())
    return digest.hexdigest()


# What the shapes of the weights depend on, beside what the network is fed.
NETWORK = {"dataset", "image_size", "image_channels", "n_labels", "label_names"} | {
    name for name, *_ in OPTIONS["network"]
}


def recorded_hparams(path):
    """Hyperparameters of the run that wrote the weights `path`, or None where nothing tells them.

    As records.state_beside.

    Raises:
        UserError: if its file is damaged, or tells of no network.
    """
    state, H = state_beside(path) or (None, None)
    if H is None:
        return None
    try:
        if H.dataset not in (None, *IMAGE_SETS):
            raise ValueError(f"unknown dataset {H.dataset!r}")
        H.hparam_sets = H.hparam_sets or "own network"  # of a program, not of train.py
        names = H.label_names
        if names and not (
            isinstance(names, list)
            and len(names) == labels_of(H)
            and all(isinstance(name, str) for name in names)
        ):
            raise ValueError(f"label_names are no {labels_of(H)} names")
        if not isinstance(H.hparam_sets, str):
            raise ValueError(f"preset {H.hparam_sets!r}")
        with torch.device("meta"):
            VAE(H)
    except Exception as error:  # as of a damaged file
        raise no_network(state, path, error) from None
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
    shapes = (lambda: shapes_of(state)) if H.dataset == "images" else None
    if known := normalisation_of(path, shapes, named=bool(hps)):
        H.update(image_mean=known.mean, image_std=known.std)
    with torch.device("meta"):
        model = VAE(H)
    own = recorded and metadata_of(path) is not None
    asked = "that its metadata tell" if own else "that the run beside it has recorded"
    asked = asked if recorded else "asked for"
    check_weights(model, state, path, asked)
    model.to_empty(device="cpu").load_state_dict(state)  # initial weights would be a waste
    return model.requires_grad_(False).eval().to(H.device)
