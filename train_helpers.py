"""Around the network: start-up, models, EMA, optimizer, checkpoints, averages for the log."""

import contextlib
import copy
import fcntl
import functools
import hashlib
import json
import math
import os
import platform
import re
import shutil
import socket
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from data import keep_image_record, mkdir_p, read_record
from hps import (
    HPARAMS_REGISTRY,
    IMAGE_SETS,
    OPTIONS,
    Hyperparams,
    OneLineParser,
    UserError,
    add_vae_arguments,
    get_hparams,
    parse_args_and_update_hparams,
)
from utils import (
    describe_processes,
    from_rank_0,
    hold_log,
    init_processes,
    local_mpi_rank,
    logger,
    maybe_download,
    mpi_rank,
    mpi_size,
    release_log,
    resolve_device,
    world,
)
from vae import VAE, parse_layer_string
from vae_helpers import allow_tf32

# ---- start-up ------------------------------------------------------------------------------


def set_up_hyperparams(s=None):
    """From arguments (default: the command line's) to a run: processes joined, folders, log, seed.

    Returns:
        (H, logprint), H with every option and mpi_size, rank, local_rank, device, logdir.

    Raises:
        UserError: for anything wrong with the options or the launcher.
    """
    H, logprint = prepare_run(s)
    open_run(H)
    return H, logprint


def prepare_run(s=None):
    """set_up_hyperparams without a trace on the disk, until open_run."""
    H = Hyperparams()
    parser = OneLineParser(
        prog="train.py",
        description="Trains, or with --test_eval evaluates, a very deep VAE. The same command "
        "runs under mpiexec, torchrun and srun. A preset changes the defaults given below.",
    )
    parse_args_and_update_hparams(H, add_vae_arguments(parser), s=s)
    setup_mpi(H)
    name_save_dirs(H)
    hold_log()
    logprint = logger(H.logdir)
    for key in sorted(H):
        logprint(type="hparam", key=key, value=H[key])
    np.random.seed(H.seed % 2**32)
    torch.manual_seed(H.seed)  # all ranks alike: it makes the weights
    for line in describe_processes():
        logprint(line)
    logprint("training model", H.desc, "on", H.dataset)
    return H, logprint


