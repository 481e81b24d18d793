# PYTHON_ARGCOMPLETE_OK
"""Trains a very deep VAE, or evaluates one on its test set: `python train.py --hps PRESET`.

The same file runs under mpiexec, torchrun and srun. Losses are in nats per dimension (a
dimension: one of the three levels of a pixel); bits_per_dim is elbo / ln 2.
"""

import contextlib
import math
import os
import time
from collections import deque

import imageio.v3 as imageio
import numpy as np
import torch
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from data import EpochBatches, make_loader, set_up_data
from hps import UserError, result_notice
from reports import log_evaluation, progress, summary, with_tensorboard
from train_helpers import (
    accumulate_stats,
    claim_run,
    load_opt,
    load_vaes,
    open_run,
    prepare_run,
    remove_old_sets,
    resume_run,
    save_run,
    update_ema,
    write_bytes,
)
from utils import (
    Stopped,
    allreduce,
    get_cpu_stats_over_ranks,
    heartbeat,
    image_generators,
    mpi_rank,
    mpi_size,
    noise_seed,
    run_command,
    stop,
    tile_images,
)
from vae_helpers import forward_precision, nats_to_bits

# The purposes of random numbers: each is a seed of its own, a function of the run's seed.
TRAINING, EVALUATION, PICTURES, IMPORTANCE = range(4)

# Steps of this run at which to log and draw besides the regular ones: progress from the start.
EARLY_STEPS = {1} | {2**k for k in range(3, 14)}


def training_step(H, data_input, target, vae, ema_vae, optimizer, iterate):
    """One step on a batch of input and target (N, R, R, 3), in H.grad_accum parts.

    The update is skipped, on all ranks alike, if any saw a NaN or if the gradient norm, before
    clipping, is not below H.skip_threshold.

    Returns:
        floats: elbo, distortion, rate (batch means over all ranks), rate_nans, distortion_nans
        and skipped_updates (each 0 or 1), grad_norm, iter_time in seconds.
    """
    start = time.perf_counter()
    vae.zero_grad(set_to_none=True)
    batches, parts = [t.chunk(H.grad_accum or 1) for t in (data_input, target)], []
    for last, part in enumerate(zip(*batches, strict=True), start=1 - len(batches[0])):
        # The processes average their gradients once, with those of the last part.
        with vae.no_sync() if last < 0 else contextlib.nullcontext():
            with forward_precision(H.precision, data_input.device):
                parts.append(vae(*part))
            (parts[-1]["elbo"] / len(batches[0])).backward()
    stats = {key: torch.stack([p[key].detach() for p in parts]).mean() for key in parts[0]}
    norm = torch.nn.utils.clip_grad_norm_(vae.parameters(), H.grad_clip)
    stats = get_cpu_stats_over_ranks(  # the step's one wait for the device
        {
            **stats,
            "rate_nans": stats["rate"].isnan(),
            "distortion_nans": stats["distortion"].isnan(),
            "grad_norm": norm,
            "stop": float(stop.signal is not None),
        }
    )
    stop.agreed = stats.pop("stop") > 0
    for key in ("rate_nans", "distortion_nans"):
        stats[key] = float(stats[key] > 0)  # on any rank
    limit = math.inf if H.skip_threshold == -1 else H.skip_threshold
    # A norm that is infinite or NaN is below no limit: it never reaches the weights.
    apply = not stats["rate_nans"] and not stats["distortion_nans"] and stats["grad_norm"] < limit
    if apply:
        optimizer.step()
        update_ema(vae, ema_vae, H.ema_rate)
    return {**stats, "skipped_updates": float(not apply), "iter_time": time.perf_counter() - start}


@torch.no_grad()
def eval_step(data_input, target, ema_vae):
    """Floats elbo, distortion and rate: means over a batch (N, R, R, 3) and the ranks."""
    return get_cpu_stats_over_ranks(ema_vae(data_input, target))


