# PYTHON_ARGCOMPLETE_OK
"""Trains a very deep VAE, or evaluates one on its test set: `python train.py --hps PRESET`.

The same file runs under mpiexec, torchrun and srun. Losses are in nats per dimension (a
dimension: one of a pixel's levels, three or of grey images one); bits_per_dim is elbo / ln 2.
"""

import interrupts  # noqa: F401  the first: a Ctrl-C while the others are imported is one line

# isort: split
import math
import os
from functools import partial

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from ahead import Ahead
from batches import make_loader, training_batches
from bounds import distortion_and_rates, importance_weighted_elbo, nats_to_bits
from checkpoints import remove_old_checkpoints, write_checkpoint
from data import set_up_data
from endings import Stopped, heartbeat, run_command, stop
from errors import MissingFiles, UserError, remedy_of
from files import replace
from graphs import steps_of
from image_sets import IMAGE_SETS, result_notice
from labels import given, labels_in, labels_of, names_of, taking
from launchers import world
from logs import buffer_log, show_log
from noise import (
    EVALUATION,
    PICTURES,
    TRAINING,
    bound_key,
    noise_of_images,
    noise_seed,
)
from optimizers import all_finite, applied_updates
from options import Hyperparams, setting
from pictures import labelled_grid
from precision import forward_precision
from reports import (
    Pace,
    best_report,
    log_evaluation,
    log_training,
    progress_bar,
    skip_report,
    summary,
    with_tensorboard,
    young_ema,
)
from resources import naming_shortages
from resuming import Progress, find_start, resume_run
from run_folder import begin_run, begin_training, refuse_occupied
from starting import labels_told, starting_paths
from steps import Steps, Unread, casting
from totals import Totals
from train_helpers import (
    accumulate_stats,
    load_opt,
    load_vaes,
    save_model,
    set_up_hyperparams,
    update_ema,
)
from utils import get_cpu_stats_over_ranks
from weights import weights_hash

# Steps of this run at which to log and draw besides the regular ones: progress from the start.
EARLY_STEPS = {1} | {2**k for k in range(3, 14)}

OWN_SAMPLER = "noise was not drawn image by image: the figures depend on the batch size"


# ---- one step ------------------------------------------------------------------------------


def training_step(H, data_input, target, vae, ema_vae, optimizer, iterate, labels=None):
    """One step on a batch of input and target (N, R, R, c), in --grad_accum parts.

    The update is skipped, on all ranks alike, if any saw a NaN or if the gradient norm, before
    clipping, is not below H.skip_threshold. With --kl_warmup_iters the rate's weight in the loss
    grows to 1; `iterate`, from 0, is the step by which it goes. labels (N,) are those that the
    step may see, -1 for none.

    Returns:
        floats: elbo, distortion, rate (batch means over all ranks), rate_nans, distortion_nans
        and skipped_updates (each 0 or 1), grad_norm, iter_time in seconds.
    """
    batch, means = (data_input, target, labels), (get_cpu_stats_over_ranks, update_ema)
    return Steps(H, vae, ema_vae, optimizer).launch(*batch, iterate, *means).read()


_own_step = training_step  # whose halves the loop calls, unless a program has replaced it


@torch.no_grad()
def eval_step(data_input, target, ema_vae):
    """Floats elbo, distortion and rate: means over a batch (N, R, R, c) and the ranks."""
    return get_cpu_stats_over_ranks(ema_vae(data_input, target))


# ---- evaluation ----------------------------------------------------------------------------


