"""What a run tells of itself: its summary, where its bits go, a line of progress, TensorBoard."""

import math
import os
import time
import weakref

import torch
from tqdm import tqdm

from bounds import nats_to_bits
from errors import UserError, needing, one_line
from image_sets import IMAGE_SETS, result_notice
from labels import labels_of
from launchers import resolve_device, world
from optimizers import linear_warmup
from options import setting
from pictures import draw_rates
from starting import labels_told
from vae import VAE

# ---- at the start --------------------------------------------------------------------------


def saved_bytes(module, forward):
    """Bytes that forward(), which returns its result, keeps for the backward pass.

    Each storage counts once, the module's weights do not.
    """
    kept = []

    def pack(t):
        kept.append(weakref.ref(t))  # some are let go before the end
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = forward()
    assert result.requires_grad
    storages = [t.untyped_storage() for ref in kept if (t := ref()) is not None]
    weights = {p.untyped_storage()._cdata for p in module.parameters()}
    return sum({s._cdata: s.nbytes() for s in storages if s._cdata not in weights}.values())


def activation_bytes(H):
    """Bytes that a forward pass of H.n_batch images to train on keeps for the backward pass.

    Counted on one of tensors that have shapes alone; of more than 32 images in proportion.
    """
    n = min(H.n_batch, 32)
    with torch.device("meta"):
        vae = VAE(H)
        if setting(H, "checkpoint_activations"):
            vae.checkpoint_activations()
        x = torch.empty(n, H.image_size, H.image_size, H.image_channels)
        return saved_bytes(vae, lambda: vae(x, x)["elbo"]) * H.n_batch // n


def _size(n_bytes):
    return f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 2**28 else f"{n_bytes / 2**20:.1f} MiB"


def summary(H, ema_vae, n_train, n_heldout, missing=False):
    """The facts of a run that one wants to see before it begins, a line each.

    missing: whether the files of a published data set are not here; the counts are its own.
    """
    parameters = sum(p.numel() for p in ema_vae.parameters())
    # Weights, gradients, their average and AdamW's two moments: five float32 a parameter.
    state, images = 20 * parameters, activation_bytes(H)
    layers = ", ".join(
        f"{sum(b.base == r for b in ema_vae.decoder.dec_blocks)} at {r}x{r}"
        for r in ema_vae.decoder.resolutions
    )
    # A fork's own `data` makes the input in its own way.
    mean, std, source = H.normalisation or (math.nan, math.nan, "of the data set's own code")
    colours = "grey" if H.image_channels == 1 else "RGB"
    global_batch = H.n_batch * setting(H, "grad_accum") * world().size
    betas = f"betas {H.adam_beta1:g} {H.adam_beta2:g}"
    device = resolve_device(setting(H, "device"))
    if device != "cpu":
        device = f"{device}, {torch.cuda.get_device_name(device)}"
    processes = f"{world().size} process{'es' * (world().size > 1)}"
    facts = {
        "preset": H.hparam_sets,
        "network": f"{parameters:,} parameters, {len(ema_vae.decoder.dec_blocks)} stochastic "
        f"layers: {layers}",
        **({"labels": _labels_report(H, ema_vae)} if labels_of(H) else {}),
        "data": (f"not here, run {IMAGE_SETS[H.dataset].setup}; published are " if missing else "")
        + f"{H.dataset}, {H.image_size}x{H.image_size}, {colours}, {n_train:,} to train on, "
        f"{n_heldout:,} to {'test' if H.test_eval else 'validate'}",
        "input": f"(level - {mean:.5g}) / {std:.5g}, mean and std: {source}",
        "device": f"{device}, {setting(H, 'precision')}, {processes}",
        "batch": f"{H.n_batch} a process, {global_batch} a step",
        "optimizer": f"AdamW, lr {H.lr:g} after {H.warmup_iters:g} steps, decay {H.wd:g}, {betas}",
        "length": f"{H.num_epochs} epochs, {H.num_epochs * (n_train // global_batch):,} steps",
        "memory": f"about {_size(state + images)} a process to train: {_size(state)} for weights "
        f"and optimizer, {_size(images)} for the activations of {H.n_batch} images "
        f"(in fp32)",
        "files": os.path.abspath(H.save_dir),
    }
    return [f"{name:<10}{fact}" for name, fact in facts.items()]


def _labels_report(H, ema_vae):
    parameters = sum(t.numel() for t in ema_vae.decoder.label_xs)
    names = one_line(", ".join((H.label_names or [])[:10])) + ", ..." * (H.n_labels > 10)
    told = "given" if labels_told(H) else "not given"
    use = (
        f"{told} in the evaluation"
        if H.test_eval
        else f"{setting(H, 'label_dropout'):.0%} dropped in training, {told} in evaluations"
    )
    return f"{H.n_labels} ({names}), {parameters:,} parameters of the network; {use}"


