"""The README's commands for trained weights, and its Python example, with tiny numbers."""

import re
import shlex
import subprocess
import sys
import time

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from golden import weight
from PIL import Image
from test_commands import README, USING, run_until
from test_plot import steps, write_log
from test_processes import REPO, environment

from hps import get_hparams
from vae import VAE

EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """saved_models/digits with weights and a log, a.png and b.png; latents.npz is encode's."""
    folder = tmp_path_factory.mktemp("use")
    run = folder / "saved_models" / "digits"
    run.mkdir(parents=True)
    vae = VAE(get_hparams("digits"))
    state = {k: weight(k, v.shape) for k, v in vae.state_dict().items()}
    torch.save(state, run / "latest-model-ema.th")
    write_log(run / "log.jsonl", steps(range(100, 2000, 100)))
    for name in ("a.png", "b.png"):
        pixels = np.random.RandomState(len(name)).randint(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder


def outputs(folder):
    return {p: p.stat().st_mtime_ns for p in folder.iterdir() if p.suffix in (".png", ".npz")}


@pytest.mark.parametrize("command", USING)
def test_command(command, folder):
    words = shlex.split(re.sub(r"--(n|iw_samples) \d{3,}", r"--\1 20", command))
    words = [sys.executable, str(REPO / words[1]), *words[2:]]
    if "--tensorboard" in words:
        run_until(words, environment(), folder, "type: train_loss")
        return
    if "train.py" not in command:
        words += ["--force"] * ("sample.py" in command)
    before = outputs(folder)
    done = subprocess.run(words, cwd=folder, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    if "train.py" in command:
        expected = "type: test_loss" if "--test_eval" in command else "memory    about"
        assert expected in done.stdout
        assert "--test_eval" not in command or "iw_bits_per_dim: " in done.stdout
        return
    [made] = [p for p, when in outputs(folder).items() if before.get(p) != when]
    assert done.stdout.startswith(f"{made.name}: ")
    if made.suffix == ".png":
        assert imageio.imread(made).std() > 10


@pytest.mark.parametrize("example", EXAMPLES)
def test_example(example, folder):
    env = environment(PYTHONPATH=str(REPO))
    start = time.time()
    done = subprocess.run([sys.executable, "-c", example], cwd=folder, env=env, text=True,
                          capture_output=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name in re.findall(r'\.save\("(.*?)"\)', example):
        assert (folder / name).stat().st_mtime >= start - 1
