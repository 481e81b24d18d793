"""Checks of what runs on a GPU: against the CPU, of waits, graphs, files. gpu.py runs them.

A check takes the device and gives (whether all is well, None where that can't be asked; figures).
"""

import copy
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
from batches import Images, make_loader
from checkpoints import write_checkpoint
from graphs import steps_of
from image_sets import IMAGE_SETS
from noise import image_generators
from optimizers import make_optimizer
from precision import allow_tf32
from presets import get_hparams
from steps import Steps
from train_helpers import load_vaes
from vae import VAE
from weights import load_model

MODES = {
    "fp32": {},
    "bf16": {"precision": "bf16"},
    "bf16, checkpointed": {"precision": "bf16", "checkpoint_activations": True},
    "bf16, graph": {"precision": "bf16", "cuda_graphs": True},
    "bf16, graph, checkpointed": {
        "precision": "bf16",
        "cuda_graphs": True,
        "checkpoint_activations": True,
    },
}
# Of figures on the GPU against those of the CPU in float32: the loss, and the gradients' norm.
TOLERANCE = {"fp32": 1e-4, "tf32": 1e-2, "bf16": 3e-2}
# A network that takes little time, of cifar10's kind.
SHORT = {
    "enc_blocks": "32x2,32d2,16x1,16d2,8d2,4d4,1x1",
    "dec_blocks": "1x1,4m1,8m4,16m8,16x1,32m16,32x2",
    "width": 96,
}

# ---- models and batches --------------------------------------------------------------------


def hparams(preset, device, **options):
    """A preset's hyperparameters, for one process on a device."""
    H = get_hparams(preset, **(SHORT if preset == "cifar10" and options.pop("short", 0) else {}))
    size = IMAGE_SETS[H.dataset].image_size if H.dataset in IMAGE_SETS else None
    H.update(image_size=H.image_size or size, image_channels=H.image_channels or 3)
    H.update(device=device, seed=0, local_rank=0, mpi_size=1, **options)
    return H


def batch_of(H, n, seed=0):
    """Input and target of random levels, (n, S, S, channels) each, on H.device."""
    generator = torch.Generator().manual_seed(seed)
    shape = n, H.image_size, H.image_size, H.image_channels
    levels = torch.randint(0, 256, shape, generator=generator).float()
    return tuple(t.to(H.device) for t in ((levels - 120) / 64, levels / 127.5 - 1))


def trainer(H):
    """The Steps of a new model, its EMA and its optimizer, as a run makes them."""
    torch.manual_seed(0)
    allow_tf32(H.precision == "tf32")
    vae, ema = load_vaes(H, lambda *_, **__: None)
    optimizer, _ = make_optimizer(vae.parameters(), H, use_apex=False)
    return steps_of(H, (vae, ema, optimizer), True, functions())


def functions():
    return train.get_cpu_stats_over_ranks, train.update_ema


def take(one, n_steps, n=None):
    """(statistics, weights) of steps of a Steps, on batches of n images."""
    H, stats = one.H, []
    n = n or H.n_batch * (H.grad_accum or 1)
    for step in range(n_steps):
        torch.manual_seed(step)
        stats.append(one.launch(*batch_of(H, n, step), None, step, *functions()).read())
    return stats, [p.detach().clone() for p in one.parameters]


def apart(tensors, others):
    """The distance of two lists of tensors over the length of the first."""
    pairs = zip(tensors, others, strict=True)
    distance = sum((a.double() - b.double()).square().sum() for a, b in pairs)
    return (distance / sum(a.double().square().sum() for a in tensors)).sqrt().item()


# ---- checks --------------------------------------------------------------------------------


def check_precision(device, precision):
    """Loss and gradients' norm against the CPU's in float32, with the same noise."""
    H = hparams("cifar10", device, short=True, precision=precision)
    torch.manual_seed(0)
    cpu = VAE(H)
    figures = []
    for vae, where in ((cpu, "cpu"), (copy.deepcopy(cpu).to(device), device)):
        allow_tf32(precision == "tf32")
        x, target = (t.to(where) for t in batch_of(H, 4))
        kind = precision if vae is not cpu else "fp32"
        with train.forward_precision(kind, where):
            loss = vae(x, target, generators=image_generators(range(4), 0))["elbo"]
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in vae.parameters()])
        figures.append((loss.item(), norm.item()))
    off = [abs(a / b - 1) for a, b in zip(*figures, strict=True)]
    return max(off) < TOLERANCE[precision], f"loss {off[0]:.1e}, gradients {off[1]:.1e}"


def check_no_wait(device):
    """A step up to the read of its statistics makes the processor wait for nothing."""
    for options in MODES.values():
        one = trainer(hparams("cifar10", device, short=True, n_batch=4, **options))
        take(one, 2)
        batch = batch_of(one.H, 4)
        torch.cuda.set_sync_debug_mode("error")
        try:
            launched = one.launch(*batch, None, 2, *functions())
        finally:
            torch.cuda.set_sync_debug_mode("default")
        launched.read()
    return True, ""


