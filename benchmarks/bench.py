"""Time, memory and arithmetic of the network against its plain rendition (reference.py).

    python benchmarks/bench.py --presets cifar10 --batches 8 --precision bf16 --json out.json

Both are measured in the same process and in turns, so that their ratio holds on a machine whose
speed wanders. `train` is forward and backward, `update` clipping, AdamW and EMA, `likelihood`
the mixture's loss and its gradient. With --checkpoint_activations or --compile a last column has
the time as a multiple of that without.
"""

import copy
import itertools
import json
import math
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from reference import PlainVAE, plain_mixture_loss

from compiling import compile_network
from endings import run_command
from errors import UserError
from hps import HPARAMS_REGISTRY
from image_sets import target_bits
from labels import given
from launchers import resolve_device
from likelihood import discretized_mix_logistic_loss, n_parameters
from optimizers import make_optimizer
from options import OneLineParser
from precision import allow_tf32, forward_precision
from presets import get_hparams
from reports import saved_bytes
from train_helpers import update_ema
from vae import VAE

TASKS = ("train", "evaluate", "sample", "update", "likelihood")


class _CountCalls(TorchDispatchMode):
    """Counts the operators that compute: views and detached copies cost no kernel."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += not func.is_view
        return func(*args, **(kwargs or {}))


def peak_bytes(device, call):
    """Most bytes of tensors during call(), above those alive before it."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = (e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(itertools.accumulate(changes, initial=0))


# What a turn of a rendition takes at least: shorter calls are made several times. One of 4 ms, an
# image of digits, tells as much of what else the machine does.
TURN_SECONDS = 0.1


def seconds(device, call, n_calls=1):
    """Of one call, the mean of n_calls."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(n_calls):
        call()
    wait()
    return (time.perf_counter() - start) / n_calls


def matrix_peak(device, kind):
    """FLOP/s of the faster of a product of square matrices and a 1x1 convolution of 512 channels.

    Which of the two a machine's libraries do better differs: both are matrix products. On a GPU
    each is of 8192 rows or more and waited for once in eight: else their launch is measured.
    """
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    size, images, a_wait = (8192, 64, 8) if device.startswith("cuda") else (2048, 8, 1)
    a = torch.randn(size, size, device=device, dtype=dtype)
    image = a.new_ones(images, 512, 32, 32).contiguous(memory_format=torch.channels_last)
    weight = a[:512, :512, None, None].contiguous()
    calls = {
        2 * size**3: lambda: a @ a,
        2 * images * 32 * 32 * 512 * 512: lambda: torch.nn.functional.conv2d(image, weight),
    }

    allow_tf32(kind == "tf32")
    with torch.no_grad(), forward_precision(kind, device):
        return max(
            n / min(seconds(device, call, a_wait) for _ in range(8)) for n, call in calls.items()
        )


def tasks_of(H, model, x, target, plain):
    """The calls to measure of one rendition: {task: (call, forward or None)}.

    forward is what keeps tensors for a backward pass.
    """
    own_vae = model.vae if plain else model
    kind = "fp32" if plain else H.precision

    def precision():
        allow_tf32(kind == "tf32")
        return forward_precision(kind, H.device)

    labels = torch.arange(len(x), device=x.device) % H.n_labels if H.n_labels else None

    def forward():
        with precision():
            return model(x, target, **given(labels))["elbo"]

    def train():
        model.zero_grad(set_to_none=True)
        forward().backward()

    def evaluate():
        with torch.no_grad():
            forward()

    def sample():
        with torch.no_grad(), precision():
            model.forward_uncond_samples(len(x))

    ema = VAE(H).to(H.device).requires_grad_(False)
    if plain:
        optimizer = torch.optim.AdamW(model.parameters(), lr=H.lr, foreach=False)
    else:
        optimizer = make_optimizer(own_vae.parameters(), H, use_apex=False)[0]

    def update():
        torch.nn.utils.clip_grad_norm_(own_vae.parameters(), H.grad_clip, foreach=not plain)
        optimizer.step()
        if plain:
            with torch.no_grad():
                for e, p in zip(ema.parameters(), own_vae.parameters(), strict=True):
                    e.lerp_(p, 1 - H.ema_rate)
        else:
            update_ema(own_vae, ema, H.ema_rate)

    n = n_parameters(x.shape[-1]) * H.num_mixtures
    l = torch.randn(*x.shape[:3], n, device=x.device, requires_grad=True)
    mixture_loss = plain_mixture_loss if plain else discretized_mix_logistic_loss

    def loss():
        return mixture_loss(target, l, target_bits(H.dataset) == 5).sum()

    def likelihood():
        l.grad = None
        loss().backward()

    return {
        "train": (train, forward),
        "evaluate": (evaluate, None),
        "sample": (sample, None),
        "update": (update, None),
        "likelihood": (likelihood, loss),
    }


def measure(args, preset, batch):
    """One row a task: both renditions' figures, and the ratios of their medians."""
    H = get_hparams(preset)
    H.update(device=args.device, precision=args.precision)
    torch.manual_seed(0)
    own = VAE(H).to(args.device)
    plain = PlainVAE(own).to(args.device)
    modules = {"plain": plain, "own": own}
    if args.checkpoint_activations or args.compile:  # what they cost or gain is measured too
        modules["without"] = copy.deepcopy(own)
    if args.checkpoint_activations:
        own.checkpoint_activations()
    if args.compile:
        compile_network(own)
    shape = batch, H.image_size, H.image_size, H.image_channels
    x = torch.randn(shape, device=args.device)
    target = torch.randint(0, 256, shape, device=args.device) / 127.5 - 1
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        plain(x, target)
    forward_flop = counter.get_total_flops()
    flop = {"train": 3 * forward_flop, "evaluate": forward_flop}
    renditions = {
        name: tasks_of(H, module, x, target, plain=module is plain)
        for name, module in modules.items()
    }
    peaks = {kind: matrix_peak(args.device, kind) for kind in {"fp32", args.precision}}
    rows = []
    for task in args.tasks:
        row = {"preset": preset, "batch": batch, "task": task}
        times = {name: [] for name in renditions}
        for name, calls in renditions.items():
            call, forward = calls[task]
            if task == "update":
                calls["train"][0]()  # it needs gradients
            call()
            with _CountCalls() as counter:
                call()
            if task == "train":
                modules[name].zero_grad(set_to_none=True)  # the gradients count
            row[name] = {
                "calls": counter.calls,
                "peak_mb_per_image": peak_bytes(args.device, call) / batch / 1e6,
            }
            if forward:
                row[name]["saved_mb_per_image"] = saved_bytes(modules[name], forward) / batch / 1e6
        n_calls = math.ceil(TURN_SECONDS / seconds(args.device, renditions["plain"][task][0]))
        for turn in range(args.rounds):
            for name in list(renditions)[:: -1 if turn % 2 else 1]:
                times[name].append(seconds(args.device, renditions[name][task][0], n_calls))
        for name in renditions:
            median = statistics.median(times[name])
            row[name] |= {"seconds": median, "all_seconds": times[name]}
            row[name]["images_per_second"] = batch / median
            if task in flop:
                kind = "fp32" if name == "plain" else args.precision
                row[name]["tflops"] = flop[task] / median / 1e12
                row[name]["peak_share"] = flop[task] / median / peaks[kind]
        own_row, plain_row = row["own"], row["plain"]
        row["speedup"] = plain_row["seconds"] / own_row["seconds"]
        if "without" in row:
            row["time_of_without"] = own_row["seconds"] / row["without"]["seconds"]
        for key in ("saved_mb_per_image", "peak_mb_per_image"):
            if plain_row.get(key):
                row[f"{key.split('_')[0]}_ratio"] = own_row[key] / plain_row[key]
        rows.append(row)
        print_row(row)
        if args.profile:
            print_profile(args.device, renditions["own"][task][0])
    return rows, peaks


