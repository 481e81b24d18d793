"""requirements.txt, -dev and -explore: one environment holds what all of them pin."""

import re
from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from runs import ROOT

FILES = [ROOT / f"requirements{suffix}.txt" for suffix in ("", "-dev", "-explore")]


def pins_of(paths):
    """{package: its pinned version} of files of requirements."""
    lines = (line for path in paths for line in path.read_text().splitlines())
    pairs = (re.fullmatch(r"(\S+)==(\S+?)\s*(#.*)?", line) for line in lines if line[:2] != "-r")
    return {canonicalize_name(pair[1]): pair[2] for pair in pairs}  # a line that pins nothing: None


def unmet(pins):
    """What the pins break of the requirements of the pinned packages, and of theirs in turn."""
    wrong, seen, todo = [], set(), [*pins]
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            needed = metadata.requires(name) or ()
        except metadata.PackageNotFoundError:  # of another platform, or an option
            assert name not in pins, f"{name} is not installed"
            continue
        for requirement in map(Requirement, needed):
            other = canonicalize_name(requirement.name)
            if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
                continue
            if other in pins and not requirement.specifier.contains(pins[other]):
                wrong.append(f"{name} needs {requirement}, not {pins[other]}")
            todo.append(other)
    return wrong


def test_what_is_pinned_installs_together():
    pins = pins_of(FILES)
    installed = {name: metadata.version(name).partition("+")[0] for name in pins}  # 2.13.0+cpu
    assert installed == pins  # whose requirements these are
    assert {"torch", "gradio", "pillow", "pytest"} <= pins.keys() and unmet(pins) == []
    [wrong] = unmet(pins | {"pillow": "13.0.0"})
    assert wrong.startswith("gradio needs pillow") and wrong.endswith("not 13.0.0")


def test_the_larger_files_stand_on_the_smaller():
    for path, needed in zip(FILES, (set(), {"", "-explore"}, {""}), strict=True):
        named = re.findall(r"^-r requirements(.*)\.txt$", path.read_text(), re.MULTILINE)
        assert {*named} == needed, path