def setup_mpi(H):
    """Joins the processes of the run; sets H.mpi_size, H.rank, H.local_rank and H.device.

    From then on float32 is float32 on CUDA too, unless H.precision is tf32, and cuDNN chooses its
    convolutions by trial if H.cudnn_benchmark.
    """
    H.mpi_size, H.rank, H.local_rank = mpi_size(), mpi_rank(), local_mpi_rank()
    H.device = resolve_device(H.device)
    if H.device != "cpu":
        torch.cuda.set_device(H.device)
    elif H.mpi_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        # Each process would take every core: with two on two cores, ten times slower.
        torch.set_num_threads(max(1, torch.get_num_threads() // world().local_size))
    allow_tf32(H.precision == "tf32")
    torch.backends.cudnn.benchmark = bool(H.cudnn_benchmark)
    init_processes(H.device.split(":")[0], H.port, H.timeout)


def name_save_dirs(H):
    """Sets H.save_dir to the run's folder, save_dir/desc, and H.logdir to its log."""
    H.save_dir = os.path.join(H.save_dir, H.desc)
    H.logdir = os.path.join(H.save_dir, "log")


def setup_save_dirs(H):
    """Makes the run's folder, save_dir/desc; sets H.save_dir to it and H.logdir to its log.

    Raises:
        UserError: if the folder can't be made.
    """
    name_save_dirs(H)
    make_run_folder(H.save_dir)


def make_run_folder(folder):
    try:
        mkdir_p(folder)
    except OSError as error:
        raise UserError(f"--save_dir: {folder} can't be made ({error.strerror})") from None


def open_run(H):
    """Makes the run's folder and begins to write its log; from now on the run leaves traces.

    Raises:
        UserError: if the folder can't be made or written.
    """

    def begin():
        make_run_folder(H.save_dir)
        try:
            release_log()
        except OSError as error:
            raise UserError(
                f"{error.filename or H.save_dir} can't be written ({error.strerror}): make room, "
                f"or choose another folder with --save_dir or --desc"
            ) from None

    from_rank_0(begin)


@functools.cache
def lock_run(folder):
    """Keeps a second training run off a folder, to the end of this process, however it ends.

    The lock is the process's own: loader workers that outlive it don't hold it.

    Raises:
        UserError: if another process has the folder.
    """
    make_run_folder(folder)
    path = os.path.join(folder, "lock")
    try:
        file = open(path, "a+")
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
    except BlockingIOError:
        file.seek(0)
        raise UserError(
            f"{folder} is in use by {file.read().strip() or 'another run'}: stop that run first, "
            f"or name another folder with --desc"
        ) from None
    except OSError as error:
        raise UserError(
            f"{path} can't be written or locked ({error.strerror}): make room, or choose another "
            f"folder with --save_dir"
        ) from None
    return file


def claim_run(H):
    """open_run for training: the folder is this run's alone, and what a kill left in it mended."""

    def claim():
        lock_run(H.save_dir)
        try:
            mend_sets(H.save_dir)
            keep_image_record(H)
        except OSError as error:
            raise UserError(
                f"{error.filename or H.save_dir} can't be written ({error.strerror}): make room, "
                f"or choose another folder with --save_dir"
            ) from None

    from_rank_0(claim)
    open_run(H)


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

    def no_sync(self):
        return contextlib.nullcontext()


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
    if H.checkpoint_activations:
        vae.checkpoint_activations()
    if H.compile or H.cuda_graphs:
        vae.compile_blocks(H.cuda_graphs), ema_vae.compile_blocks(H.cuda_graphs)
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
        with warnings.catch_warnings(action="ignore"):  # of old or odd formats: it reads, or not
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
    """Hyperparameters of the preset whose state dict has these names and shapes, or None.

    Its name is their hparam_sets.
    """
    n_layers = sum(name.endswith("z_proj.weight") for name in shapes)
    for name in HPARAMS_REGISTRY:
        H = get_hparams(name)
        if len(parse_layer_string(H.dec_blocks)) != n_layers:
            continue  # building a model only to see that takes a moment
        with torch.device("meta"):
            if _shapes(VAE(H).state_dict()) == shapes:
                return H
    return None


# What the shapes of the weights depend on, and what the network is fed.
NETWORK = {"dataset", "image_size", "image_channels"} | {name for name, *_ in OPTIONS["network"]}


def recorded_hparams(path):
    """Hyperparameters of the run that wrote the weights `path`, or None where nothing tells them.

    They stand in PREFIX-state.json beside PREFIX-model.th and PREFIX-model-ema.th, or beside the
    file that `path` is a link to.

    Raises:
        UserError: if that file is damaged, or tells of no network.
    """
    for place in (Path(path), Path(os.path.realpath(path))):
        name, ours = re.subn(r"(^|-)model(-ema)?\.th$", r"\1state.json", place.name)
        state = place.with_name(name)
        if ours and state.exists():
            break
    else:
        return None
    try:
        H = Hyperparams(json.loads(state.read_bytes())["hparams"])
        if H.dataset not in (None, *IMAGE_SETS):
            raise ValueError(f"unknown dataset {H.dataset!r}")
        H.hparam_sets = H.hparam_sets or "own network"  # of a program, not of train.py
        with torch.device("meta"):
            VAE(H)
    except Exception as error:  # a damaged file raises nearly anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{state} does not tell the network of {path} ({reason}): name its preset (--hps) and "
            f"the other options of the network it was trained with, or move {state.name} away"
        ) from None
    return H


def read_weights(path, map_ddp=True):
    """The state dict of a VAE in model.th or model-ema.th, ours or released, on the CPU.

    map_ddp drops the `module.` that names in model.th start with.

    Raises:
        UserError: for a file that can't be read or holds something else.
    """
    state = read_torch_file(path)
    if not isinstance(state, dict) or not all(map(_is_float, state.values())) or not state:
        raise UserError(f"{path} holds no state dict of tensors: name a model.th or model-ema.th")
    if map_ddp:
        state = {str(name).removeprefix("module."): t for name, t in state.items()}
    return state


def check_weights(model, state, path, asked="asked for"):
    """Holds a state dict, read from `path`, against a VAE's; `asked` says who wants that one.

    Raises:
        UserError: if it is that of another model, naming its preset.
    """
    wanted, found = _shapes(model.state_dict()), _shapes(state)
    if found != wanted:
        known = preset_of(found)
        preset = known and known.hparam_sets
        odd = [n for n in [*wanted, *found] if wanted.get(n) != found.get(n)]
        what = f"the {preset} model" if preset else "a model of none of the presets"
        raise UserError(
            f"{path} holds {what}, not the one {asked} ({len(odd)} entries differ; "
            f"{odd[0]}: {found.get(odd[0], 'absent')} in the file, "
            f"{wanted.get(odd[0], 'absent')} in the model): "
            + (f"use --hps {preset}" if preset else "use the options it was trained with")
        )
    for name, t in state.items():
        if not t.isfinite().all():
            raise UserError(
                f"{path} holds weights that are no numbers, or infinite ({name}): restore an "
                f"earlier checkpoint"
            )


def _is_float(value):
    """Whether a file's entry is an ordinary tensor of floating-point numbers."""
    return torch.is_tensor(value) and value.layout == torch.strided and value.is_floating_point()


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


def load_model(path, hps=None, device=None):
    """A trained VAE ready to use, in one process: load_model("cifar10-seed0-…-model-ema.th").

    Args:
        path: model-ema.th (the better weights) or model.th, ours or released; a str or Path, or an
            address.
        hps: what get_hparams gives, or a preset's name; None: as recorded by the run beside the
            weights (recorded_hparams), else the preset that the shapes in the file tell.
        device: "cpu", "cuda" or "cuda:1", also as a torch.device; None: CUDA where there is one.

    Returns:
        VAE without gradients; its H holds the hyperparameters, image_size and device among them.

    Raises:
        UserError: for a file that can't be read, or is of no preset or another model; as
            recorded_hparams.
    """
    path = maybe_download(os.fspath(path))
    state, recorded = read_weights(path), None if hps else recorded_hparams(path)
    H = get_hparams(hps) if isinstance(hps, str) else hps or recorded or preset_of(_shapes(state))
    if H is None:
        raise UserError(
            f"{path} holds a model of none of the presets: name the preset (--hps) and the other "
            f"options of the network it was trained with"
        )
    H = Hyperparams(H, device=resolve_device(device))
    if H.dataset == "images":  # what is measured of them lies in the run's folder
        facts = read_record(path, {"mean", "std"}) or {}
        H.update({f"image_{key}": facts[key] for key in ("mean", "std") if facts})
    with torch.device("meta"):
        model = VAE(H)
    asked = "that the run beside it has recorded" if recorded else "asked for"
    check_weights(model, state, path, asked)
    model.to_empty(device="cpu").load_state_dict(state)  # initial weights would be a waste
    return model.requires_grad_(False).eval().to(H.device)


def restore_log(path, local_rank, mpi_size):
    """(lowest eval elbo or inf, largest step, largest epoch) in a log.jsonl.

    A line that a kill cut short is passed over.

    Raises:
        UserError: for a file that is missing, or holds no `train_loss` line.
    """
    path = distributed_maybe_download(path, local_rank, mpi_size)
    events = []
    try:
        with open(path, "rb") as file:
            for line in file:
                with contextlib.suppress(ValueError, RecursionError):
                    events.append(json.loads(line))
        events = [e for e in events if isinstance(e, dict)]
        evals = [float(e["elbo"]) for e in events if e.get("type") == "eval_loss"]
        trains = [e for e in events if e.get("type") == "train_loss"]
        iterate, epoch = (max(int(e[key]) for e in trains) for key in ("step", "epoch"))
        if min(iterate, epoch) < 0:
            raise ValueError
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror}): check its path") from None
    except (ValueError, KeyError, TypeError, OverflowError):
        raise UserError(
            f"{path} is no log.jsonl with train_loss lines, each a JSON object with step and "
            f"epoch: name a PREFIX-log.jsonl"
        ) from None
    return min(evals, default=math.inf), iterate, epoch