def print_profile(device, call, n_rows=6):
    """The operators that take the longest in a call: milliseconds, share, number of calls."""
    with profile() as profiler:
        call()
    kind = "self_cpu_time_total" if device == "cpu" else "self_device_time_total"
    found = sorted(profiler.key_averages(), key=lambda e: -getattr(e, kind))
    total = sum(getattr(e, kind) for e in found)
    for e in found[:n_rows]:
        time = getattr(e, kind)
        print(f"{'':17}{e.key:34}{time / 1e3:8.0f} ms {time / total:5.0%} {e.count:6} calls")


def print_row(row):
    def cell(key, digits):
        pair = (row[name].get(key) for name in ("plain", "own"))
        return " → ".join("-" if v is None else f"{v:,.{digits}f}" for v in pair)

    print(
        f"{row['preset']:10} {row['batch']:5} {row['task']:10} {row['speedup']:7.2f}x "
        f"{cell('images_per_second', 2):>17} {cell('tflops', 3):>15} {cell('peak_share', 2):>11} "
        f"{cell('saved_mb_per_image', 1):>15} {cell('peak_mb_per_image', 1):>15} "
        f"{cell('calls', 0):>14}"
        + (f" {row['time_of_without']:8.2f}x" if "without" in row else ""),
        flush=True,
    )


def main(s=None):
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", default="cifar10", help="one or several with commas")
    parser.add_argument("--batches", default="8", help="images a call, one or several with commas")
    parser.add_argument("--tasks", default=",".join(TASKS), help="some of the default, with commas")
    parser.add_argument("--precision", default="fp32", help="fp32, tf32 or bf16, of our own only")
    parser.add_argument("--checkpoint_activations", action="store_true", help="as in train.py")
    parser.add_argument("--compile", action="store_true", help="as in train.py")
    parser.add_argument("--profile", action="store_true", help="also what takes our own longest")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--rounds", type=int, default=5, help="turns of which to take the median")
    parser.add_argument("--json", default=None, help="file for the figures")
    args = parser.parse_args(s)
    args.tasks = args.tasks.split(",")
    for option, values, known in (
        ("presets", args.presets.split(","), HPARAMS_REGISTRY),
        ("tasks", args.tasks, TASKS),
        ("precision", [args.precision], ("fp32", "tf32", "bf16")),
    ):
        for value in values:
            if value not in known:
                raise UserError(f"--{option}: got {value!r}; it must be one of {', '.join(known)}")
    args.device = resolve_device(args.device)
    print(
        f"plain → own; {args.device}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, own in {args.precision}\n"
        f"{'preset':10} {'batch':>5} {'task':10} {'speed':>8} "
        f"{'images/s':>17} {'TFLOP/s':>15} {'of peak':>11} {'saved MB/image':>15} "
        f"{'peak MB/image':>15} {'op calls':>14}"
        + (f" {'time':>9}" if args.checkpoint_activations or args.compile else ""),
        flush=True,
    )
    report = {"torch": torch.__version__, "threads": torch.get_num_threads(), **vars(args)}
    report["rows"] = []
    for preset in args.presets.split(","):
        for batch in map(int, args.batches.split(",")):
            rows, peaks = measure(args, preset, batch)
            report["rows"] += rows
            report["matrix_peak_tflops"] = {k: v / 1e12 for k, v in peaks.items()}
    print("matrix peak, TFLOP/s:", ", ".join(f"{k} {v / 1e12:.3f}" for k, v in peaks.items()))
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1))
    return report


if __name__ == "__main__":
    run_command(main)
