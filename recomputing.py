"""Activation checkpointing: blocks keep their inputs, the rest is computed anew."""

import contextvars
import functools
import itertools

import torch
from torch.utils.checkpoint import checkpoint

from noise import from_this_place, is_drawn_before

# Blocks whose activations are computed anew together. More of them keep fewer inputs, and hold
# more at once in the backward pass.
SEGMENT = 3


def segments(layers):
    """Slices of up to SEGMENT consecutive blocks whose entries in parse_layer_string's are alike.

    So only a segment's last block can be the last at its resolution.
    """
    slices, start = [], 0
    for _, alike in itertools.groupby(layers):
        stop = start + len(list(alike))
        slices += [slice(i, min(i + SEGMENT, stop)) for i in range(start, stop, SEGMENT)]
        start = stop
    return slices


def checkpointed(on, function, *tensors):
    """function(*tensors); if `on`, keeping for the backward pass no more than the tensors."""
    if not on or not torch.is_grad_enabled():
        return function(*tensors)
    # Computed anew in the context of now: compiled blocks must be compiled then too.
    function = functools.partial(contextvars.copy_context().run, function)
    if is_drawn_before():  # no generator's state to keep and put back
        function = from_this_place(function)
        return checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False)
    return checkpoint(function, *tensors, use_reentrant=False)