# ---- sets of checkpoint files ---------------------------------------------------------------
# What one save writes is a set: a folder sets/SERIAL-PREFIX, numbered in the order of writing,
# which gets that name when all of it is on the disk. PREFIX-model.th and the other names of a set
# are links through the one link sets/PREFIX, so that they all change from one set to the next in
# the same instant. sets/*.partial is what a kill has left of a set; the next start removes it.


SET_NAMES = ("model.th", "model-ema.th", "opt.th", "log.jsonl", "state.json")


def fsync(path):
    """Waits until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path, content):
    """Writes a file, so that `path` is the old one or the new one, whole."""
    partial = f"{path}.partial"
    try:
        Path(partial).write_bytes(content)
        fsync(partial)
        os.replace(partial, path)
    finally:
        Path(partial).unlink(missing_ok=True)


def _link(path, target):
    """Makes path a symbolic link to target, in one step whatever was there."""
    if os.path.islink(path) and os.readlink(path) == target:
        return
    partial = f"{path}.partial"
    Path(partial).unlink(missing_ok=True)
    try:
        os.symlink(target, partial)
        os.replace(partial, path)
    finally:
        Path(partial).unlink(missing_ok=True)


def complete_sets(folder, prefix=".+"):
    """The complete sets in a run's folder, newest first: [(serial, prefix, path)]."""
    found = []
    if os.path.isdir(os.path.join(folder, "sets")):
        for name in os.listdir(os.path.join(folder, "sets")):
            match = re.fullmatch(rf"(\d+)-({prefix})(?<!\.partial)", name)
            if match and not os.path.islink(os.path.join(folder, "sets", name)):
                found.append((int(match[1]), match[2], os.path.join(folder, "sets", name)))
    return sorted(found, reverse=True)


