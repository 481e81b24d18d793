"""The rooms: who imports what from whom, how long each is, what its first sentence says."""

import ast
import re
from pathlib import Path

import pytest
from published import IMPORTS, NAMES, SEVEN

ROOT = Path(__file__).parent.parent

# A room may import from those before it; so there is no circle.
ORDER = (
    "interrupts errors file_kinds files file_systems resources image_sets options launchers "
    "processes turns logs endings noise temperatures precision fused recomputing compiling labels "
    "likelihood bounds embeddings block_strings hps torch_files safetensors_files downloads "
    "utils vae_helpers vae presets decoding image_files batches label_files packing "
    "own_images records weights starting data checkpoints run_folder resuming optimizers "
    "fonts pictures reports train_helpers outputs plot files_to_npy steps synthesis "
    "label_choices latent_files scores exports demo ahead sample graphs totals train watching "
    "exploring answering page_parts page_controls page gate explore"
).split()


def tree(room):
    return ast.parse((ROOT / f"{room}.py").read_text())


def imports(nodes):
    """(module, names) of the imports of our own rooms among nodes; a whole module has no names."""
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module in ORDER:
            yield node.module, {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            yield from ((a.name, set()) for a in node.names if a.name in ORDER)


def wrong_arrows(room, nodes):
    """What the imports among nodes break of the rules, a line each."""
    for other, names in imports(nodes):
        arrow = f"{room} <- {other}: {', '.join(sorted(names)) or 'the whole module'}"
        if other in SEVEN:
            if room in SEVEN:
                allowed = IMPORTS.get(room, {}).get(other, "")
            else:
                allowed = NAMES[other]
            if not names or names - set(allowed.split()):
                yield f"{arrow} (allowed: {allowed or 'nothing'})"
        if ORDER.index(other) >= ORDER.index(room):
            yield f"{arrow} (it comes later)"


def test_every_module_has_its_place():
    assert {path.stem for path in ROOT.glob("*.py")} == set(ORDER)


@pytest.mark.parametrize("room", ORDER)
def test_arrows(room):
    wrong = list(wrong_arrows(room, ast.walk(tree(room))))
    assert not wrong, wrong


@pytest.mark.parametrize(
    "room, line",
    [
        ("weights", "from train_helpers import load_vaes"),  # it comes later
        ("vae", "from hps import Hyperparams"),  # the original's doesn't
        ("reports", "from utils import image_generators"),  # the original's has no such name
        ("sample", "import train_helpers"),
        ("noise", "from noise import fill_noise"),
    ],
)
def test_a_wrong_arrow_is_named(room, line):
    [found] = wrong_arrows(room, ast.parse(f"def f():\n    {line}").body[0].body)
    assert found.startswith(f"{room} <- ")


@pytest.mark.parametrize("room", ORDER)
def test_no_import_is_hidden_in_a_function(room):
    module = tree(room)
    hidden = [n for n in ast.walk(module) if n not in module.body]
    assert not list(imports(hidden))


@pytest.mark.parametrize("room", ORDER)
def test_a_room_is_one_subject(room):
    """Of at most 450 lines, and a first sentence without an "and"."""
    assert len((ROOT / f"{room}.py").read_text().splitlines()) <= 450
    sentence = re.split(r"[.:]( |\n|$)|\n\n", ast.get_docstring(tree(room)))[0]
    assert not re.search(r"\band\b", sentence), sentence


def test_the_seven_offer_what_the_original_does():
    for room, names in NAMES.items():
        offered = set()
        for node in tree(room).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                offered.add(node.name)
            elif isinstance(node, ast.Assign):
                offered |= {t.id for t in node.targets if isinstance(t, ast.Name)}
            elif isinstance(node, ast.ImportFrom):
                offered |= {alias.asname or alias.name for alias in node.names}
        assert set(names.split()) <= offered, room
