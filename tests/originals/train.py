"""Stand-in for the original's `train`: its loop, its evaluation in full batches, its pictures."""

import os
import time

import imageio.v3 as imageio
import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from data import set_up_data
from train_helpers import (
    accumulate_stats,
    load_opt,
    load_vaes,
    save_model,
    set_up_hyperparams,
    update_ema,
)
from utils import get_cpu_stats_over_ranks


def training_step(H, data_input, target, vae, ema_vae, optimizer, iterate):
    start = time.time()
    vae.zero_grad()
    stats = vae.forward(data_input, target)
    stats["elbo"].backward()
    grad_norm = torch.nn.utils.clip_grad_norm_(vae.parameters(), H.grad_clip).item()
    stats["rate_nans"] = torch.isnan(stats["rate"])
    stats["distortion_nans"] = torch.isnan(stats["distortion"])
    stats = get_cpu_stats_over_ranks(stats)
    nans = stats["rate_nans"] > 0 or stats["distortion_nans"] > 0
    stats["skipped_updates"] = 1.0
    if not nans and (H.skip_threshold == -1 or grad_norm < H.skip_threshold):
        stats["skipped_updates"] = 0.0
        optimizer.step()
        update_ema(vae, ema_vae, H.ema_rate)
    stats["grad_norm"] = grad_norm
    stats["iter_time"] = time.time() - start
    return stats


def eval_step(data_input, target, ema_vae):
    with torch.no_grad():
        return get_cpu_stats_over_ranks(ema_vae.forward(data_input, target))


def get_sample_for_visualization(data, preprocess_fn, num, dataset):
    """(uint8 originals, the network's input) of the first `num` images."""
    batch = next(iter(DataLoader(data, batch_size=num)))
    return batch[0], preprocess_fn(batch)[0]


def train_loop(H, data_train, data_valid, preprocess_fn, vae, ema_vae, logprint):
    optimizer, scheduler, cur_eval_loss, iterate, starting_epoch = load_opt(H, vae, logprint)
    sampler = DistributedSampler(data_train, num_replicas=H.mpi_size, rank=H.rank, seed=H.seed)
    viz_original, viz_processed = get_sample_for_visualization(
        data_valid, preprocess_fn, H.num_images_visualize, H.dataset
    )
    early = {1} | {2**k for k in range(3, 14)}
    stats, steps_of_this_run = [], 0
    for epoch in range(starting_epoch, H.num_epochs):
        sampler.set_epoch(epoch)
        loader = DataLoader(data_train, batch_size=H.n_batch, drop_last=True, sampler=sampler)
        for batch in loader:
            data_input, target = preprocess_fn(batch)
            step = training_step(H, data_input, target, vae, ema_vae, optimizer, iterate)
            stats.append(step)
            scheduler.step()
            iterate += 1
            steps_of_this_run += 1
            if iterate % H.iters_per_print == 0 or steps_of_this_run in early:
                logprint(
                    model=H.desc,
                    type="train_loss",
                    lr=scheduler.get_last_lr()[0],
                    epoch=epoch,
                    step=iterate,
                    **accumulate_stats(stats, H.iters_per_print),
                )
            if iterate % H.iters_per_images == 0 or (
                steps_of_this_run in early and H.dataset != "ffhq_1024"
            ):
                fname = os.path.join(H.save_dir, f"samples-{iterate}.png")
                write_images(H, ema_vae, viz_original, viz_processed, fname, logprint)
            if iterate % H.iters_per_save == 0 and H.rank == 0 and np.isfinite(stats[-1]["elbo"]):
                save_model(os.path.join(H.save_dir, "latest"), vae, ema_vae, optimizer, H)
            if iterate % H.iters_per_ckpt == 0 and H.rank == 0:
                save_model(os.path.join(H.save_dir, f"iter-{iterate}"), vae, ema_vae, optimizer, H)
        if (epoch + 1) % H.epochs_per_eval == 0:
            valid_stats = evaluate(H, ema_vae, data_valid, preprocess_fn)
            event = dict(model=H.desc, type="eval_loss", epoch=epoch, step=iterate)
            logprint(**event, **valid_stats)


def evaluate(H, ema_vae, data_valid, preprocess_fn):
    """Means over the full batches of a shuffled set; images that fill no batch are left out."""
    sampler = DistributedSampler(data_valid, num_replicas=H.mpi_size, rank=H.rank)
    loader = DataLoader(data_valid, batch_size=H.n_batch, drop_last=True, sampler=sampler)
    steps = [eval_step(*preprocess_fn(batch), ema_vae) for batch in loader]
    elbos = np.array([step["elbo"] for step in steps])
    means = {key: float(np.mean([step[key] for step in steps])) for key in steps[-1]}
    filtered = float(elbos[np.isfinite(elbos)].mean())
    return dict(n_batches=len(steps), filtered_elbo=filtered, **means)


def write_images(H, ema_vae, viz_batch_original, viz_batch_processed, fname, logprint):
    """A PNG: originals, decoded from the first k latents, sampled at four temperatures."""
    n = len(viz_batch_original)
    rows = [np.asarray(viz_batch_original)]
    with torch.no_grad():
        latents = [s["z"] for s in ema_vae.forward_get_latents(viz_batch_processed)]
        for k in np.linspace(0, len(latents), H.num_variables_visualize + 2).astype(int)[1:-1]:
            rows.append(ema_vae.forward_samples_set_latents(n, latents[:k], t=0.1))
        for t in (1.0, 0.9, 0.8, 0.7)[: H.num_temperatures_visualize]:
            rows.append(ema_vae.forward_uncond_samples(n, t=t))
    logprint(f"printing samples to {fname}")
    imageio.imwrite(fname, np.concatenate([np.concatenate(row, axis=1) for row in rows]))


def run_test_eval(H, ema_vae, data_test, preprocess_fn, logprint):
    stats = evaluate(H, ema_vae, data_test, preprocess_fn)
    logprint(type="test_loss", **stats)


def main():
    H, logprint = set_up_hyperparams()
    H, data_train, data_valid_or_test, preprocess_fn = set_up_data(H)
    vae, ema_vae = load_vaes(H, logprint)
    if H.test_eval:
        run_test_eval(H, ema_vae, data_valid_or_test, preprocess_fn, logprint)
    else:
        train_loop(H, data_train, data_valid_or_test, preprocess_fn, vae, ema_vae, logprint)


if __name__ == "__main__":
    main()
