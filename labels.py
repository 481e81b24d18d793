"""Labels in the network: a row of a learned table for each, added to the decoder's first state."""

import inspect

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from errors import UserError

# The largest resolution that has a table: what an image shows is decided up to there.
LARGEST_LABELLED = 8


def labels_of(H):
    """How many labels a network knows: H.n_labels; 0 where H has none, or raises for it."""
    try:
        return H.n_labels or 0
    except Exception:  # a program's H may raise anything
        return 0


def known_labels(H):
    """The names of a network's labels; their numbers where nothing tells them."""
    return getattr(H, "label_names", None) or [str(i) for i in range(labels_of(H))]


def given(labels):
    """The keyword of labels, where there are any: an overridden method takes the original's."""
    return {} if labels is None else {"labels": labels}


def taking(function, labels):
    """(args, kwargs) that hand labels to a function that a program may have put in place.

    They go by keyword where it takes them so, behind all others where it takes any number, and not
    at all where it has the original's arguments alone.
    """
    if labels is None:
        return (), {}
    parameters = inspect.signature(function, follow_wrapped=False).parameters
    kinds = {parameter.kind for parameter in parameters.values()}
    if "labels" in parameters or inspect.Parameter.VAR_KEYWORD in kinds:
        return (), {"labels": labels}
    return ((labels,) if inspect.Parameter.VAR_POSITIONAL in kinds else ()), {}


def labels_in(batch, H):
    """The labels (N,) of a batch [images, labels], for a network that knows some; else None."""
    return batch[1] if labels_of(H) else None


def names_of(H, labels):
    """The name of each label, "" for -1; [] for None."""
    if labels is None:
        return []
    names = [*known_labels(H), ""]
    return [names[label] for label in torch.as_tensor(labels).tolist()]


def check_labels(labels, n, n_labels, any_number=False):
    """labels, in any array's form, as an int64 tensor; None as -1 for each of n images.

    any_number: whether there may be another number of them than n.

    Raises:
        ValueError: for another shape than (n,), numbers that are none of a label, or labels of a
            network that knows none. On CUDA, where a look at them costs a wait, and under a
            compiler, whose graph it breaks, numbers are not held against n_labels.
    """
    if labels is None:
        return torch.full((n,), -1)
    if not torch.is_tensor(labels):
        labels = np.asarray(labels)
        if labels.dtype.kind not in "iu" and labels.size:
            raise ValueError(f"labels are {labels.dtype}: they must be int64, -1 for none")
        labels = torch.from_numpy(labels.astype(np.int64))
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
        raise ValueError(f"labels are {labels.dtype}: they must be int64, -1 for none")
    if labels.ndim != 1 or len(labels) != n and not any_number:
        raise ValueError(f"labels are {tuple(labels.shape)}: {n} images need ({n},)")
    if labels.device.type == "cpu" and len(labels) and not torch.compiler.is_compiling():
        low, high = labels.min().item(), labels.max().item()
        if low < -1 or high >= n_labels:
            wrong = low if low < -1 else high
            known = f"0 to {n_labels - 1}, or -1 for none" if n_labels else "none: -1 alone is one"
            raise ValueError(f"label {wrong}: this network knows {known}")
    return labels.long()


def label_tables(constants, n_labels):
    """Tables of zeros, (n_labels, C, R, R) for each learned constant (1, C, R, R) up to 8x8.

    Raises:
        UserError: where there is no such constant.
    """
    tables = nn.ParameterList(
        nn.Parameter(torch.zeros(n_labels, *t.shape[1:]))
        for t in constants
        if t.shape[2] <= LARGEST_LABELLED
    )
    if not len(tables):
        raise UserError(
            f"{n_labels} labels, but the decoder has no learned constant up to "
            f"{LARGEST_LABELLED}x{LARGEST_LABELLED} that they could be added to: let dec_blocks "
            f"begin below, and no_bias_above be no smaller"
        )
    return tables


def label_rows(tables, labels, n, any_number=False):
    """The row of each image's label, zeros for -1, of each table: a list of (N, C, R, R).

    Every table is read, whatever the labels: so its gradient exists on every process. Where none is
    wanted, and `labels` is None, the list is empty.

    Args:
        tables: a list of (n_labels, C, R, R).
        labels, any_number: as in check_labels, N of them.

    Raises:
        ValueError: as check_labels.
    """
    if labels is None and not torch.is_grad_enabled():
        return []
    if not len(tables):
        if labels is not None:
            check_labels(labels, n, 0, any_number)
        return []
    labels = check_labels(labels, n, len(tables[0]), any_number)
    labels = labels.to(tables[0].device, non_blocking=True)
    told, labels = (labels >= 0).view(-1, 1, 1, 1), labels.clamp(min=0)
    return [torch.where(told, _row(table, labels), 0) for table in tables]


def _row(table, labels):
    """table[labels], in whose gradient rows are added up, not single numbers: in 1/9 of the time.

    A compiler adds up single numbers for an embedding too, but not for a bag of one.
    """
    if torch.compiler.is_compiling():
        rows = F.embedding_bag(labels[:, None], table.flatten(1), mode="sum")
    else:
        rows = F.embedding(labels, table.flatten(1))
    return rows.unflatten(1, table.shape[1:])
