"""Stand-in for the original's `train_helpers`, in one process on the CPU, with AdamW.

A fork that keeps its own knows of no --resume and of no device: a run goes on by the four
--restore_* options, with the step that a log tells and the warm-up from its start.
"""

import argparse
import contextlib
import json
import os
import shutil

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from data import mkdir_p
from hps import Hyperparams, add_vae_arguments, parse_args_and_update_hparams
from utils import local_mpi_rank, logger, maybe_download, mpi_rank, mpi_size
from vae import VAE


def set_up_hyperparams(s=None):
    H = Hyperparams()
    parser = argparse.ArgumentParser()
    add_vae_arguments(parser)
    parse_args_and_update_hparams(H, parser, s=s)
    setup_mpi(H)
    setup_save_dirs(H)
    logprint = logger(H.logdir)
    for key in sorted(H):
        logprint(type="hparam", key=key, value=H[key])
    np.random.seed(H.seed)
    torch.manual_seed(H.seed)
    logprint("training model", H.desc, "on", H.dataset)
    return H, logprint


def setup_mpi(H):
    H.mpi_size = mpi_size()
    H.local_rank = local_mpi_rank()
    H.rank = mpi_rank()


def setup_save_dirs(H):
    H.save_dir = os.path.join(H.save_dir, H.desc)
    mkdir_p(H.save_dir)
    H.logdir = os.path.join(H.save_dir, "log")


@contextlib.contextmanager
def first_rank_first(local_rank, mpi_size):
    if mpi_size > 1 and local_rank > 0:
        dist.barrier()
    try:
        yield
    finally:
        if mpi_size > 1 and local_rank == 0:
            dist.barrier()


def distributed_maybe_download(path, local_rank, mpi_size):
    with first_rank_first(local_rank, mpi_size):
        return maybe_download(path)


class _Wrapped(nn.Module):
    """What the original's DistributedDataParallel is to one process: `module`, called."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def load_vaes(H, logprint):
    """(model, its VAE in .module, and the EMA), each built, so that initial weights draw twice."""
    vae = VAE(H)
    if H.restore_path:
        logprint(f"Restoring vae from {H.restore_path}")
        restore_params(vae, H.restore_path, H.local_rank, H.mpi_size, map_cpu=True)
    ema_vae = VAE(H)
    if H.restore_ema_path:
        logprint(f"Restoring ema vae from {H.restore_ema_path}")
        restore_params(ema_vae, H.restore_ema_path, H.local_rank, H.mpi_size, map_cpu=True)
    else:
        ema_vae.load_state_dict(vae.state_dict())
    ema_vae.requires_grad_(False)
    return _Wrapped(vae), ema_vae


def load_opt(H, vae, logprint):
    """(optimizer, scheduler, cur_eval_loss, iterate, starting_epoch)."""
    betas = H.adam_beta1, H.adam_beta2
    optimizer = torch.optim.AdamW(vae.parameters(), weight_decay=H.wd, lr=H.lr, betas=betas)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, linear_warmup(H.warmup_iters))
    cur_eval_loss, iterate, starting_epoch = float("inf"), 0, 0
    if H.restore_optimizer_path:
        path = distributed_maybe_download(H.restore_optimizer_path, H.local_rank, H.mpi_size)
        optimizer.load_state_dict(torch.load(path, map_location="cpu"))
    if H.restore_log_path:
        restored = restore_log(H.restore_log_path, H.local_rank, H.mpi_size)
        cur_eval_loss, iterate, starting_epoch = restored
    logprint("starting at epoch", starting_epoch, "iterate", iterate)
    return optimizer, scheduler, cur_eval_loss, iterate, starting_epoch


def restore_params(model, path, local_rank, mpi_size, map_ddp=True, map_cpu=False):
    """Loads a .th file strictly, under map_ddp its names without their first `module.`."""
    path = distributed_maybe_download(path, local_rank, mpi_size)
    state_dict = torch.load(path, map_location="cpu" if map_cpu else None)
    if map_ddp:
        state_dict = {name.removeprefix("module."): t for name, t in state_dict.items()}
    model.load_state_dict(state_dict)


def restore_log(path, local_rank, mpi_size):
    """(lowest eval elbo, the largest step and epoch of the train_loss lines)."""
    with open(distributed_maybe_download(path, local_rank, mpi_size)) as file:
        events = [json.loads(line) for line in file]
    evals = [event["elbo"] for event in events if event.get("type") == "eval_loss"]
    train = [event for event in events if event.get("type") == "train_loss"]
    step, epoch = (max(event[key] for event in train) for key in ("step", "epoch"))
    return min(evals, default=float("inf")), step, epoch


def save_model(path, vae, ema_vae, optimizer, H):
    torch.save(vae.state_dict(), f"{path}-model.th")
    torch.save(ema_vae.state_dict(), f"{path}-model-ema.th")
    torch.save(optimizer.state_dict(), f"{path}-opt.th")
    shutil.copyfile(os.path.join(H.save_dir, "log.jsonl"), f"{path}-log.jsonl")


def update_ema(vae, ema_vae, ema_rate):
    for ema, p in zip(ema_vae.parameters(), vae.parameters(), strict=True):
        ema.data.mul_(ema_rate).add_(p.data * (1 - ema_rate))


def accumulate_stats(stats, frequency):
    """One dict for a log line from the dicts of the last `frequency` steps."""
    result = {}
    for key in stats[-1]:
        values = np.array([s[key] for s in stats[-frequency:]])
        finite = values[np.isfinite(values)]
        if key in ("rate_nans", "distortion_nans", "skipped_updates"):
            result[key] = float(values.sum())
        elif key == "grad_norm":
            result[key] = float(finite.max()) if len(finite) else 0.0
        else:
            result[key] = float(values.mean())
            if key == "elbo":
                result["elbo_filtered"] = float(finite.mean()) if len(finite) else float("nan")
    return result


def linear_warmup(warmup_iters):
    """The factor step / warmup_iters, up to 1; the first step's is 0."""

    def factor(step):
        return min(1.0, step / warmup_iters)

    return factor
