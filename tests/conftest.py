import os
import random
import signal

import numpy as np
import pytest
import torch
from fakes import write_sample_folder
from runs import Run, sample_in

import fused
import likelihood

# Commands start as from a terminal: whatever runs the tests, such as a job in the background, may
# have these ignored, which every child would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """One more than there are cores: for a third of their time tests wait for processes."""
    return 1 + (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    )


@pytest.fixture(autouse=True)
def _one_thread():
    """The figures were measured on one thread, and several test processes share the machine."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeds():
    """What a test draws of a global generator is the same, whichever tests come before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _as_large(request, monkeypatch):
    """Tiny networks compute as large ones do; with @pytest.mark.small they compute as they are."""
    if request.node.get_closest_marker("small"):
        return
    sizes = "SMALL", "SMALL_BATCH", "SMALL_LONE", "SMALL_GELU", "SMALL_PRODUCT", "TINY", "LONE"
    for name in sizes:
        monkeypatch.setattr(fused, name, 0)
    monkeypatch.setattr(likelihood, "KEPT_BYTES", 0)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """finished(options): the folder of a run in one go, which all files share."""
    folders = {}

    def finished(options):
        if tuple(options) not in folders:
            folder = tmp_path_factory.mktemp("finished")
            status, text = Run([*options, "--save_dir", folder], folder / "out").wait()
            assert status == 0, text
            folders[tuple(options)] = folder / "test"
        return folders[tuple(options)]

    return finished


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """ema.th, the weights of the preset digits; a.png and b.jpg, pictures of another size."""
    return write_sample_folder(tmp_path_factory.mktemp("sample"))


@pytest.fixture
def run(folder, tmp_path, monkeypatch):
    """run("samples --n 4"): sample.py in this process, in a folder of its own."""
    return sample_in(folder, tmp_path, monkeypatch)
