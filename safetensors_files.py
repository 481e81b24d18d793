"""Weights as safetensors: one file to share, whose metadata tell the network that they are of.

The metadata are one JSON text under the key `vdvae`, an object with `format` 1; of a newer format
they are refused, and keys that are not known here mean nothing. What kind a file is, its content
says, not its name.
"""

import contextlib
import json
import math
import os

import torch

from errors import UserError, needing, reason_of
from file_kinds import kind_of
from torch_files import read_torch_file

FORMAT = 1

KEY = "vdvae"

# Of safetensors itself: no header is longer.
LONGEST_HEADER = 100_000_000

# ---- read ----------------------------------------------------------------------------------


def is_safetensors(path):
    """Whether a file is one of safetensors, as its first bytes tell."""
    with contextlib.suppress(OSError, ValueError):
        if os.path.isfile(path):
            with open(path, "rb") as file:
                return kind_of(file.read(1024)) == "a safetensors file"
    return False


def read_tensors(path):
    """The content of a file of weights, on the CPU: torch.save's, or that of safetensors.

    Raises:
        UserError: for a file that can't be read, as torch_files.read_torch_file.
    """
    if not is_safetensors(path):
        return read_torch_file(path)
    with needing("safetensors", f"{path}, a safetensors file,"):
        from safetensors import safe_open  # slow to import
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except Exception as error:  # a damaged file raises nearly anything
        raise UserError(
            f"{path} is no complete safetensors file ({reason_of(error)}): fetch it anew"
        ) from None


def metadata_of(path):
    """The object under `vdvae` in a file of safetensors; None of another file, or without it.

    Raises:
        UserError: if it is of a newer format, or none.
    """
    if not is_safetensors(path):
        return None
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length <= LONGEST_HEADER else {}
        text = header.get("__metadata__", {}).get(KEY)
    except (OSError, ValueError, AttributeError, RecursionError):
        return None  # read_tensors says what is wrong with it
    if text is None:
        return None
    try:
        content = json.loads(text)
        version = content["format"]
        if type(version) is not int or version < 1:
            raise ValueError(f"format {version!r}")
    except Exception as error:  # as of any text
        raise UserError(
            f"{path} has metadata under {KEY!r} that can't be read ({reason_of(error)}): export "
            f"its model anew"
        ) from None
    if version > FORMAT:
        raise UserError(
            f"{path} is of format {version}, newer than {FORMAT}, which this program knows: take a "
            f"newer program, or export its model with this one"
        )
    return content


def hparams_in(content):
    """The hyperparameters that metadata of metadata_of tell, a dict.

    Raises:
        ValueError: if they tell none.
    """
    found = dict(content["hparams"])
    found |= {key: content.get(key) for key in ("image_size", "image_channels", "label_names")}
    found |= {"hparam_sets": content.get("preset"), "background": content.get("background")}
    for facts in (content.get("images") or {}, content):  # images: that of own images
        mean, std = facts.get("mean"), facts.get("std")
        if (mean, std) != (None, None):
            if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
                raise ValueError(f"mean {mean}, std {std}")
            found |= {"image_mean": mean, "image_std": std}
    return {key: value for key, value in found.items() if value is not None}


# ---- written -------------------------------------------------------------------------------


def write_safetensors(path, state, content):
    """Writes a state dict as float32 under its own names, with metadata `content`.

    Raises:
        OSError: if it can't be written.
    """
    with needing("safetensors", f"{path}, a safetensors file,"):
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    state = {
        name: t.detach().to("cpu", torch.float32).contiguous().clone() for name, t in state.items()
    }
    text = json.dumps({"format": FORMAT, **content}, allow_nan=False)
    try:
        save_file(state, path, {KEY: text})
    except SafetensorError as error:
        raise OSError(None, reason_of(error), str(path)) from None
