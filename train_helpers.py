"""From the options to a run: start-up, model with EMA, optimizer, saves, averages for the log."""

import contextlib
import math
import os
import signal
import warnings

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from checkpoints import write_checkpoint
from compiling import compile_network, keep_compiled
from data import mkdir_p  # noqa: F401  programs import it from here
from endings import die_with_parent, start_watch
from hps import Hyperparams, add_vae_arguments, parse_args_and_update_hparams
from launchers import lone_warning, resolve_device, world
from logs import is_buffered
from optimizers import linear_warmup, make_optimizer, move_towards, restore_optimizer
from options import OneLineParser, add_own_options, given_options, setting
from precision import allow_tf32
from presets import TABLES
from processes import describe_processes, join_processes
from resources import try_compiler
from resuming import read_log
from run_folder import make_run_folder, name_save_dirs
from starting import fetched, same_labels, starting_paths
from turns import each_host_first
from utils import local_mpi_rank, logger, maybe_download, mpi_rank, mpi_size
from vae import VAE
from weights import check_weights, load_model, read_weights  # noqa: F401  load_model: as mkdir_p

# ---- start-up ------------------------------------------------------------------------------


def set_up_hyperparams(s=None):
    """From arguments (default: the command line's) to a run: processes joined, folder, log, seed.

    The folder is made at once; after logs.buffer_log, only when the run begins (run_folder).

    Returns:
        (H, logprint), H with every option and mpi_size, rank, local_rank, device, logdir.

    Raises:
        UserError: for anything wrong with the options or the launcher.
    """
    H = Hyperparams()
    parser = OneLineParser(
        prog="train.py",
        description="Trains, or with --test_eval evaluates, a very deep VAE. The same command "
        "runs under mpiexec, torchrun and srun. A preset changes the defaults given below.",
    )
    add_vae_arguments(parser)
    taken = add_own_options(parser)
    parse_args_and_update_hparams(H, parser, s=s)
    changed = [
        f"--{key} {H[key]} ({parser.get_default(key)})"
        for key in sorted(H)
        if key != "hparam_sets" and H[key] != parser.get_default(key)
    ]
    if taken:
        H.taken_options = taken
    H.given_options = sorted(given_options(parser, s))
    setup_mpi(H)
    name_save_dirs(H)
    logprint = logger(H.logdir)
    if not (is_buffered() and hasattr(logprint, "buffers")):  # a fork's own writes at once
        make_run_folder(H.save_dir)
    for key in sorted(H.keys() - {"given_options"}):
        logprint(type="hparam", key=key, value=H[key])
    np.random.seed(H.seed % 2**32)
    torch.manual_seed(H.seed)  # all ranks alike: it makes the weights
    for line in [*describe_processes(), *filter(None, [lone_warning(os.environ)])]:
        logprint(line)
    for name in taken:
        logprint(f"--{name} has another meaning in this hps.py: train.py's own keeps its default")
    if changed:
        logprint("changed from the preset: " + ", ".join(changed))
    logprint("training model", H.desc, "on", H.dataset)
    return H, logprint


