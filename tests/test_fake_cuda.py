"""What runs on a GPU, on fake tensors of "cuda:0": devices, reads, precisions, operator calls.

`python tests/test_fake_cuda.py` prints the table of docs/performance.md anew.
"""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from runs import ENV, ROOT

TASKS = ("train", "evaluate", "latents", "sample")
PRECISIONS = ("fp32", "bf16")
WITHIN = 0.1


class NotPossible(Exception):
    """Why no fake tensor can be had here."""


def build(folder):
    """The library of fake_cuda.cpp."""
    if importlib.util.find_spec("torch") is None or not shutil.which("g++"):
        raise NotPossible("no g++")
    include = Path(importlib.util.find_spec("torch").origin).parent / "include"
    command = ["g++", "-shared", "-fPIC", "-std=c++20", "-O0", f"-I{include}"]
    library = Path(folder, "fake_cuda.so")
    done = subprocess.run(
        [*command, ROOT / "tests" / "fake_cuda.cpp", "-o", library], capture_output=True, text=True
    )
    if done.returncode:
        raise NotPossible(f"this PyTorch's headers differ: {done.stderr[:300]}")
    return library


def run(library, preset, precision, tasks=TASKS):
    """{task: what fake_cuda.py tells of it}."""
    program = ROOT / "tests" / "fake_cuda.py"
    done = subprocess.run(
        [sys.executable, program, library, preset, precision, *tasks],
        env=ENV, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    ready, *rows = done.stdout.splitlines() or [None]
    if not ready:
        raise NotPossible(f"PyTorch's internals: {done.stderr.strip().splitlines()[-1][:300]}")
    assert done.returncode == 0, done.stderr[-3000:]
    return {row.pop("task"): row for row in map(json.loads, rows)}


def documented():
    """{(network, precision, task): operator calls} of docs/performance.md."""
    text = (ROOT / "docs" / "performance.md").read_text()
    rows = re.findall(r"^\| ([\w ]+) \| (fp32|bf16) \|([\d,| ]+)\|$", text, re.MULTILINE)
    return {
        (network, precision, task): int(calls.replace(",", ""))
        for network, precision, cells in rows
        for task, calls in zip(TASKS, cells.split("|"), strict=True)
    }


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    try:
        return build(tmp_path_factory.mktemp("library"))
    except NotPossible as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "preset",
    ["short", *(pytest.param(name, marks=pytest.mark.slow) for name in ("cifar10", "imagenet64"))],
)
def test_nothing_waits_for_the_gpu_before_the_read_that_is_meant(preset, precision, library):
    """No CPU tensor, no second device, no number read; as many operators as documented."""
    try:
        found = run(library, preset, precision)
    except NotPossible as reason:
        pytest.skip(str(reason))
    assert list(found) == list(TASKS)
    for task, row in found.items():
        assert row["odd"] == {}, task
        assert len(row["reads"]) == 1, task
        expected = documented()[preset, precision, task]
        assert abs(row["calls"] / expected - 1) < WITHIN, (task, row["calls"], expected)
    [[shape, dtype, place]] = found["train"]["reads"]
    assert shape == [7] and place.startswith("steps.py")  # all figures of a step in one vector
    [[shape, dtype, place]] = found["sample"]["reads"]
    assert dtype == "uint8" and shape[1:] == 2 * shape[1:2] + [3]
    for task in ("train", "evaluate"):
        by_dtype = found[task]["convolutions"]
        assert set(by_dtype) == ({"float32", "bfloat16"} if precision == "bf16" else {"float32"}), (
            task
        )
        if precision == "bf16":
            assert by_dtype["bfloat16"] > 4 * by_dtype["float32"], task


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        made = build(folder)
        for preset in ("short", "cifar10", "imagenet64"):
            for precision in PRECISIONS:
                found = run(made, preset, precision)
                cells = " | ".join(f"{found[task]['calls']:,}" for task in TASKS)
                print(f"| {preset} | {precision} | {cells} |", flush=True)
