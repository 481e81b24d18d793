import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    """The figures were measured on one thread, and several test processes share the machine."""
    torch.set_num_threads(1)
