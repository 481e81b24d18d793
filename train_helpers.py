"""Around the network: start-up, models, EMA, optimizer, checkpoints, averages for the log."""

import contextlib
import copy
import json
import math
import os
import shutil
import warnings

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from data import mkdir_p
from hps import (
    HPARAMS_REGISTRY,
    Hyperparams,
    OneLineParser,
    UserError,
    add_vae_arguments,
    get_hparams,
    parse_args_and_update_hparams,
)
from utils import (
    init_processes,
    local_mpi_rank,
    logger,
    maybe_download,
    mpi_rank,
    mpi_size,
    resolve_device,
    world,
)
from vae import VAE

# ---- start-up ------------------------------------------------------------------------------


def set_up_hyperparams(s=None):
    """From arguments (default: the command line's) to a run: processes joined, folders, log, seed.

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
    parse_args_and_update_hparams(H, add_vae_arguments(parser), s=s)
    setup_mpi(H)
    setup_save_dirs(H)
    logprint = logger(H.logdir)
    for key in sorted(H):
        logprint(type="hparam", key=key, value=H[key])
    np.random.seed(H.seed % 2**32)
    torch.manual_seed(H.seed)  # all ranks alike: it makes the weights
    logprint("training model", H.desc, "on", H.dataset)
    return H, logprint


def setup_mpi(H):
    """Joins the processes of the run; sets H.mpi_size, H.rank, H.local_rank and H.device."""
    H.mpi_size, H.rank, H.local_rank = mpi_size(), mpi_rank(), local_mpi_rank()
    H.device = resolve_device(H.device)
    if H.device != "cpu":
        torch.cuda.set_device(H.device)
    elif H.mpi_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        # Each process would take every core: with two on two cores, ten times slower.
        torch.set_num_threads(max(1, torch.get_num_threads() // world().local_size))
    init_processes(H.device.split(":")[0], H.port)


def setup_save_dirs(H):
    """Makes the run's folder, save_dir/desc; sets H.save_dir to it and H.logdir to its log.

    Raises:
        UserError: if the folder can't be made.
    """
    H.save_dir = os.path.join(H.save_dir, H.desc)
    try:
        mkdir_p(H.save_dir)
    except OSError as error:
        raise UserError(f"--save_dir: {H.save_dir} can't be made ({error.strerror})") from None
    H.logdir = os.path.join(H.save_dir, "log")


@contextlib.contextmanager
def first_rank_first(local_rank, mpi_size):
    """Lets each host's local rank 0 through the body before its other ranks."""
    if mpi_size > 1 and local_rank > 0:
        dist.barrier()
    try:
        yield
    finally:
        if mpi_size > 1 and local_rank == 0:
            dist.barrier()


def distributed_maybe_download(path, local_rank, mpi_size):
    """utils.maybe_download, once per host."""
    with first_rank_first(local_rank, mpi_size):
        return maybe_download(path)


# ---- models --------------------------------------------------------------------------------


class OneProcess(nn.Module):
    """What DistributedDataParallel is to several processes: `module`, and the same names."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args):
        return self.module(*args)


def load_vaes(H, logprint):
    """Builds the model and its EMA on H.device, restored as H says, alike on all ranks.

    Returns:
        (vae, ema_vae): vae wrapped for the run's processes, its VAE in vae.module.

    Raises:
        UserError: for block strings or files that do not fit.
    """
    vae = VAE(H)
    if H.restore_path:
        logprint(f"restoring weights from {H.restore_path}")
        restore_params(vae, H.restore_path, H.local_rank, H.mpi_size, map_cpu=True)
    ema_vae = copy.deepcopy(vae)
    if H.restore_ema_path:
        logprint(f"restoring EMA weights from {H.restore_ema_path}")
        restore_params(ema_vae, H.restore_ema_path, H.local_rank, H.mpi_size, map_cpu=True)
    ema_vae.requires_grad_(False)
    vae, ema_vae = vae.to(H.device), ema_vae.to(H.device)
    parameters = sum(p.numel() for p in vae.parameters())
    logprint(f"{parameters:,} parameters, {len(vae.decoder.dec_blocks)} stochastic layers")
    if mpi_size() == 1:
        return OneProcess(vae), ema_vae
    for p in ema_vae.parameters():
        dist.broadcast(p, src=0)
    device_ids = None if H.device == "cpu" else [torch.device(H.device).index]
    # It broadcasts rank 0's weights.
    return DistributedDataParallel(
        vae, device_ids=device_ids, gradient_as_bucket_view=True
    ), ema_vae


def update_ema(vae, ema_vae, ema_rate):
    """Moves every EMA weight: p_ema ← ema_rate · p_ema + (1 − ema_rate) · p."""
    ema, current = list(ema_vae.parameters()), list(vae.parameters())
    get_ema_multi_avg_fn(ema_rate)(ema, current, None)


# ---- checkpoint files ----------------------------------------------------------------------


def read_torch_file(path):
    """What torch.save wrote, on the CPU: tensors and plain containers, nothing that runs code.

    Raises:
        UserError: for a file that is missing, truncated, foreign or holds other objects.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: check the path of the --restore option") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder: name the .th file in it") from None
    except Exception as error:  # a damaged file raises nearly anything
        if "weights_only" in str(error).lower().replace(" ", "_"):
            reason = "it holds objects other than tensors, which could run code"
        else:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} is no complete checkpoint ({reason}): fetch it anew") from None


