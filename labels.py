"""Labels in the network: a row of a learned table for each, added to the decoder's first state."""

import inspect

import numpy as np
import torch

from fused import without_autocast

# The largest resolution that has a table: what an image shows is decided up to there.
LARGEST_LABELLED = 8


def labels_of(H):
    """How many labels a network knows: H.n_labels; 0 where H has none, or raises for it."""
    try:
        return H.n_labels or 0
    except (AttributeError, KeyError):
        return 0


def given(labels):
    """The keyword of labels, where there are any: an overridden method takes the original's."""
    return {} if labels is None else {"labels": labels}


def taking(function, labels, *places):
    """[labels] where a function that a program may have put in place takes it behind `places`.

    One with the original's arguments is called with those alone.
    """
    if labels is None:
        return []
    try:
        inspect.signature(function).bind(*places, labels)
    except TypeError:
        return []
    return [labels]


def labels_in(batch, H):
    """The labels (N,) of a batch [images, labels], for a network that knows some; else None."""
    return batch[1] if labels_of(H) else None


def label_names(H, labels):
    """The name of each label, "" for -1; of a network whose names are not known, the number."""
    if labels is None:
        return []
    names = [*(getattr(H, "label_names", None) or map(str, range(labels_of(H)))), ""]
    return [names[label] for label in torch.as_tensor(labels).tolist()]


def check_labels(labels, n, n_labels):
    """labels, in any array's form, as an int64 tensor; None as -1 for each of n images.

    Raises:
        ValueError: for another shape than (n,), numbers that are none of a label, or labels of a
            network that knows none. On CUDA, where a look at them costs a wait, numbers are not
            held against n_labels.
    """
    if labels is None:
        return torch.full((n,), -1)
    if not torch.is_tensor(labels):
        labels = torch.from_numpy(np.asarray(labels))
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
        raise ValueError(f"labels are {labels.dtype}: they must be int64, -1 for none")
    if labels.ndim != 1 or len(labels) != n and n != 1:
        raise ValueError(f"labels are {tuple(labels.shape)}: {n} images need ({n},)")
    if labels.device.type == "cpu" and len(labels):
        low, high = labels.min().item(), labels.max().item()
        if low < -1 or high >= n_labels:
            wrong = low if low < -1 else high
            known = f"0 to {n_labels - 1}, or -1 for none" if n_labels else "none: -1 alone is one"
            raise ValueError(f"label {wrong}: this network knows {known}")
    return labels.long()


def label_rows(tables, labels, n):
    """The row of each image's label, zeros for -1, of each table: a list of (N, C, R, R).

    Every table is read, whatever the labels: so its gradient exists on every process.

    Args:
        tables: a list of (n_labels, C, R, R).
        labels: as in check_labels, N of them; N is n, or any number where n is 1.

    Raises:
        ValueError: as check_labels.
    """
    if not len(tables):
        if labels is not None:
            check_labels(labels, n, 0)
        return []
    labels = check_labels(labels, n, len(tables[0])).to(tables[0].device, non_blocking=True)
    numbers = torch.arange(len(tables[0]), device=labels.device)
    chosen = labels[:, None] == numbers  # (N, n_labels)
    with without_autocast(labels.device.type):
        return [
            (chosen.to(table.dtype) @ table.flatten(1)).view(-1, *table.shape[1:])
            for table in tables
        ]
