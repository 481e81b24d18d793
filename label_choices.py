"""Labels that a command names: what --label and --from_label ask for, as numbers of a network's."""

import difflib
import math

import numpy as np
import torch

from errors import UserError, one_line
from label_files import WORDS
from labels import known_labels, labels_of, names_of
from noise import LABELLING, image_generators
from starting import refuse_unlabelled


def numbers_named(H, text, option):
    """The numbers of names parted by commas.

    Raises:
        UserError: for a name that the network does not know.
    """
    names, numbers = known_labels(H), []
    for name in text.split(","):
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            shown = ", ".join(names[:20]) + ", ..." * (len(names) > 20)
            raise UserError(one_line(f"--{option} {name!r}{hint}: this model knows {shown}"))
        numbers.append(names.index(name))
    return numbers


def asked_labels(H, text, option="label", words=WORDS, seed=0):
    """What an option asks for: a function indices → int64 (n,), or None for none.

    Names go to the images in turn. `all` are all names; `random` draws by the training set's
    frequencies, as a function of seed and index, and some images get none if some had none.

    Args:
        text: the option's value, None where it is not given.
        words: those that it takes, of label_files.WORDS.

    Raises:
        UserError: for a network without labels, unknown names, or none where the network has never
            been without.
    """
    if not labels_of(H):
        if text is not None:
            raise UserError(f"--{option} {text}: this model knows no labels: leave it out")
        return None
    if text in (None, "none"):
        refuse_unlabelled(H, f"--{option} {text}" if text else f"no --{option}")
        return None
    if text in WORDS and text not in words:
        raise UserError(f"--{option} {text}: it takes names here: {', '.join(known_labels(H))}")
    if text == "random":
        if not H.label_counts:
            raise UserError(
                f"--{option} random: the state.json of the weights' run, which tells how often "
                f"each label was trained on, is not beside them: name labels, or all"
            )
        shares = torch.tensor(H.label_counts, dtype=torch.float64).cumsum(0)
        shares /= shares[-1].clone()

        def drawn(indices):
            draws = [
                torch.rand(1, dtype=torch.float64, generator=generator)
                for generator in image_generators(indices, seed, LABELLING)
            ]
            labels = torch.searchsorted(shares, torch.cat(draws), right=True)
            return torch.where(labels == labels_of(H), -1, labels)  # the last are those without

        return drawn
    numbers = range(labels_of(H)) if text == "all" else numbers_named(H, text, option)
    numbers = torch.tensor([*numbers])
    return lambda indices: numbers[torch.as_tensor([*indices]) % len(numbers)]


def encoded_under(args, H):
    """What --from_label asks for: a function, as asked_labels."""
    return asked_labels(H, args.from_label, "from_label", ("none",))


def labels_asked(args, H):
    """What images are decoded and encoded under by sample.py's args: two, as asked_labels."""
    words = WORDS if args.command == "samples" else ("none",)
    decoded = asked_labels(H, args.label, "label", words, args.seed)
    of_samples = args.command == "progressive" and not args.images
    if of_samples and args.from_label:
        raise UserError(f"--from_label {args.from_label}: samples are not encoded: leave it out")
    encodes = hasattr(args, "from_label") and not of_samples
    return decoded, encoded_under(args, H) if encodes else None


def labels_for(asked, indices):
    """asked_labels' numbers of these images, None where nothing was asked for."""
    return None if asked is None else asked(indices)


def names_for(H, asked, indices):
    """Their names, "" where nothing was asked for: as files record them."""
    if asked is None:
        return np.array([""] * len(indices))
    return np.array(names_of(H, asked(indices)))


def recorded_labels(H, names):
    """A function indices → int64 (n,) of the labels that a file tells of its images, "" for none.

    None of a file that tells none.

    Raises:
        UserError: for a name that the network does not know.
    """
    if names is None or not any(names) or not labels_of(H):
        return None
    known = {name: i for i, name in enumerate(known_labels(H))}
    if unknown := next((name for name in names if name and name not in known), None):
        raise UserError(f"the file tells of the label {unknown!r}, which this model does not know: "
                        f"name one with --label")  # fmt: skip
    numbers = torch.tensor([known.get(name, -1) for name in names])
    return lambda indices: numbers[torch.as_tensor([*indices])]


def in_words(H, text):
    """A few words on labels for a title; "" where none were asked for."""
    return "" if text in (None, "none") else one_line(f", label {text}")


WIDEST = 40  # columns of a grid in which each label has a row


def rows_of_labels(H, text, n):
    """(name, slice of its images) of each row of a grid of n images, whose labels come in turn.

    None where there are less than two labels, or they come in no order.
    """
    if text in (None, "none", "random") or text != "all" and "," not in text:
        return None
    names = known_labels(H) if text == "all" else text.split(",")
    if n < len(names) or math.isfinite(n) and n > WIDEST * len(names):
        return None
    return [(name, slice(i, None, len(names))) for i, name in enumerate(names)]


def default_count(H, text):
    """Samples of a command that names no number: 16, or of several labels eight each."""
    several = rows_of_labels(H, text, math.inf) if labels_of(H) and text else None
    return max(len(several), min(8 * len(several), 1000)) if several else 16