def _shapes(state_dict):
    return {name: tuple(t.shape) for name, t in state_dict.items()}


def preset_of(shapes):
    """Name of the preset whose state dict has these names and shapes, or None."""
    for name in HPARAMS_REGISTRY:
        with torch.device("meta"):
            if _shapes(VAE(get_hparams(name)).state_dict()) == shapes:
                return name
    return None


def restore_params(model, path, local_rank, mpi_size, map_ddp=True, map_cpu=False):
    """Loads model.th or model-ema.th, of ours or released, strictly into a VAE.

    map_ddp drops the `module.` that names in model.th start with. The file is read to the CPU
    whatever map_cpu says.

    Raises:
        UserError: for a file that can't be read or holds another model, naming its preset.
    """
    path = distributed_maybe_download(path, local_rank, mpi_size)
    state = read_torch_file(path)
    if not isinstance(state, dict) or not all(map(torch.is_tensor, state.values())) or not state:
        raise UserError(f"{path} holds no state dict of tensors: name a model.th or model-ema.th")
    if map_ddp:
        state = {str(name).removeprefix("module."): t for name, t in state.items()}
    wanted, found = _shapes(model.state_dict()), _shapes(state)
    if found != wanted:
        preset = preset_of(found)
        odd = [n for n in [*wanted, *found] if wanted.get(n) != found.get(n)]
        what = f"the {preset} model" if preset else "a model of none of the presets"
        raise UserError(
            f"{path} holds {what}, not the one asked for ({len(odd)} entries differ; "
            f"{odd[0]}: {found.get(odd[0], 'absent')} in the file, "
            f"{wanted.get(odd[0], 'absent')} in the model): "
            + (f"use --hps {preset}" if preset else "use the options it was trained with")
        )
    model.load_state_dict(state)


def restore_log(path, local_rank, mpi_size):
    """(lowest eval elbo or inf, largest step, largest epoch) in a log.jsonl.

    Raises:
        UserError: for a file that is missing, or holds no `train_loss` line.
    """
    path = distributed_maybe_download(path, local_rank, mpi_size)
    try:
        with open(path, encoding="utf-8") as file:
            events = [json.loads(line) for line in file if line.strip()]
        evals = [e["elbo"] for e in events if e.get("type") == "eval_loss"]
        trains = [e for e in events if e.get("type") == "train_loss"]
        iterate, epoch = (max(int(e[key]) for e in trains) for key in ("step", "epoch"))
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror}): check its path") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{path} is no log.jsonl with train_loss lines, each a JSON object with step and "
            f"epoch: name a PREFIX-log.jsonl"
        ) from None
    return min(evals, default=math.inf), iterate, epoch


def write_file(path, write):
    """Writes a file through write(temporary path), so that `path` is the old file or the new."""
    partial = f"{path}.partial"
    write(partial)
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def save_model(path, vae, ema_vae, optimizer, H):
    """Writes path-model.th, path-model-ema.th, path-opt.th and, from the run, path-log.jsonl."""
    for suffix, owner in (("model", vae), ("model-ema", ema_vae), ("opt", optimizer)):
        state = owner.state_dict()
        write_file(f"{path}-{suffix}.th", lambda partial, state=state: torch.save(state, partial))
    log = os.path.join(H.save_dir, "log.jsonl")
    if os.path.exists(log):
        write_file(f"{path}-log.jsonl", lambda partial: shutil.copyfile(log, partial))


# ---- optimizer -----------------------------------------------------------------------------


def linear_warmup(warmup_iters):
    """Factor of the learning rate as a function of the step, from 0: up to 1 in warmup_iters."""

    def factor(step):
        return min(1.0, (step + 1) / warmup_iters) if warmup_iters else 1.0

    return factor


def make_optimizer(parameters, H, use_apex):
    """AdamW: NVIDIA Apex's FusedAdam if asked for and usable, else PyTorch's fused one.

    Returns:
        (optimizer, which one it is and, if Apex was asked for and is not used, why).
    """
    options = dict(lr=H.lr, betas=(H.adam_beta1, H.adam_beta2), eps=1e-8, weight_decay=H.wd)
    parameters = list(parameters)
    reason = ""
    if use_apex:
        try:
            from apex.optimizers import FusedAdam

            return FusedAdam(parameters, adam_w_mode=True, **options), "NVIDIA Apex FusedAdam"
        # An unrelated package, an empty folder, a build without CUDA kernels: each of the names
        # `apex` fails in its own way, some only when constructed.
        except Exception as error:
            reason = f" (no usable NVIDIA Apex: {type(error).__name__}: {error})"
    return torch.optim.AdamW(parameters, fused=True, **options), f"torch.optim.AdamW{reason}"


