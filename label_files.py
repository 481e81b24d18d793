"""Which label each image of the user's own has: by its first folder, or by a file."""

import hashlib
import json
import os
import re
from pathlib import Path

from errors import UserError, one_line, reason_of
from file_kinds import not_regular

# What --label takes beside names of labels.
WORDS = ("all", "none", "random")


def sorted_names(names):
    """Names of labels in their order: integers by number, then the others by letters."""

    def key(name):
        whole = re.fullmatch(r"[+-]?\d{1,18}", name, re.ASCII)
        return (not whole, int(name) if whole else 0, name)

    return sorted(names, key=key)


def labels_of_files(how, root, files):
    """The name of each file's label, None where it has none, in their order.

    Args:
        how: --labels: "folders", by the first folder below the root that a file lies in; or a JSON
            file with [name, label] pairs under the key "labels", as StyleGAN's and EDM's
            dataset.json.
        root: the folder of the images.
        files: their names, paths relative to it.

    Raises:
        UserError: for a file that tells no labels of such images, or names that no label may have.
    """
    if how == "folders":
        found = [name.partition("/")[0] if "/" in name else None for name in files]
        if not any(found):
            raise UserError(
                f"--labels folders: no picture of {root} lies in a folder of it: move each to one "
                f"that is named as its label, or name a FILE.json"
            )
    else:
        listed = {}
        for entry in _read(how):
            if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[0], str):
                raise _refused(how, f"{_short(entry)} is no pair of a file's name and its label")
            name, label = entry[0], _name_of(how, entry[0], entry[1])
            name = os.path.relpath(name, root) if os.path.isabs(name) else os.path.normpath(name)
            if listed.setdefault(name, label) != label:
                raise _refused(how, f"{name} has two labels, {listed[name]} and {label}")
        for name in sorted(listed.keys() - set(files)):
            if not os.path.lexists(Path(root, name)):
                raise _refused(how, f"{name} is not in {root}")
        found = [listed.get(name) for name in files]
        if not any(found):
            raise _refused(how, f"it has labels of none of the {len(files):,} images of {root}")
    check_names(found, how)
    return found


def labels_of_array(how, n):
    """The name of each label of an array of n images, None where it has none, as labels_of_files.

    how: --labels: a JSON file whose "labels" are in the array's order.
    """
    if how == "folders":
        raise UserError("--labels folders: an .npy file has none; name a FILE.json")
    labels = _read(how)
    if len(labels) != n:
        raise _refused(how, f"it has {len(labels):,} labels, the array {n:,} images")
    found = [_name_of(how, f"image {i}", label) for i, label in enumerate(labels)]
    check_names(found, how)
    if not any(found):
        raise _refused(how, "it has no label")
    return found


def _read(path):
    if special := not_regular(path):
        raise UserError(f"--labels {path} is {special}: name a JSON file, or `folders`")
    try:
        content = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise UserError(
            f"--labels {path} can't be read ({error.strerror}): it is `folders`, or a JSON file "
            f'with a list under the key "labels"'
        ) from None
    except (ValueError, RecursionError) as error:
        raise _refused(path, reason_of(error)) from None
    labels = content.get("labels") if isinstance(content, dict) else None
    if not isinstance(labels, list):
        raise _refused(path, 'it has no list under the key "labels"')
    return labels


def _name_of(path, of, label):
    """A label's name; an integer is its digits, null and -1 are none."""
    if label is None or label == -1 and not isinstance(label, bool):
        return None
    if isinstance(label, bool) or not isinstance(label, int | str):
        raise _refused(path, f"the label of {of} is {_short(label)}: it must be a number or a name")
    return str(label)


def _refused(path, why):
    return UserError(f"--labels {path}: {why}: correct the file")


def _short(value):
    text = repr(value)
    return text if len(text) < 60 else f"{text[:57]}..."


def check_names(names, how):
    """Raises UserError for a name that --label could not take."""
    for name in sorted(set(names) - {None}):
        if "," in name or name in WORDS or not name.strip():
            raise UserError(
                f"--labels {how}: a label is called {name!r}, and --label takes names parted by "
                f"commas, or {', '.join(WORDS)}: rename it"
            )


def labels_digest(files, labels):
    """A hash over which image has which label: it tells one labelling from another.

    Args:
        files: names of the images, or their numbers.
        labels: the name of each one's label, None for none.
    """
    pairs = sorted(zip(map(str, files), labels, strict=True))
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def numbers_of(found, how, known=None):
    """(names of the labels in their order, the number of each image's label, -1 for none).

    known: the names that a network knows already, which these must be among.

    Raises:
        UserError: for others.
    """
    names = known or sorted_names({*found} - {None})
    number = {name: i for i, name in enumerate(names)}
    if new := sorted_names({*found} - {None} - number.keys()):
        raise UserError(
            f"--labels {how}: {new[0]!r} is none of the {len(names)} labels that the weights know "
            f"({one_line(', '.join(names[:8]))}{', ...' * (len(names) > 8)}): take these images "
            f"out, or start a new run with --init_from"
        )
    return names, [-1 if name is None else number[name] for name in found]