@torch.inference_mode()
def evaluate(H, ema_vae, data_valid, preprocess_fn):
    """Scores every image of a data set once, whatever the batch size and number of processes.

    An image's noise is a function of H.seed and its index, so the figures are the same for any
    n_batch and any number of processes, to rounding. A network that knows labels is told the
    images', or with H.label "none" not.

    Returns:
        n_batches, n_images; elbo, distortion and rate, means over images in nats per dimension;
        filtered_elbo, over the images where it is finite; bits_per_dim; rate_per_layer, a
        bounds.LayerRates; with H.iw_samples also iw_elbo, the importance-weighted bound, and
        iw_bits_per_dim; of a network that knows labels whether they were given; and a notice where
        the figures must not be compared with others.

    Raises:
        Stopped: if a signal asked for it.
    """
    seed, iw_samples = setting(H, "seed"), setting(H, "iw_samples")
    told = labels_told(H)
    mine = Subset(data_valid, range(world().rank, len(data_valid), world().size))
    loader = make_loader(H, mine, batch_size=H.n_batch)
    totals = Totals([block.zdim for block in ema_vae.decoder.dec_blocks])
    device = next(ema_vae.parameters()).device
    batches = (mine.indices[i : i + H.n_batch] for i in range(0, len(mine), H.n_batch))
    # Of the ELBO, then of the bound's samples, whose first has the same noise anew.
    keys = [(seed, EVALUATION), *(bound_key(seed, k) for k in range(iw_samples or 0))]
    following = ((batch, key) for batch in batches for key in keys)
    next(following, None)
    of_images = Ahead(device, lambda *_: next(following, ((), ())))  # passes come in this order
    precision = forward_precision(setting(H, "precision"), device)
    with casting(H, list(ema_vae.parameters()), []):
        for batch in tqdm(loader, "evaluating", disable=None if world().rank == 0 else True):
            heartbeat()
            if stop.requested():
                totals.sums["stopped"] = 1.0
                break
            first = int(totals.sums["n_images"])
            indices = mine.indices[first : first + len(batch[0])]
            x, target = preprocess_fn(batch)
            labels = labels_in(batch, H) if told else None  # (N,)
            with precision, noise_of_images(of_images(indices, *keys[0])) as noise:
                channels = []  # of each layer, (N, Z)
                distortion, rates = distortion_and_rates(ema_vae, x, target, channels, labels)
            foreign, bound = noise.draws < len(rates), None
            del noise  # of a device's memory a half, while the next is there
            if iw_samples:
                draw = partial(of_images, indices)
                with precision:
                    bound = importance_weighted_elbo(
                        ema_vae, x, target, iw_samples, lambda k, d=draw: d(*keys[1 + k]), labels
                    )
            totals.add(distortion, rates, channels, foreign, bound)
    totals.over_processes(device)
    if totals.sums["stopped"]:
        raise Stopped("stopped in an evaluation")
    figures = {
        **totals.figures(),
        **({"labels": "given" if told else "none"} if labels_of(H) else {}),
        **result_notice(H.dataset, OWN_SAMPLER if totals.sums["foreign_noise"] else None),
    }
    if iw_samples:
        bound = totals.sums["iw_elbo"] / totals.sums["n_images"]
        figures |= {"iw_elbo": bound, "iw_bits_per_dim": nats_to_bits(bound)}
    return figures


def run_test_eval(H, ema_vae, data_test, preprocess_fn, logprint):
    """Logs a `test_loss` line for the EMA weights and returns its figures."""
    logprint("evaluating on the test set")
    stats = evaluate(H, ema_vae, data_test, preprocess_fn)
    stats["weights"] = weights_hash(ema_vae)
    log_evaluation(H, ema_vae, stats, logprint, "test", type="test_loss")
    return stats


# ---- pictures ------------------------------------------------------------------------------


def get_sample_for_visualization(data, preprocess_fn, num, dataset):
    """The first `num` images: (uint8 (num, R, R, 3), network input). `dataset` is not used."""
    batch = next(iter(DataLoader(data, batch_size=num)))
    return batch[0], preprocess_fn(batch)[0]


@torch.no_grad()
def write_images(H, ema_vae, viz_batch_original, viz_batch_processed, fname, logprint, labels=None):
    """Writes a labelled grid, a column per image (uint8 (N, R, R, c), and as input), rows of:

    the originals; num_variables_visualize rows decoded from the first k latents, k evenly spaced
    over the layers, the rest sampled at t = 0.1; num_temperatures_visualize rows of samples at
    t = 1.0, 0.9, 0.8, 0.7. labels (N,) are those of the images, by which all is decoded, and head
    their columns. It is a PNG.
    """
    n, told = len(viz_batch_original), given(labels)
    latents = [s["z"] for s in ema_vae.forward_get_latents(viz_batch_processed, **told)]
    rows = [("originals", np.asarray(viz_batch_original))]  # (its words, uint8 (N, R, R, c))
    for row in range(1, H.num_variables_visualize + 1):
        k = row * len(latents) // (H.num_variables_visualize + 1)
        images = ema_vae.forward_samples_set_latents(n, latents[:k], t=0.1, **told)
        rows.append((f"{k} of {len(latents)} layers", images))
    for t in (1.0, 0.9, 0.8, 0.7)[: H.num_temperatures_visualize]:
        rows.append((f"samples t = {t}", ema_vae.forward_uncond_samples(n, t=t, **told)))
    logprint(f"writing pictures to {fname}")
    title = f"{H.desc or ''} {os.path.splitext(os.path.basename(fname))[0]}".strip()
    words, images = zip(*rows, strict=True)
    picture = labelled_grid(images, words, names_of(H, labels), title=title)
    replace(fname, lambda partial: picture.save(partial, "PNG"), durable=True)