def convert_optimizer_state(state, parameters, per_parameter_step):
    """The state part of an optimizer file, of Apex's or AdamW's layout, for either optimizer.

    Args:
        state: a file's content. Apex keeps one `step` in the group, AdamW one per parameter.
        parameters: the model's, in the order of the file's positions.
        per_parameter_step: the layout wanted.

    Returns:
        ({position: {exp_avg, exp_avg_sq} and, as asked, step, float32 0-dim}, applied updates).

    Raises:
        ValueError: for content of another layout, or moments of other shapes.
    """
    [group] = state["param_groups"]
    parameters = list(parameters)
    if len(group["params"]) != len(parameters):
        raise ValueError(f"it is for {len(group['params'])} parameters, not {len(parameters)}")
    converted, step = {}, int(group.get("step", 0))
    for position, (key, p) in enumerate(zip(group["params"], parameters, strict=True)):
        if key not in state["state"]:  # no update was ever applied
            continue
        entry = state["state"][key]
        step = int(entry.get("step", step))
        moments = {name: entry[name].float().clone() for name in ("exp_avg", "exp_avg_sq")}
        for name, moment in moments.items():
            if moment.shape != p.shape:
                raise ValueError(
                    f"{name} {position} is {tuple(moment.shape)}, the parameter {tuple(p.shape)}"
                )
        converted[position] = moments
        if per_parameter_step:
            moments["step"] = torch.tensor(float(step))
    return converted, step


def restore_optimizer(optimizer, path, local_rank, mpi_size):
    """Loads an opt.th, of ours or released; learning rate, betas and decay stay the run's.

    Raises:
        UserError: for a file that can't be read or belongs to another model.
    """
    path = distributed_maybe_download(path, local_rank, mpi_size)
    content = read_torch_file(path)
    [group] = optimizer.param_groups
    apex = not isinstance(optimizer, torch.optim.AdamW)
    try:
        state, step = convert_optimizer_state(content, group["params"], not apex)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} holds no optimizer state for this model ({error}): name the opt.th that was "
            f"saved with the weights"
        ) from None
    own = optimizer.state_dict()["param_groups"][0]
    if apex:
        own |= {"step": step, "bias_correction": True}
    optimizer.load_state_dict({"state": state, "param_groups": [own]})


def load_opt(H, vae, logprint):
    """The optimizer and learning rate schedule, restored as H says.

    Returns:
        (optimizer, scheduler, lowest eval elbo so far, step, epoch to start with).
    """
    optimizer, name = make_optimizer(vae.parameters(), H, use_apex=H.device != "cpu")
    logprint(f"optimizer: {name}")
    cur_eval_loss, iterate, starting_epoch = math.inf, 0, 0
    if H.restore_optimizer_path:
        logprint(f"restoring optimizer from {H.restore_optimizer_path}")
        restore_optimizer(optimizer, H.restore_optimizer_path, H.local_rank, H.mpi_size)
    if H.restore_log_path:
        cur_eval_loss, iterate, starting_epoch = restore_log(
            H.restore_log_path, H.local_rank, H.mpi_size
        )
        logprint(f"continuing from step {iterate}, epoch {starting_epoch}")
    # A skipped update is no mistake in the order of calls.
    warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
    # The schedule is a function of the step alone: a restored run does not warm up again.
    for group in optimizer.param_groups:
        group["initial_lr"] = H.lr
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, linear_warmup(H.warmup_iters), last_epoch=iterate - 1
    )
    return optimizer, scheduler, cur_eval_loss, iterate, starting_epoch


# ---- averages for the log -------------------------------------------------------------------


def accumulate_stats(stats, frequency):
    """One dict for a log line from the dicts of the last `frequency` steps.

    Means, but: sums of rate_nans, distortion_nans and skipped_updates; the largest finite
    grad_norm (0 if none is); elbo_filtered, the mean of the finite elbos.
    """
    recent = list(stats)[-frequency:]
    result = {}
    for key in recent[-1]:
        values = np.array([s[key] for s in recent], dtype=np.float64)
        finite = values[np.isfinite(values)]
        if key in ("rate_nans", "distortion_nans", "skipped_updates"):
            result[key] = values.sum()
        elif key == "grad_norm":
            result[key] = finite.max(initial=0.0)
        else:
            result[key] = values.mean()
            if key == "elbo":
                result["elbo_filtered"] = finite.mean() if len(finite) else math.nan
    return {key: float(value) for key, value in result.items()}