@torch.inference_mode()
def evaluate(H, ema_vae, data_valid, preprocess_fn):
    """Scores every image of a data set once, whatever the batch size and number of processes.

    An image's noise is a function of H.seed and its index, so the figures are the same for any
    n_batch and any number of processes, to rounding.

    Returns:
        n_batches, n_images; elbo, distortion and rate, means over images in nats per dimension;
        filtered_elbo, over the images where it is finite; bits_per_dim; rate_per_layer, a list;
        with H.iw_samples also iw_elbo, the importance-weighted bound, and iw_bits_per_dim; and
        where figures on the data set must not be compared with published ones, a notice.

    Raises:
        Stopped: if a signal asked for it.
    """
    mine = Subset(data_valid, range(mpi_rank(), len(data_valid), mpi_size()))
    loader = make_loader(H, mine, batch_size=H.n_batch)
    # Sums over images: count, elbo, finite elbos, how many those are, distortion, rate, batches;
    # then whether the rank was asked to stop.
    totals = torch.zeros(8, dtype=torch.float64)
    # The same of each layer's rate and, last, of the importance-weighted bound.
    more = torch.zeros(len(ema_vae.decoder.dec_blocks) + 1, dtype=torch.float64)
    for batch in tqdm(loader, "evaluating", disable=None if mpi_rank() == 0 else True):
        heartbeat()
        if stop.requested():
            totals[7] = 1
            break
        first = int(totals[0])
        indices = mine.indices[first : first + len(batch[0])]
        x, target = preprocess_fn(batch)
        with forward_precision(H.precision, x.device):
            distortion, rates = ema_vae.distortion_and_rate(
                x, target, image_generators(indices, H.seed, EVALUATION), per_layer=True
            )
        distortion, rates = distortion.double().cpu(), rates.double().cpu()  # (N,), (layers, N)
        rate = rates.sum(dim=0)  # (N,)
        elbo = distortion + rate
        more[:-1] += rates.sum(dim=1)
        if H.iw_samples:
            # The first sample is the ELBO's own: with one, the two are the same.
            def noise(k, indices=indices):
                return image_generators(indices, H.seed, *((IMPORTANCE, k) if k else (EVALUATION,)))

            with forward_precision(H.precision, x.device):
                bound = ema_vae.importance_weighted_elbo(x, target, H.iw_samples, noise)  # (N,)
            more[-1] += bound.sum().cpu()
        finite = elbo.isfinite()
        totals += torch.stack(
            [
                torch.tensor(len(elbo)),
                elbo.sum(),
                elbo[finite].sum(),
                finite.sum(),
                distortion.sum(),
                rate.sum(),
                torch.tensor(1),
                torch.tensor(0),
            ]
        )
    totals = allreduce(totals.to(H.device or "cpu"), average=False).tolist()
    n_images, elbo, finite_elbo, n_finite, distortion, rate, n_batches, stopped = totals
    if stopped:
        raise Stopped("stopped in an evaluation")
    *rate_per_layer, bound = (allreduce(more.to(H.device or "cpu"), False) / n_images).tolist()
    figures = {
        "n_batches": int(n_batches),
        "n_images": int(n_images),
        "filtered_elbo": finite_elbo / n_finite if n_finite else math.nan,
        "elbo": elbo / n_images,
        "distortion": distortion / n_images,
        "rate": rate / n_images,
        "bits_per_dim": nats_to_bits(elbo / n_images),
        "rate_per_layer": rate_per_layer,
        **result_notice(H.dataset),
    }
    if H.iw_samples:
        figures |= {"iw_elbo": bound, "iw_bits_per_dim": nats_to_bits(bound)}
    return figures


def run_test_eval(H, ema_vae, data_test, preprocess_fn, logprint):
    """Logs a `test_loss` line for the EMA weights and returns its figures."""
    logprint("evaluating on the test set")
    stats = evaluate(H, ema_vae, data_test, preprocess_fn)
    log_evaluation(H, ema_vae, stats, logprint, "test", type="test_loss")
    return stats


def get_sample_for_visualization(data, preprocess_fn, num, dataset):
    """The first `num` images: (uint8 (num, R, R, 3), network input). `dataset` is not used."""
    batch = next(iter(DataLoader(data, batch_size=num)))
    return batch[0], preprocess_fn(batch)[0]


