"""What --compile costs and brings: seconds of compiling, a step's time, the steps until it pays.

    python benchmarks/compiled.py digits photos32 cifar10

Each preset trains and is evaluated in a process of its own with an empty cache of compiled code,
then in another that finds what the first has left. `pays` are the steps of training after which the
first of them is ahead of a run without --compile, evaluations aside.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import TURN_SECONDS, seconds

from compiling import compile_network
from endings import die_with_parent, run_command
from labels import labels_of
from launchers import resolve_device
from options import OneLineParser
from presets import get_hparams
from vae import VAE


def child(args):
    """Prints a JSON object of seconds: the first compiled passes, and steps in turns with eager."""
    die_with_parent()
    [preset] = args.presets
    H = get_hparams(preset, device=args.device)
    if args.batch:
        H.n_batch = args.batch
    torch.manual_seed(0)
    shape = H.n_batch, H.image_size, H.image_size, H.image_channels
    x = torch.randn(shape, device=args.device)
    target = torch.rand_like(x) * 2 - 1
    n_labels = labels_of(H)
    labels = torch.arange(H.n_batch) % n_labels if n_labels else None
    figures, calls = {}, {}
    for name in ("eager", "compiled"):
        vae = VAE(H).to(args.device)
        ema_vae = VAE(H).to(args.device).requires_grad_(False)
        if name == "compiled":
            compile_network(vae)
            compile_network(ema_vae)

        def train(vae=vae):
            vae.zero_grad(set_to_none=True)
            vae(x, target, labels=labels)["elbo"].backward()

        def evaluate(ema_vae=ema_vae):
            with torch.inference_mode():
                ema_vae(x, target, labels=labels)

        for task, call in (("train", train), ("evaluate", evaluate)):
            figures[f"{name}_{task}_first"] = seconds(args.device, call)
            calls[f"{name}_{task}"] = call
    times = {name: [] for name in calls}
    n_calls = {name: math.ceil(TURN_SECONDS / seconds(args.device, calls[name])) for name in calls}
    for _ in range(args.rounds):
        for name, call in calls.items():
            times[name].append(seconds(args.device, call, n_calls[name]))
    figures |= {name: statistics.median(found) for name, found in times.items()}
    print(json.dumps(figures))


def measure(args, preset):
    """The figures of one preset, from two processes that share a cache of compiled code."""
    command = [sys.executable, __file__, preset, "--child", "--device", args.device]
    command += ["--rounds", str(args.rounds), "--batch", str(args.batch)]
    first = []
    with tempfile.TemporaryDirectory() as cache:
        for _ in range(2):
            done = subprocess.run(
                command,
                env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache},
                capture_output=True,
                text=True,
            )
            if done.returncode:
                raise RuntimeError(done.stderr)
            found = json.loads(done.stdout.splitlines()[-1])
            first.append(
                {
                    task: found[f"compiled_{task}_first"] - found[f"compiled_{task}"]
                    for task in ("train", "evaluate")
                }
            )
    gain = found["eager_train"] - found["compiled_train"]
    return {
        "preset": preset,
        "train_s": found["eager_train"],
        "train_time_of_eager": found["compiled_train"] / found["eager_train"],
        "evaluate_time_of_eager": found["compiled_evaluate"] / found["eager_evaluate"],
        "compile_train_s": first[0]["train"],
        "compile_evaluate_s": first[0]["evaluate"],
        "again_train_s": first[1]["train"],
        "again_evaluate_s": first[1]["evaluate"],
        "pays": math.ceil(first[0]["train"] / gain) if gain > 0 else None,
    }


def main(s=None):
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("presets", nargs="+", help="such as digits")
    parser.add_argument("--batch", type=int, default=0, help="images a step; 0: the preset's")
    parser.add_argument("--rounds", type=int, default=9, help="turns of which to take the median")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(s)
    args.device = resolve_device(args.device)
    if args.child:
        return child(args)
    rows = []
    print(f"compiling {', '.join(args.presets)}: some minutes each", flush=True)
    for preset in args.presets:
        rows.append(measure(args, preset))
        print(
            json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()})
        )
    return rows


if __name__ == "__main__":
    run_command(main)