def draw(H, ema_vae, viz, labels, step, logprint):
    """write_images to samples-STEP.png, on rank 0; a failure costs the picture, not the run."""
    if world().rank != 0:
        return
    torch.manual_seed(noise_seed(setting(H, "seed"), PICTURES))
    fname = os.path.join(H.save_dir, f"samples-{step}.png")
    try:
        with forward_precision(setting(H, "precision"), viz[1].device):
            more, named = taking(write_images, labels)
            write_images(H, ema_vae, *viz, fname, logprint, *more, **named)
    except OSError as error:
        logprint(f"WARNING: no pictures at step {step} ({error})")


# ---- training ------------------------------------------------------------------------------


def save(H, name, progress, models, logprint, last=False):
    """save_model on rank 0 of models (vae, ema_vae, optimizer); `best` has the EMA alone.

    Weights that are no numbers are not saved. Where nothing is saved, the log says why.

    Raises:
        UserError: if it is the last save of a run.
    """
    if world().rank != 0:
        return
    H.progress, path = progress.record(), os.path.join(H.save_dir, name)
    try:
        if not all_finite(p for model in models[:2] for p in model.parameters()):
            raise ArithmeticError("an update has made weights NaN or infinite")
        if name == "best":
            write_checkpoint(path, None, models[1], None, H)
        else:
            save_model(path, *models, H)
        if keep := setting(H, "keep_ckpts"):
            remove_old_checkpoints(H.save_dir, keep)
    except (OSError, ArithmeticError) as error:
        why = f"{name} is not saved at step {progress.step} ({error}); the older files are whole"
        if last:
            remedy = remedy_of(error) if isinstance(error, OSError) else "take a lower --lr"
            raise UserError(f"{why}: {remedy}, then go on with --resume") from None
        logprint(f"WARNING: {why}")


def evaluate_run(H, models, at, data_valid, preprocess_fn, logprint):
    """Evaluates the EMA, at a resuming.Progress, and saves it as `best` if it is that.

    A young run on own images is judged by the weights themselves too. Raises Stopped as evaluate.
    """
    vae, ema_vae, optimizer = models
    figures, updates = evaluate(H, ema_vae, data_valid, preprocess_fn), applied_updates(optimizer)
    if H.dataset == "images" and updates < 3 / (1 - setting(H, "ema_rate")):
        of_weights = evaluate(
            Hyperparams(H, iw_samples=None), vae.module, data_valid, preprocess_fn
        )
        figures["weights_bits_per_dim"] = of_weights["bits_per_dim"]
    if warning := young_ema(H, updates):
        logprint(warning)
    event = dict(model=H.desc, type="eval_loss", epoch=at.epoch, step=at.step)
    log_evaluation(H, ema_vae, figures, logprint, at.step, **event)
    at.judge(figures["elbo"])
    if at.stale == 0 and at.best["elbo"] < at.saved_best:
        save(H, "best", at, models, logprint)
        at.saved_best = at.best["elbo"]