def _make_set(folder, prefix, fill):
    """Makes a set: fill(partial folder) writes its files.

    Raises:
        OSError: if that fails; nothing of it is left.
    """
    sets = os.path.join(folder, "sets")
    mkdir_p(sets)
    serial = 1 + max((serial for serial, _, _ in complete_sets(folder)), default=0)
    path = os.path.join(sets, f"{serial:06}-{prefix}")
    partial = f"{path}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # of a save that could not even clean up
    try:
        os.mkdir(partial)
        fill(partial)
        for name in os.listdir(partial):
            fsync(os.path.join(partial, name))
        fsync(partial)
        os.rename(partial, path)
    except RuntimeError as error:
        # torch.save meets a full disk with an error of its own.
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    fsync(sets)


def _show_newest_set(folder, prefix):
    """Makes PREFIX-* the names of the newest complete set; `latest` keeps the one before it."""
    (_, _, newest), *older = complete_sets(folder, re.escape(prefix))

    def name_files(also_plain):
        for name in os.listdir(newest):
            path = os.path.join(folder, f"{prefix}-{name}")
            if also_plain or not os.path.lexists(path):
                _link(path, os.path.join("sets", prefix, name))

    name_files(also_plain=False)
    _link(os.path.join(folder, "sets", prefix), os.path.basename(newest))  # the instant
    name_files(also_plain=True)
    fsync(os.path.join(folder, "sets"))
    fsync(folder)
    for _, _, path in older[1 if prefix == "latest" else 0 :]:
        _remove_set(path)


def _adopt_plain_files(folder, prefix):
    """Makes a set of another program's files under our names, so that none of them is lost."""
    paths = {name: os.path.join(folder, f"{prefix}-{name}") for name in SET_NAMES}
    paths = {name: path for name, path in paths.items() if os.path.exists(path)}

    def fill(partial):
        for name, path in paths.items():
            # An adoption that was interrupted has made links of some of them.
            os.link(os.path.realpath(path), os.path.join(partial, name))

    if not all(map(os.path.islink, paths.values())):
        _make_set(folder, prefix, fill)
        _show_newest_set(folder, prefix)


def _remove_set(path):
    os.rename(path, f"{path}.partial")  # no kill leaves half of a set that counts as complete
    # NFS keeps files that another process reads; the next start removes what is left.
    shutil.rmtree(f"{path}.partial", ignore_errors=True)


def remove_old_sets(folder, keep):
    """Removes the sets iter-N but for the newest `keep`, and their names."""
    for _, prefix, path in complete_sets(folder, r"iter-\d+")[keep:]:
        _remove_set(path)
        for name in SET_NAMES:
            Path(folder, f"{prefix}-{name}").unlink(missing_ok=True)
        Path(folder, "sets", prefix).unlink(missing_ok=True)


def mend_sets(folder):
    """Ends what a kill has interrupted: half a set goes, a complete one gets its names."""
    folder, sets = Path(folder), Path(folder, "sets")
    for path in sets.glob("*.partial"):
        path.unlink() if path.is_symlink() else shutil.rmtree(path)
    for prefix in {prefix for _, prefix, _ in complete_sets(folder)}:
        _adopt_plain_files(folder, prefix)
        _show_newest_set(folder, prefix)
    for path in [*folder.glob("*"), *sets.glob("*")]:
        if path.is_symlink() and not path.exists():
            if path.parent == sets or path.readlink().parts[:1] == ("sets",):
                path.unlink()
    for path in folder.glob("samples-*.partial"):
        path.unlink()


def save_model(path, vae, ema_vae, optimizer, H):
    """Writes path-model.th, path-model-ema.th, path-opt.th and, from the run, path-log.jsonl.

    Whatever happens, the names are those of the old files or of the new ones, never a mixture.

    Raises:
        OSError: if they can't be written; the old ones are as they were.
    """
    save_run(path, vae, ema_vae, optimizer, H, {})