@torch.no_grad()
def write_images(H, ema_vae, viz_batch_original, viz_batch_processed, fname, logprint):
    """Writes a PNG with a column per image (uint8 (N, R, R, 3), and as input) and rows of:

    the originals; num_variables_visualize rows decoded from the first k latents, k evenly spaced
    over the layers, the rest sampled at t = 0.1; num_temperatures_visualize rows of samples at
    t = 1.0, 0.9, 0.8, 0.7. Images under 32 pixels are enlarged and set apart, to be legible.
    """
    n = len(viz_batch_original)
    latents = [s["z"] for s in ema_vae.forward_get_latents(viz_batch_processed)]
    rows = [np.asarray(viz_batch_original)]
    for row in range(1, H.num_variables_visualize + 1):
        k = row * len(latents) // (H.num_variables_visualize + 1)
        rows.append(ema_vae.forward_samples_set_latents(n, latents[:k], t=0.1))
    for t in (1.0, 0.9, 0.8, 0.7)[: H.num_temperatures_visualize]:
        rows.append(ema_vae.forward_uncond_samples(n, t=t))
    logprint(f"writing pictures to {fname}")
    zoom = max(1, 32 // rows[0].shape[1])
    images = np.concatenate(rows).repeat(zoom, axis=1).repeat(zoom, axis=2)
    picture = tile_images(images, len(rows), n, border=zoom // 2)
    write_bytes(fname, imageio.imwrite("<bytes>", picture, extension=".png"))


def train_loop(H, data_train, data_valid, preprocess_fn, vae, ema_vae, logprint):
    """Trains to H.num_epochs, then evaluates, saves and draws.

    Raises:
        UserError: if there is no full batch to train on, the run's folder is in use, H.max_skips
            updates in a row were skipped, or the state can't be saved at the end.
        Stopped: if a signal asked for it; the state is saved.
    """
    # 1. What the steps need.
    optimizer, scheduler, _, iterate, starting_epoch = load_opt(H, vae, logprint)
    resumed = H.resumed or {}
    position = resumed.get("position", 0)  # images of the epoch that all ranks together have used
    first_iterate = resumed.get("first_step", iterate)
    stats = deque(resumed.get("stats", ()), maxlen=H.iters_per_print)
    skips = resumed.get("skips", 0)
    n_images = H.n_batch * (H.grad_accum or 1)  # of a step, in this process
    batches = EpochBatches(len(data_train), n_images, mpi_rank(), mpi_size(), H.seed)
    loader = make_loader(H, data_train, batch_sampler=batches)
    if not len(batches):
        raise UserError(
            f"--n_batch {H.n_batch} on {mpi_size()} processes: the {len(data_train)} training "
            f"images make no full batch; lower --n_batch or --grad_accum"
        )
    logprint(
        f"global batch: {n_images * mpi_size()} images a step ({H.n_batch} x {H.grad_accum or 1} "
        f"parts x {mpi_size()} processes)"
    )
    viz = get_sample_for_visualization(data_valid, preprocess_fn, H.num_images_visualize, H.dataset)
    claim_run(H)
    if starting_epoch >= H.num_epochs:
        logprint(f"nothing left to do: --num_epochs {H.num_epochs} are done, at step {iterate}")
        return

    def save(name, last=False):
        if mpi_rank() != 0:
            return
        state = {
            "step": iterate,
            "epoch": epoch,
            "position": position,
            "first_step": first_iterate,
            "skips": skips,
            "stats": list(stats),
        }
        try:
            save_run(os.path.join(H.save_dir, name), vae, ema_vae, optimizer, H, state)
            if H.keep_ckpts:
                remove_old_sets(H.save_dir, H.keep_ckpts)
        except OSError as error:
            failure = f"{name} is not saved at step {iterate} ({error}); the older files are whole"
            if last:
                raise UserError(f"{failure}: make room, then go on with --resume") from None
            logprint(f"WARNING: {failure}")

    def draw():
        if mpi_rank() == 0:
            torch.manual_seed(noise_seed(H.seed, PICTURES))
            fname = os.path.join(H.save_dir, f"samples-{iterate}.png")
            try:
                with forward_precision(H.precision, viz[1].device):
                    write_images(H, ema_vae, *viz, fname, logprint)
            except OSError as error:
                logprint(f"WARNING: no pictures at step {iterate} ({error})")

    def evaluate_and_log():
        try:
            figures = evaluate(H, ema_vae, data_valid, preprocess_fn)
        except Stopped:
            save("latest", last=True)
            raise
        event = dict(model=H.desc, type="eval_loss", epoch=epoch, step=iterate)
        log_evaluation(H, ema_vae, figures, logprint, iterate, **event)

    bar = progress(H.num_epochs * len(batches), iterate)
    for epoch in range(starting_epoch, H.num_epochs):
        batches.set_epoch(epoch, position)
        for batch in loader:
            # 2. The step. Its noise is a function of (seed, rank, step).
            heartbeat(iterate)
            torch.manual_seed(noise_seed(H.seed, TRAINING, mpi_rank(), iterate))
            data_input, target = preprocess_fn(batch)
            lr = scheduler.get_last_lr()[0]
            stats.append(training_step(H, data_input, target, vae, ema_vae, optimizer, iterate))
            scheduler.step()
            iterate += 1
            position += n_images * mpi_size()
            bar.set_postfix_str(f"{nats_to_bits(stats[-1]['elbo']):.3f} bits/dim", refresh=False)
            bar.update()
            early = iterate - first_iterate in EARLY_STEPS

            # 3. A run that no longer updates says so.
            skips = skips + 1 if stats[-1]["skipped_updates"] else 0
            if skips == H.skip_streak:
                logprint(
                    f"WARNING: the last {skips} updates were all skipped (gradient norm "
                    f"{stats[-1]['grad_norm']:.4g}, --skip_threshold {H.skip_threshold:g}): the "
                    f"model is not training. Restore an earlier checkpoint with a lower --lr, or "
                    f"raise --skip_threshold."
                )

            # 4. Log, draw, save: a kill after the last of these leaves nothing of the step undone.
            if early or iterate % H.iters_per_print == 0:
                average = accumulate_stats(stats, H.iters_per_print)
                logprint(
                    model=H.desc,
                    type="train_loss",
                    lr=lr,
                    epoch=epoch,
                    step=iterate,
                    **average,
                    bits_per_dim=nats_to_bits(average["elbo"]),
                    skip_rate=average["skipped_updates"] / len(stats),
                    images_per_second=n_images * mpi_size() / average["iter_time"],
                    **result_notice(H.dataset),
                )
            if iterate % H.iters_per_images == 0 or (early and H.dataset != "ffhq_1024"):
                draw()
            if iterate % H.iters_per_ckpt == 0:
                save(f"iter-{iterate}")
            if iterate % H.iters_per_save == 0 and math.isfinite(stats[-1]["elbo"]):
                save("latest")
            if H.max_skips and skips >= H.max_skips:  # more after a resume that changed nothing
                save("latest", last=True)
                raise UserError(
                    f"--max_skips {H.max_skips}: {skips} updates in a row were skipped (last "
                    f"gradient norm {stats[-1]['grad_norm']:.4g}, --skip_threshold "
                    f"{H.skip_threshold:g}); restore an earlier checkpoint with a lower --lr, or "
                    f"raise --skip_threshold"
                )
            if stop.agreed:
                save("latest", last=True)
                raise Stopped(f"stopped at step {iterate}, saved; --resume goes on from it")
        if (epoch + 1) % H.epochs_per_eval == 0 or epoch + 1 == H.num_epochs:
            evaluate_and_log()
        position = 0

    # 5. The end of a run.
    bar.close()
    epoch = H.num_epochs
    draw()
    save("latest", last=True)


def main():
    H, logprint = prepare_run()
    H, data_train, data_valid_or_test, preprocess_fn = set_up_data(H)
    resume_run(H, logprint)
    if H.tensorboard:
        logprint = with_tensorboard(logprint, H.save_dir)
    if H.test_eval and not (H.restore_ema_path or H.restore_path):
        raise UserError("--test_eval needs weights: name them with --restore_ema_path")
    vae, ema_vae = load_vaes(H, logprint)
    for line in summary(H, ema_vae, len(data_train), len(data_valid_or_test)):
        logprint(line)
    if H.dry_run:
        return
    stop.listen()
    if H.test_eval:
        open_run(H)
        run_test_eval(H, ema_vae, data_valid_or_test, preprocess_fn, logprint)
    else:
        train_loop(H, data_train, data_valid_or_test, preprocess_fn, vae, ema_vae, logprint)


if __name__ == "__main__":
    run_command(main)