def train_loop(H, data_train, data_valid, preprocess_fn, vae, ema_vae, logprint):
    """Trains to H.num_epochs, then evaluates, saves and draws.

    Raises:
        UserError: if there is no full batch to train on, the run's folder is in use, --max_skips
            updates in a row were skipped, or the state can't be saved at the end.
        Stopped: if a signal asked for it; the state is saved.

    Where --patience evaluations in a row bring no new best, the run ends as if it were done.
    """
    # 1. What the steps need.
    optimizer, scheduler, cur_eval_loss, iterate, starting_epoch = load_opt(H, vae, logprint)
    models, at = (vae, ema_vae, optimizer), Progress(H, iterate, starting_epoch, cur_eval_loss)
    seed, max_skips, patience = (setting(H, name) for name in ("seed", "max_skips", "patience"))
    means = get_cpu_stats_over_ranks, update_ema
    steps = steps_of(H, models, training_step is _own_step, means)
    batches, loader = training_batches(H, data_train)
    global_batch = batches.n_batch * batches.size  # images of a step
    logprint(
        f"global batch: {global_batch} images a step ({H.n_batch} x {setting(H, 'grad_accum')} "
        f"parts x {batches.size} processes)"
    )
    viz = get_sample_for_visualization(data_valid, preprocess_fn, H.num_images_visualize, H.dataset)
    labels = next(iter(DataLoader(data_valid, len(viz[0]))))[1] if labels_of(H) else None
    drawn = ema_vae, viz, labels
    begin_training(H)
    if starting_epoch >= H.num_epochs:
        logprint(f"nothing left to do: --num_epochs {H.num_epochs} are done, at step {at.step}")
        return
    if patience and at.stale >= patience:
        logprint(f"nothing left to do: --patience {patience}: {best_report(at)}")
        return

    unread, pace = Unread(at, max_skips), Pace(at.step)
    intervals = H.iters_per_print, H.iters_per_images, H.iters_per_ckpt, H.iters_per_save
    bar = progress_bar(H.num_epochs * len(batches), at.step)
    for at.epoch in range(starting_epoch, H.num_epochs):
        batches.set_epoch(at.epoch, at.position)
        for batch, left in zip(loader, range(len(batches))[::-1], strict=True):
            # 2. The step. Its noise is a function of (seed, rank, step).
            step = at.step + len(unread)
            heartbeat(step)
            torch.manual_seed(noise_seed(seed, TRAINING, world().rank, step))
            data_input, target = preprocess_fn(batch)
            labels = labels_in(batch, H)
            lr = scheduler.get_last_lr()[0]
            if training_step is _own_step:
                means, batch = (get_cpu_stats_over_ranks, update_ema), (data_input, target, labels)
                unread.add(steps.launch(*batch, step, *means))
            else:
                more, named = taking(training_step, labels)
                published = (H, data_input, target, *models, step)
                unread.add(training_step(*published, *more, **named))
            scheduler.step()
            early = step + 1 - at.first_step in EARLY_STEPS
            due = early or not left or not all((step + 1) % every for every in intervals)

            # 3. Statistics: on a GPU those of the step before, while this one goes on, unless this
            # one's are needed. A run that no longer updates says so.
            for stats in unread.read(due):
                at.advance(stats, global_batch)
                bar.set_postfix_str(f"{nats_to_bits(stats['elbo']):.3f} bits/dim", refresh=False)
                bar.update()
                if at.skips == setting(H, "skip_streak"):
                    logprint(f"WARNING: {skip_report(H, at)}")
            if unread:
                continue

            # 4. Log, draw, save: a kill after the last of these leaves nothing of the step undone.
            if early or at.step % H.iters_per_print == 0:
                average = accumulate_stats(list(at.stats), H.iters_per_print)
                log_training(H, average, at, lr, global_batch, pace, logprint)
            if at.step % H.iters_per_images == 0 or (early and H.dataset != "ffhq_1024"):
                draw(H, *drawn, at.step, logprint)
            if at.step % H.iters_per_ckpt == 0:
                save(H, f"iter-{at.step}", at, models, logprint)
            if at.step % H.iters_per_save == 0 and math.isfinite(stats["elbo"]):
                save(H, "latest", at, models, logprint)
            if max_skips and at.skips >= max_skips:  # more after a resume that changed nothing
                save(H, "latest", at, models, logprint, last=True)
                raise UserError(f"--max_skips {max_skips}: {skip_report(H, at)}")
            if stop.agreed:
                save(H, "latest", at, models, logprint, last=True)
                raise Stopped(f"stopped at step {at.step}, saved; --resume goes on from it")

        # 5. The end of an epoch.
        if (at.epoch + 1) % H.epochs_per_eval == 0 or at.epoch + 1 == H.num_epochs:
            try:
                evaluate_run(H, models, at, data_valid, preprocess_fn, logprint)
            except Stopped:
                save(H, "latest", at, models, logprint, last=True)
                raise
        at.position = 0
        if patience and at.stale >= patience:
            break

    # 6. The end of the run.
    bar.close()
    at.epoch += 1
    if at.epoch < H.num_epochs:
        logprint(f"the run ends at step {at.step}: --patience {patience}: {best_report(at)}")
    draw(H, *drawn, at.step, logprint)
    save(H, "latest", at, models, logprint, last=True)


@naming_shortages()
def main():
    buffer_log()  # what is refused below leaves no trace on the disk
    H, logprint = set_up_hyperparams()
    find_start(H, logprint)
    if H.test_eval and not any(starting_paths(H)):
        raise UserError("--test_eval needs weights: name them with --restore_ema_path")
    try:
        H, data_train, data_valid_or_test, preprocess_fn = set_up_data(H)
        n_train, n_heldout, missing = len(data_train), len(data_valid_or_test), False
    except MissingFiles:
        if not setting(H, "dry_run"):
            raise
        n_train, n_valid, n_test = IMAGE_SETS[H.dataset].counts
        n_heldout, missing = n_test if H.test_eval else n_valid, True
    refuse_occupied(H)
    resume_run(H, logprint)
    if setting(H, "tensorboard"):
        logprint = with_tensorboard(logprint, H.save_dir)
    vae, ema_vae = load_vaes(H, logprint)
    show_log()
    for line in summary(H, ema_vae, n_train, n_heldout, missing):
        logprint(line)
    if setting(H, "dry_run"):
        return
    stop.listen()
    if H.test_eval:
        begin_run(H)
        run_test_eval(H, ema_vae, data_valid_or_test, preprocess_fn, logprint)
    else:
        train_loop(H, data_train, data_valid_or_test, preprocess_fn, vae, ema_vae, logprint)


if __name__ == "__main__":
    run_command(main)