def with_tensorboard(logprint, folder):
    """logprint, which from now on also writes the figures of losses for TensorBoard.

    Raises:
        UserError: if TensorBoard can't be imported, or can't write to a folder of that name.
    """
    with needing("tensorboard", "--tensorboard", ", or leave the option out"):
        from torch.utils.tensorboard import SummaryWriter
    try:
        folder.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"--tensorboard writes to no folder whose name is no UTF-8, such as {folder}: leave "
            f"the option out, or name another --save_dir"
        ) from None
    if world().rank != 0:
        return logprint
    writer = None  # until there is something to write: the folder may not be made yet

    def log(*args, **event):
        nonlocal writer
        logprint(*args, **event)
        kind = event.get("type", "")
        if not kind.endswith("_loss"):
            return
        try:
            writer = writer or SummaryWriter(folder)
            for key, value in event.items():
                if isinstance(value, int | float) and key != "step":
                    writer.add_scalar(f"{kind}/{key}", value, event.get("step"))
            writer.flush()
        except OSError as error:
            logprint(f"WARNING: TensorBoard lacks the figures of this line ({error})")

    return log


# ---- on the way ----------------------------------------------------------------------------


def progress_bar(total, done):
    """A line at the foot of a terminal: steps done, time left, steps a second; no file gets it."""
    disable = None if world().rank == 0 else True
    return tqdm(total=total, initial=done, unit=" steps", disable=disable, dynamic_ncols=True)


class Pace:
    """Steps a second of wall time: loading, pictures, saves, evaluations and all."""

    def __init__(self, step):
        self.step, self.time = step, time.perf_counter()

    def since_last(self, step):
        """Steps a second since the last call, or since the start."""
        steps, self.step = step - self.step, step
        seconds, self.time = time.perf_counter() - self.time, time.perf_counter()
        return steps / seconds


def log_training(H, average, at, lr, global_batch, pace, logprint):
    """Logs a `train_loss` line: accumulate_stats' averages, at a resuming.Progress.

    Args:
        pace: the run's Pace.
        lr: learning rate of the step, as `beta` is its weight of the rate in the loss.
        global_batch: images of a step, of all processes.
    """
    warmup = setting(H, "kl_warmup_iters")
    logprint(
        model=H.desc,
        type="train_loss",
        lr=lr,
        epoch=at.epoch,
        step=at.step,
        **average,
        **({"beta": linear_warmup(warmup)(at.step - 1)} if warmup else {}),
        bits_per_dim=nats_to_bits(average["elbo"]),
        skip_rate=average["skipped_updates"] / len(at.stats),
        images_per_second=global_batch / average["iter_time"],
        images_per_second_overall=global_batch * pace.since_last(at.step),
        **result_notice(H.dataset),
    )


def skip_report(H, at):
    """A line on a streak of skipped updates, at a resuming.Progress."""
    return (
        f"{at.skips} updates in a row were skipped (last gradient norm "
        f"{at.stats[-1]['grad_norm']:.4g}, --skip_threshold {H.skip_threshold:g}): the model is "
        f"not training; restore an earlier checkpoint with a lower --lr, or raise --skip_threshold"
    )


def best_report(at):
    """A line on the best evaluation so far, at a resuming.Progress."""
    where = f"step {at.best['step']}" if at.best["step"] else "the restored log"
    return (
        f"{at.stale} evaluations brought nothing below {nats_to_bits(at.best['elbo']):.4f} "
        f"bits/dim, of {where}"
    )


def young_ema(H, updates):
    """A warning, while more than 5 % of an EMA without --ema_warmup are old weights; else None."""
    rate = setting(H, "ema_rate")
    share = rate**updates
    if setting(H, "ema_warmup") or not updates or share <= 0.05:
        return None
    return (
        f"WARNING: {share:.0%} of the EMA are still the weights that the run began with ({updates} "
        f"updates at --ema_rate {rate:g}): its figures and pictures tell little of the training "
        f"yet (--ema_warmup avoids that)"
    )


def log_evaluation(H, ema_vae, figures, logprint, name, **event):
    """Logs and draws an evaluation's rates by layer and resolution, then logs its figures.

    Beside the rates stand the latent channels in use of each layer (bounds.LayerRates).

    The picture is rates-NAME.png in H.save_dir.
    """
    rates = figures.pop("rate_per_layer")
    active = getattr(rates, "active", None)  # a fork's own rates are a list
    resolutions = [block.base for block in ema_vae.decoder.dec_blocks]
    by_resolution = dict.fromkeys(sorted(set(resolutions)), 0.0)
    for resolution, rate in zip(resolutions, rates, strict=True):
        by_resolution[resolution] += rate
    logprint(
        **event | {"type": event["type"].replace("loss", "rates")},
        rate_per_layer=[float(f"{rate:.5g}") for rate in rates],
        rate_per_resolution={r: float(f"{rate:.5g}") for r, rate in by_resolution.items()},
        **({} if active is None else {"active_per_layer": active}),
    )
    if world().rank == 0:
        path = os.path.join(H.save_dir, f"rates-{name}.png")
        try:
            what = "test set" if name == "test" else f"step {name}"
            widths = [block.zdim for block in ema_vae.decoder.dec_blocks]
            title = f"{H.desc}, {what}: rate by layer"
            draw_rates(path, resolutions, rates, title, *([(active, widths)] if active else []))
        except (OSError, UserError) as error:
            logprint(f"WARNING: no picture {path} ({error})")
    logprint(**event, **figures)
