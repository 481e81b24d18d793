"""Files of torch.save: opened without running code, or said to be what they are instead."""

import copy
import re
import warnings

import torch

from errors import UserError, reason_of
from file_kinds import not_regular, what_file


def read_torch_file(path):
    """What torch.save wrote, on the CPU: tensors and plain containers, nothing that runs code.

    Raises:
        UserError: for a file that is missing, truncated, foreign or holds other objects.
    """
    special = not_regular(path)
    if special == "a folder":
        raise UserError(f"{path} is a folder: name the .th file in it")
    if special:
        raise UserError(f"{path} is {special}: name a .th file")
    try:
        with warnings.catch_warnings(action="ignore"):  # of old or odd formats: it reads, or not
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: check the path of the --restore option") from None
    except PermissionError as error:
        raise UserError(
            f"{path} can't be read ({error.strerror}): change its permissions"
        ) from None
    except Exception as error:  # a damaged file raises nearly anything
        reason, remedy = reason_of(error), "fetch it anew"
        kind, known = what_file(path)
        if kind:
            reason, remedy = f"it is {kind}", known or "name a model.th or model-ema.th"
        elif "unsupported operand" in str(error).lower():  # whose bytes are read as if they were
            reason = "it is none that torch.save wrote by its default pickle_protocol"
            remedy = "name a model.th or model-ema.th, or save it anew without pickle_protocol"
        elif "weights_only" in str(error).lower().replace(" ", "_"):
            # "Unsupported global: GLOBAL argparse.Namespace was not an allowed global by default"
            name = re.search(r"GLOBAL ([\w.]+)|<class '([\w.]+)'", str(error))
            what = f"the class {next(filter(None, name.groups()))}" if name else "other classes"
            reason = f"it holds objects of {what}, not tensors alone, which could run code"
            remedy = "fetch it anew, or save the state_dict of its model alone"
        raise UserError(f"{path} is no complete checkpoint ({reason}): {remedy}") from None


def why_not_plain(value):
    """What keeps a file's entry from being an ordinary tensor, or None for one that is."""
    if not torch.is_tensor(value):
        return f"of the type {type(value).__name__}"
    if value.is_meta:
        return "on the device meta, without values"
    if value.is_quantized:
        return "quantized"
    if value.is_nested:
        return "nested"
    if value.layout != torch.strided:
        return f"of the layout {str(value.layout).removeprefix('torch.')}"
    if value.is_complex() or value.dtype not in _DTYPES:
        return f"of the type {str(value.dtype).removeprefix('torch.')}"
    return None


# What copies into float32 and knows isfinite().
_DTYPES = {
    torch.float16, torch.bfloat16, torch.float32, torch.float64,
    torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool,
}  # fmt: skip


def what_content(content):
    """What a torch file's content is, where it is no state dict of tensors; and what to do."""
    if not isinstance(content, dict):
        return f"a {type(content).__name__}", "name a model.th or model-ema.th"
    if {"state", "param_groups"} <= content.keys():
        return "an optimizer's state", "give it with --restore_optimizer_path, not as weights"
    for key in content:
        inner = content[key]
        if isinstance(inner, dict) and inner and all(map(torch.is_tensor, inner.values())):
            return (
                f"a dict of {', '.join(map(str, list(content)[:4]))}",
                f"save what is under {key!r} in it alone, with torch.save",
            )
    return f"a {type(content).__name__} without tensors", "name a model.th or model-ema.th"


def contiguous(content):
    """A state dict to be saved, its tensors in the plain layout that files have.

    Training on CUDA keeps weights and moments channels-last. What needs no change is not copied.
    """
    if isinstance(content, dict):
        changed = {k: v for k, old in content.items() if (v := contiguous(old)) is not old}
        if not changed:
            return content
        content = copy.copy(content)  # with the attributes that a module's state dict has
        content.update(changed)
        return content
    if torch.is_tensor(content):
        plain = torch.empty(content.shape, device="meta").stride()
        if content.stride() != plain:  # also of a side of 1, where it makes no difference
            return content.clone(memory_format=torch.contiguous_format)
    return content
