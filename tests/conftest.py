import pytest
import torch

import vae_helpers


@pytest.fixture(autouse=True)
def _one_thread():
    """The figures were measured on one thread, and several test processes share the machine."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _as_large(monkeypatch):
    """Tiny networks compute as large ones do (test_speed.py has both ways)."""
    monkeypatch.setattr(vae_helpers, "SMALL", 0)