def save_run(path, vae, ema_vae, optimizer, H, state):
    """save_model, and path-state.json: `state`, and all else that defines how the run goes on.

    The noise of a step is a function of (seed, rank, step), the order of the images one of (seed,
    epoch): with these numbers in it, no random generator's state is worth keeping.
    """
    folder, prefix = os.path.split(os.path.abspath(path))

    def fill(partial):
        for name, owner in (("model.th", vae), ("model-ema.th", ema_vae), ("opt.th", optimizer)):
            with open(os.path.join(partial, name), "wb") as file:
                torch.save(owner.state_dict(), file)
        log = os.path.join(H.save_dir, "log.jsonl")
        if os.path.exists(log):
            shutil.copyfile(log, os.path.join(partial, "log.jsonl"))
        content = {
            **state,
            "hparams": {k: v for k, v in H.items() if k not in ("resumed", "image_record")},
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "sha256": {name: sha256(os.path.join(partial, name)) for name in os.listdir(partial)},
        }
        # It is the last file of a set.
        with open(os.path.join(partial, "state.json"), "w") as file:
            file.write(json.dumps(content, default=str))

    _adopt_plain_files(folder, prefix)
    _make_set(folder, prefix, fill)
    _show_newest_set(folder, prefix)


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- resuming -------------------------------------------------------------------------------

# What may differ between two starts of a run without a word.
PLACES = {"resume", "test_eval", "save_dir", "logdir", "port", "timeout", "rank", "local_rank"} | {
    name for name, *_ in OPTIONS["restore"]
}


def resume_run(H, logprint):
    """With --resume, makes H restore the newest complete set of the run's folder, if it has one.

    H.resumed is that set's state.json, else None.

    Raises:
        UserError: if the folder is in use, no set is whole, or the network is another now.
    """
    if not H.resume:
        if not H.test_eval and complete_sets(H.save_dir):
            logprint(f"{H.save_dir} has files of an earlier run; a new one starts (no --resume)")
        return

    def find():
        if not H.test_eval and os.path.isdir(H.save_dir):
            lock_run(H.save_dir)
        return newest_set(H.save_dir, logprint)

    found = from_rank_0(find)
    if found is None:
        logprint(f"nothing to resume in {H.save_dir}: a new run starts")
        return
    path, H.resumed = found
    logprint(f"resuming from {path}: step {H.resumed['step']}, epoch {H.resumed['epoch']}")
    old = H.resumed["hparams"]
    for key in sorted((old.keys() & H.keys()) - PLACES):
        if old[key] == H[key]:
            continue
        change = f"{key} is {H[key]!r} now; the run had {old[key]!r}"
        if key in NETWORK:
            raise UserError(f"--resume: {change}, and the network depends on it: set it back")
        logprint(f"WARNING: {change}: it goes on, but not bit for bit as without a break")
    H.restore_path = os.path.join(path, "model.th")
    H.restore_ema_path = os.path.join(path, "model-ema.th")
    H.restore_optimizer_path = os.path.join(path, "opt.th")
    H.restore_log_path = None


def newest_set(folder, logprint):
    """(path, content of state.json) of the newest set that is whole; None where there is none.

    Raises:
        UserError: if there are sets, but none is whole.
    """
    damaged = None
    for _, _, path in complete_sets(folder):
        if not os.path.exists(os.path.join(path, "state.json")):
            continue  # another program's files, see _adopt_plain_files
        try:
            state = json.loads(Path(path, "state.json").read_text())
            for name, digest in state["sha256"].items():
                if sha256(os.path.join(path, name)) != digest:
                    raise ValueError(f"{name} is not what was written")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            damaged = f"{path} is damaged ({error})"
            logprint(f"WARNING: {damaged}: an older set is used")
            continue
        if "step" in state:  # else a program's own, of save_model
            return path, state
    if damaged:
        raise UserError(f"--resume: {damaged}, and no older set is whole: move it away first")
    return None


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
        if step < 0:
            raise ValueError(f"step {step} is below 0")
        moments = {name: entry[name].float().clone() for name in ("exp_avg", "exp_avg_sq")}
        for name, moment in moments.items():
            if moment.shape != p.shape:
                raise ValueError(
                    f"{name} {position} is {tuple(moment.shape)}, the parameter {tuple(p.shape)}"
                )
            if not moment.isfinite().all():
                raise ValueError(f"{name} {position} is not finite")
        # In AdamW's own order, so that a resumed run writes the same file.
        own = {"step": torch.tensor(float(step))} if per_parameter_step else {}
        converted[position] = own | moments
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
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
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
