"""Temperatures, in all the forms that they are given in: factors of the prior's deviations."""

import math
import numbers

import numpy as np
import torch


def log_temperature(t, like):
    """The logarithm of a temperature: a number, or a tensor or array, which broadcasts."""
    if isinstance(t, numbers.Real) or np.ndim(t) == 0 and not torch.is_tensor(t):
        return math.log(t) if t else -math.inf
    return torch.as_tensor(t).to(like).log()


def temperature_of(t, i, n_blocks):
    """That of block i of n_blocks: t[i], or t itself where it is one for all.

    Raises:
        ValueError: for a t that lacks block i.
    """
    if not hasattr(t, "__getitem__") or getattr(t, "ndim", None) == 0:
        return t
    try:
        return t[i]
    except (KeyError, IndexError):
        raise ValueError(
            f"{n_blocks} blocks, but no temperatures from block {i} on: give one number, or one "
            f"per block"
        ) from None
