"""Who this process is, by the launchers' variables; its device."""

import pytest
import torch

import launchers
from errors import UserError
from launchers import HANDS, SLURM, World, find_world, resolve_device

SRUN = {"SLURM_PROCID": "3", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}  # fmt: skip


TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}


@pytest.mark.parametrize(
    "env, world",
    [
        ({}, World()),
        (TORCHRUN, World(5, 8, 1, 4, HANDS)),
        (SRUN, World(3, 4, 1, 2, SLURM)),
        (SRUN | TORCHRUN | {"TORCHELASTIC_RUN_ID": "none"}, World(5, 8, 1, 4, launchers.TORCHRUN)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, World()),  # a batch script, no job step
    ],
)
def test_world(env, world):
    assert find_world(env) == world


@pytest.mark.parametrize(
    "env, words",
    [
        (TORCHRUN | {"RANK": "8"}, ["rank 8 of 8"]),
        (TORCHRUN | {"RANK": "-1"}, ["rank -1 of 8"]),
        (TORCHRUN | {"WORLD_SIZE": "many"}, ["WORLD_SIZE", "'many'"]),
        (SRUN | {"SLURM_PROCID": ""}, ["SLURM_PROCID", "''"]),
        ({"PMI_SIZE": "x"}, ["PMI_SIZE", "'x'"]),
        ({"OMPI_COMM_WORLD_SIZE": "5"}, ["started 5", "sees 1", "torchrun"]),
    ],
)
def test_launchers_variables_that_make_no_sense(env, words):
    with pytest.raises(UserError) as error:
        find_world(env)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == resolve_device(None) == resolve_device("cpu") == "cpu"
    with pytest.raises(UserError, match="--device cuda.*--device cpu"):
        resolve_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(launchers, "world", lambda: World(5, 8, 1, 4, HANDS))
    assert resolve_device("auto") == resolve_device("cuda") == "cuda:1"
    assert resolve_device("cpu") == resolve_device(torch.device("cpu")) == "cpu"
    assert resolve_device("cuda:0") == resolve_device(torch.device("cuda:0")) == "cuda:0"
    monkeypatch.setattr(launchers, "world", lambda: World(6, 8, 2, 4, HANDS))
    with pytest.raises(UserError, match="local rank 2.*this host has 2"):
        resolve_device("auto")
