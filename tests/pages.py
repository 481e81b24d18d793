"""What README.md and docs/*.md tell a reader to run, in the order of each page."""

import re
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
PAGES = {
    path.relative_to(REPO).as_posix(): path.read_text()
    for path in (REPO / "README.md", *sorted((REPO / "docs").glob("*.md")))
}
README = PAGES["README.md"]


def blocks(text):
    """(language, content) of a page's fenced blocks."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def prose(text):
    """A page's lines outside of fenced blocks."""
    return re.sub(r"^```\w*\n.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE).splitlines()


def commands(text):
    """The lines of a page's bash blocks that are commands."""
    lines = [line for kind, block in blocks(text) if kind == "bash" for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


# After these, in a fresh shell, every page's commands work as they stand.
FIRST = ["make demo", "source .venv/bin/activate", "make test"]
COMMANDS = [command for text in PAGES.values() for command in commands(text)]


def is_use(command):
    """Whether a command needs a trained model, or its data alone: no data set, no launcher."""
    uses = (
        "sample.py ",
        "explore.py ",
        "plot.py ",
        "--dry_run",
        "--tensorboard",
        "--iw_samples",
        "--init_from",
    )
    return any(use in command for use in uses)
