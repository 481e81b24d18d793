"""The network on a "cuda:0" that is not there: `fake_cuda.py LIBRARY PRESET PRECISION TASK...`.

In a build of PyTorch without CUDA, FakeTensorMode carries shapes, types and devices through the
real code; nothing is computed. The library is fake_cuda.cpp's, loaded before the first fake tensor.
Prints "ready", then a line of JSON a task:

    calls: operators that compute, as benchmarks/bench.py counts them
    convolutions: {dtype of the input: how many}
    odd: {operator and place: how often} of those that met a CPU tensor or two devices, or read a
        number, before the read that is meant
    reads: reads that are meant, each [the figures of the step or the shape, the place]
"""

import collections
import ctypes
import importlib.util
import json
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
_torch = Path(
    importlib.util.find_spec("torch").origin
).parent  # not imported yet: the hooks come first
ctypes.CDLL(str(_torch / "lib" / "libtorch_cpu.so"), ctypes.RTLD_GLOBAL)
ctypes.CDLL(sys.argv[1])

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Else autocast warns and turns itself off.
torch.cuda.is_bf16_supported = lambda *_, **__: True
torch.cuda.amp.common.amp_definitely_not_available = lambda: False
# Else clipping takes fake tensors one by one: they are a class of their own.
torch.nn.utils.clip_grad._has_foreach_support = lambda *_: True


class Watch(TorchDispatchMode):
    """Counts operators, and notes those that no step on a GPU should meet."""

    def __init__(self):
        super().__init__()
        self.calls, self.convolutions, self.odd = 0, collections.Counter(), collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if "_local_scalar_dense" in name:
            self.odd[f"{name} {place()}"] += 1
            return 0.0  # a fake tensor has no number
        out = func(*args, **(kwargs or {}))
        self.calls += not func.is_view and not name.startswith("prim.")  # those ask for a device
        leaves = [t for t in tree_leaves((args, kwargs, out)) if torch.is_tensor(t)]
        if "convolution" in name:
            self.convolutions[str(args[0].dtype).removeprefix("torch.")] += 1
        if {t.device.type for t in leaves} - {"cuda"}:
            self.odd[f"{name} {place()}"] += 1
        return out


def place():
    """Where in this project the call is made."""
    frames = [f for f in traceback.extract_stack() if Path(f.filename).parent == ROOT]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"


def probe():
    """What a step does, in small: an error here is of PyTorch's internals."""
    with FakeTensorMode(), torch.device("cuda"):
        conv, x = torch.nn.Conv2d(2, 2, 1), torch.empty(1, 2, 4, 4)
        optimizer = torch.optim.AdamW(conv.parameters(), fused=True)
        with torch.autocast("cuda", torch.bfloat16), Watch() as watch:
            conv(x).sum().backward()
        torch.nn.utils.clip_grad_norm_(conv.parameters(), 1.0)
        optimizer.step()
        weights = [p.detach() for p in conv.parameters()]
        torch._foreach_lerp_(weights, weights, 0.5)
    assert set(watch.convolutions) == {"bfloat16"} and not watch.odd
    print(json.dumps("ready"), flush=True)


probe()

import steps
import train
from hps import get_hparams
from train_helpers import OneProcess
from vae import VAE

# A short network of cifar10's kind, for tests that may not take long.
SHORT = {"enc_blocks": "32x2,32d2,16d2,8d2,4d4,1x1", "dec_blocks": "1x1,4m1,8m4,16m8,32m16,32x2"}


class Read(Exception):
    """Ends a task at the read that is meant."""


def meant(reads):
    """In the place of Tensor.cpu and steps.reading: notes the read; what it gives is no figure."""

    def cpu(t):
        reads.append([list(t.shape), str(t.dtype).removeprefix("torch."), place()])
        raise Read

    def reading(vector):
        reads.append([list(vector.shape), str(vector.dtype).removeprefix("torch."), place()])
        return lambda: [0.0] * len(vector)

    return cpu, reading


def main(preset, precision, tasks):
    H = get_hparams("cifar10", **SHORT) if preset == "short" else get_hparams(preset)
    H.update(device="cuda:0", precision=precision)
    mode = FakeTensorMode()
    with mode, torch.device("cuda"):
        vae, ema = VAE(H), VAE(H).requires_grad_(False)
        x = torch.empty(H.n_batch, H.image_size, H.image_size, H.image_channels)
    model = OneProcess(vae)

    optimizer = torch.optim.AdamW(model.parameters(), lr=H.lr, betas=(0.9, 0.9), fused=True)

    with mode:
        for p in vae.parameters():  # as after a first step
            moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[p] = {"step": torch.zeros((), device=x.device)} | moments
    optimizer.applied_updates = 1
    one, copies = steps.Steps(H, model, ema, optimizer), []
    if precision == "bf16":  # what is made once counts as no call
        with mode:
            one.copies = [torch.empty_like(p, dtype=torch.bfloat16) for p in one.parameters]
            copies = [t.clone() for t in one.copies]

    def step():
        one.launch(x, x, None, 0, train.get_cpu_stats_over_ranks, train.update_ema).read()

    def evaluate():
        casting = steps.casting(H, list(ema.parameters()), copies)
        with torch.no_grad(), casting, train.forward_precision(precision, x.device):
            sum(ema(x, x).values()).cpu()

    def latents():
        with torch.no_grad():
            torch.cat([s["z"].flatten() for s in ema.forward_get_latents(x)]).cpu()

    def sample():
        ema.forward_uncond_samples(len(x), t=0.9)

    calls = {"train": step, "evaluate": evaluate, "latents": latents, "sample": sample}
    for task in tasks:
        reads = []
        torch.Tensor.cpu, steps.reading = meant(reads)
        with mode, Watch() as watch:
            try:
                calls[task]()
            except Read:
                pass
        print(json.dumps({"task": task, "calls": watch.calls, "convolutions": watch.convolutions,
                          "odd": watch.odd, "reads": reads}), flush=True)  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[2:4], sys.argv[4:])