def setup_mpi(H):
    """Joins the processes of the run; sets H.mpi_size, H.rank, H.local_rank and H.device.

    From then on float32 is float32 on CUDA too, unless H.precision is tf32, and cuDNN chooses its
    convolutions by trial if H.cudnn_benchmark.
    """
    H.mpi_size, H.rank, H.local_rank = mpi_size(), mpi_rank(), local_mpi_rank()
    device = resolve_device(setting(H, "device"))
    if "device" not in (H.taken_options or ()):
        H.device = device
    if device != "cpu":
        torch.cuda.set_device(device)
    elif H.mpi_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        # Each process would take every core: with two on two cores, ten times slower.
        torch.set_num_threads(max(1, torch.get_num_threads() // world().local_size))
    allow_tf32(setting(H, "precision") == "tf32")
    torch.backends.cudnn.benchmark = setting(H, "cudnn_benchmark")
    join_processes(device, setting(H, "port"), setting(H, "timeout"))
    start_watch(setting(H, "timeout"))
    if world().launcher.forsakes:
        die_with_parent(signal.SIGTERM)


def setup_save_dirs(H):
    """Makes the run's folder, save_dir/desc; sets H.save_dir to it and H.logdir to its log.

    Raises:
        UserError: if the folder can't be made.
    """
    name_save_dirs(H)
    make_run_folder(H.save_dir)


def first_rank_first(local_rank, mpi_size):
    """Context: each host's local rank 0 goes through the body before its other ranks."""
    return each_host_first(local_rank, mpi_size)


def distributed_maybe_download(path, local_rank, mpi_size):
    """utils.maybe_download, once per host."""
    with first_rank_first(local_rank, mpi_size):
        return maybe_download(path)


# ---- model with EMA ------------------------------------------------------------------------


class OneProcess(nn.Module):
    """What DistributedDataParallel is to several processes: `module`, and the same names."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)

    def no_sync(self):
        return contextlib.nullcontext()


def load_vaes(H, logprint):
    """Builds the model and its EMA on H.device, restored as H says, alike on all ranks.

    Returns:
        (vae, ema_vae): vae wrapped for the run's processes, its VAE in vae.module.

    Raises:
        UserError: for block strings or files that do not fit.
    """
    device = resolve_device(setting(H, "device"))
    # Initial weights are drawn twice, as in the original: programs that seed and then sample find
    # the generator where they left it.
    vae, ema_vae = VAE(H), VAE(H)
    weights, ema_weights = starting_paths(H)
    if weights:
        logprint(
            f"a new training starts: weights and EMA from {weights}"
            if setting(H, "init_from")
            else f"restoring weights and EMA from {weights}: no --restore_path names other weights"
            if weights == ema_weights
            else f"restoring weights from {weights}"
        )
        if setting(H, "init_from"):
            start_from(vae, weights, logprint)
        else:
            restore_params(vae, weights, H.local_rank, H.mpi_size, map_cpu=True)
    ema_vae.load_state_dict(vae.state_dict())
    if ema_weights and ema_weights != weights:
        logprint(f"restoring EMA weights from {ema_weights}")
        restore_params(ema_vae, ema_weights, H.local_rank, H.mpi_size, map_cpu=True)
    ema_vae.requires_grad_(False)
    # On CUDA as convolutions expect them, which else turn them around in every step.
    layout = {} if device == "cpu" else {"memory_format": torch.channels_last}
    vae, ema_vae = vae.to(device, **layout), ema_vae.to(device, **layout)
    if setting(H, "checkpoint_activations"):
        vae.checkpoint_activations()
    if setting(H, "compile"):
        keep_compiled()
        try_compiler(device)
        for model in (vae, ema_vae):
            compile_network(model)
    parameters = sum(p.numel() for p in vae.parameters())
    logprint(f"{parameters:,} parameters, {len(vae.decoder.dec_blocks)} stochastic layers")
    if mpi_size() == 1:
        return OneProcess(vae), ema_vae
    for p in ema_vae.parameters():
        dist.broadcast(p, src=0)
    device_ids = None if device == "cpu" else [torch.device(device).index]
    # It broadcasts rank 0's weights.
    return DistributedDataParallel(
        vae, device_ids=device_ids, gradient_as_bucket_view=True
    ), ema_vae


def start_from(model, path, logprint):
    """Loads weights into a VAE that starts a new training: labels of other networks are left out.

    Raises:
        UserError: as restore_params.
    """
    state, own = read_weights(fetched(path)), model.state_dict()
    tables = [name for name in own if name.startswith(TABLES)]
    foreign = [name for name in state if name.startswith(TABLES)]
    if foreign and not same_labels(model.H, path, state):
        logprint(f"the labels of {path} are others: their tables are left out")
        state = {name: t for name, t in state.items() if name not in foreign}
    for name in tables:
        if name not in state:
            state[name] = own[name]  # zeros
    check_weights(model, state, path)
    model.load_state_dict(state)


def restore_params(model, path, local_rank, mpi_size, map_ddp=True, map_cpu=False):
    """Loads model.th or model-ema.th, of ours or released, strictly into a VAE.

    The file is read to the CPU whatever map_cpu says; map_ddp as in read_weights.

    Raises:
        UserError: for a file that can't be read or holds another model, naming its preset.
    """
    path = distributed_maybe_download(path, local_rank, mpi_size)
    state = read_weights(path, map_ddp)
    check_weights(model, state, path)
    model.load_state_dict(state)


def update_ema(vae, ema_vae, ema_rate):
    """Moves every EMA weight: p_ema ← ema_rate · p_ema + (1 − ema_rate) · p."""
    move_towards(list(ema_vae.parameters()), list(vae.parameters()), 1 - ema_rate)


update_ema.in_steps = update_ema  # which moves the EMA by lists of tensors that it has made once


# ---- optimizer, saves ----------------------------------------------------------------------


def load_opt(H, vae, logprint):
    """The optimizer and learning rate schedule, restored as H says.

    Returns:
        (optimizer, scheduler, lowest eval elbo so far, step, epoch to start with).
    """
    use_apex = resolve_device(setting(H, "device")) != "cpu"
    optimizer, name = make_optimizer(vae.parameters(), H, use_apex)
    logprint(f"optimizer: {name}")
    cur_eval_loss, iterate, starting_epoch = math.inf, 0, 0
    if H.restore_optimizer_path:
        logprint(f"restoring optimizer from {H.restore_optimizer_path}")
        path = H.restore_optimizer_path
        path = distributed_maybe_download(path, H.local_rank, H.mpi_size)
        restore_optimizer(optimizer, path)
    if H.restore_log_path:
        cur_eval_loss, iterate, starting_epoch = restore_log(
            H.restore_log_path, H.local_rank, H.mpi_size
        )
        logprint(f"continuing from step {iterate}, epoch {starting_epoch}")
    if (H.restore_optimizer_path or H.restore_log_path) and not any(starting_paths(H)):
        logprint(
            "WARNING: the weights are random: what is restored is of a training whose weights no "
            "option names (--restore_path)"
        )
    if H.resumed:
        iterate, starting_epoch = H.resumed["step"], H.resumed["epoch"]
    # A skipped update is no mistake in the order of calls.
    warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
    # The schedule is a function of the step alone: a restored run does not warm up again.
    for group in optimizer.param_groups:
        group["initial_lr"] = H.lr
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, linear_warmup(H.warmup_iters), last_epoch=iterate - 1
    )
    return optimizer, scheduler, cur_eval_loss, iterate, starting_epoch


def restore_log(path, local_rank, mpi_size):
    """(lowest eval elbo or inf, largest step, largest epoch) in a log.jsonl, as read_log."""
    return read_log(distributed_maybe_download(path, local_rank, mpi_size))


def save_model(path, vae, ema_vae, optimizer, H):
    """Writes path-model.th, path-model-ema.th, path-opt.th and, from the run, path-log.jsonl.

    Whatever happens, the names are those of the old files or of the new ones, never a mixture.

    Raises:
        OSError: if they can't be written; the old ones are as they were.
    """
    write_checkpoint(path, vae, ema_vae, optimizer, H)


# ---- averages for the log ------------------------------------------------------------------


def accumulate_stats(stats, frequency):
    """One dict for a log line from the dicts of the last `frequency` steps.

    Means, but: sums of rate_nans, distortion_nans, skipped_updates and gcskip; the largest finite
    grad_norm (0 if none is); elbo_filtered, the mean of the finite elbos.
    """
    recent = list(stats)[-frequency:]
    result = {}
    for key in recent[-1]:
        values = np.array([s[key] for s in recent], dtype=np.float64)
        finite = values[np.isfinite(values)]
        if key in ("rate_nans", "distortion_nans", "skipped_updates", "gcskip"):
            result[key] = values.sum()
        elif key == "grad_norm":
            result[key] = finite.max(initial=0.0)
        else:
            result[key] = values.mean()
            if key == "elbo":
                result["elbo_filtered"] = finite.mean() if len(finite) else math.nan
    return {key: float(value) for key, value in result.items()}