def check_alike(device, options, tolerance, n=None, against=None):
    """Three steps with options against the plain eager ones: the weights that they lead to."""
    weights = []
    for more in (against or {}, options):
        one = trainer(hparams("cifar10", device, short=True, n_batch=4, lr=1e-3, **more))
        for size in (None, n, None) if n else (None,):
            _, found = take(one, 1 if n else 3, size)
        weights.append(found)
    off = apart(*weights)
    return off <= tolerance, f"weights {off:.1e}"


def check_pictures(device):
    """Pictures and an evaluation between the steps of a graph."""
    one = trainer(hparams("cifar10", device, short=True, n_batch=4, cuda_graphs=True))
    H = one.H
    H.update(num_variables_visualize=1, num_temperatures_visualize=1, desc="gpu")
    take(one, 2)
    images = Images(torch.randint(0, 256, (6, 32, 32, 3), dtype=torch.uint8).numpy())
    train.evaluate(H, one.ema_vae, images, lambda batch: batch_of(H, len(batch[0])))
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "samples.png"))
        train.write_images(H, one.ema_vae, images.array[:2], batch_of(H, 2)[0], path, print)
        made = Path(path).stat().st_size > 1000
    stats, _ = take(one, 1)
    return made and stats[0]["skipped_updates"] == 0, ""


def check_apex(device):
    """NVIDIA Apex's step against AdamW's, where it is."""
    weights = []
    for use_apex in (False, True):
        H = hparams("cifar10", device, short=True, n_batch=4, lr=1e-3)
        torch.manual_seed(0)
        vae, ema = load_vaes(H, lambda *_, **__: None)
        optimizer, name = make_optimizer(vae.parameters(), H, use_apex)
        if use_apex and "Apex F" not in name:
            return None, name
        weights.append(take(Steps(H, vae, ema, optimizer), 3)[1])
    off = apart(*weights)
    return off < 1e-4, f"weights {off:.1e}"


def check_files(device):
    """A save on the GPU, read on the CPU: the same weights, contiguous."""
    one = trainer(hparams("cifar10", device, short=True, n_batch=4))
    take(one, 1)
    with tempfile.TemporaryDirectory() as folder:
        one.H.save_dir = folder
        write_checkpoint(str(Path(folder, "latest")), one.vae, one.ema_vae, one.optimizer, one.H)
        model = load_model(Path(folder, "latest-model.th"), one.H.copy(), "cpu")
        opt = torch.load(Path(folder, "latest-opt.th"), weights_only=True)
    there = [p.detach().cpu() for p in one.parameters]
    same = all(map(torch.equal, there, model.parameters()))
    moments = [s["exp_avg"] for s in opt["state"].values()]
    return same and all(t.is_contiguous() for t in moments), ""


def check_pinned(device):
    """Batches of the loader lie in pinned memory."""
    H = hparams("cifar10", device, num_workers=0)
    images = Images(torch.zeros(8, 32, 32, 3, dtype=torch.uint8).numpy())
    [batch] = make_loader(H, images, batch_size=8)
    return batch[0].is_pinned(), ""


GRAPH = {"cuda_graphs": True}
CHECKS = {
    "fp32 as the CPU": lambda d: check_precision(d, "fp32"),
    "bf16 as the CPU": lambda d: check_precision(d, "bf16"),
    "tf32 as the CPU": lambda d: check_precision(d, "tf32"),
    "no wait before the read": check_no_wait,
    "checkpointed": lambda d: check_alike(d, {"checkpoint_activations": True}, 1e-5),
    "graph": lambda d: check_alike(d, GRAPH, 1e-5),
    "graph, accumulation": lambda d: check_alike(
        d, GRAPH | {"grad_accum": 2}, 1e-5, against={"grad_accum": 2}
    ),
    "graph, short batch": lambda d: check_alike(d, GRAPH, 1e-5, n=3),
    "graph, bf16, checkpointed": lambda d: check_alike(
        d, MODES["bf16, graph, checkpointed"], 1e-4, against={"precision": "bf16"}
    ),
    "compiled": lambda d: check_alike(d, {"compile": True}, 1e-3),
    "compiled, bf16": lambda d: check_alike(
        d, {"compile": True, "precision": "bf16"}, 3e-2, against={"precision": "bf16"}
    ),
    "pictures": check_pictures,
    "Apex": check_apex,
    "files": check_files,
    "pinned": check_pinned,
}


def run_check(name, device):
    torch.backends.cudnn.deterministic = True
    try:
        ok, detail = CHECKS[name](device)
    finally:
        torch.backends.cudnn.deterministic = False
        allow_tf32(False)
    return {"result": {True: "ok", False: "FAILED", None: "not here"}[ok], "detail": detail}
