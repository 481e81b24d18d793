"""The step around the network: what data, EMA and log lines cost, and a second process.

    python benchmarks/step.py

Trains the cifar10 network on photos32's images for a few steps, in turns as one process of two
threads and as two processes of one thread each under torchrun, on the same global batch.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from batches import EpochBatches, make_loader
from data import set_up_data
from endings import run_command
from errors import UserError
from launchers import resolve_device, world
from options import OneLineParser
from presets import get_hparams
from run_folder import begin_run
from train import training_step
from train_helpers import accumulate_stats, load_opt, load_vaes, set_up_hyperparams, update_ema


def child(args):
    """Runs the steps and prints a JSON object of median seconds: step, data, ema, log."""
    options = (
        f"--hps {args.preset} --dataset photos32 --device {args.device} --save_dir {args.child}"
    )
    H, logprint = set_up_hyperparams(
        [*options.split(), "--n_batch", str(args.batch // world().size)]
    )
    H, train_set, _, preprocess = set_up_data(H)
    vae, ema_vae = load_vaes(H, logprint)
    optimizer, *_ = load_opt(H, vae, logprint)
    begin_run(H)
    batches = EpochBatches(len(train_set), H.n_batch, world().rank, world().size, H.seed)
    loader = iter(make_loader(H, train_set, batch_sampler=batches))
    times = {"step": [], "data": [], "ema": [], "log": []}

    def timed(name, call):
        start = time.perf_counter()
        result = call()
        if H.device.startswith("cuda"):
            torch.cuda.synchronize()
        times[name].append(time.perf_counter() - start)
        return result

    for i in range(args.steps + 1):
        torch.manual_seed(i)
        x, target = timed("data", lambda: preprocess(next(loader)))
        stats = timed(
            "step", lambda x=x, t=target: training_step(H, x, t, vae, ema_vae, optimizer, 0)
        )
        timed("ema", lambda: update_ema(vae, ema_vae, H.ema_rate))  # once more, by itself
        timed(
            "log",
            lambda s=stats: logprint(type="train_loss", step=0, **accumulate_stats([s], 1)),
        )
    if world().rank == 0:
        medians = {name: statistics.median(found[1:]) for name, found in times.items()}
        print(json.dumps(medians), file=sys.stderr)


def launch(args, processes, folder):
    """The figures of a training by so many processes, which share two threads."""
    threads = {"OMP_NUM_THREADS": str(2 // processes)}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    command += [__file__, "--child", folder, "--preset", args.preset]
    command += ["--batch", str(args.batch), "--steps", str(args.steps), "--device", args.device]
    done = subprocess.run(command, env=os.environ | threads, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    [line] = [line for line in done.stderr.splitlines() if line.startswith('{"step"')]
    return json.loads(line)


def main(s=None):
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="cifar10", help="of a network of 32 x 32 images")
    parser.add_argument("--batch", type=int, default=8, help="images a step, of all processes")
    parser.add_argument("--steps", type=int, default=6, help="steps of a turn")
    parser.add_argument("--rounds", type=int, default=3, help="turns of which to take the median")
    parser.add_argument("--device", default="cpu", help="auto, cpu or cuda: a card a process")
    parser.add_argument("--child", metavar="FOLDER", help=argparse.SUPPRESS)
    args = parser.parse_args(s)
    if args.child:
        return child(args)
    args.device = resolve_device(args.device).split(":")[0]  # each process has its own
    sizes = [1] if args.device == "cuda" and torch.cuda.device_count() < 2 else [1, 2]
    if get_hparams(args.preset).image_size != 32:
        raise UserError(f"--preset {args.preset}: photos32 has 32 pixels; name cifar10 or photos32")
    found = {size: [] for size in sizes}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.rounds):
            for processes, figures in found.items():
                figures.append(launch(args, processes, folder))
    one, *two = (
        {name: statistics.median(f[name] for f in figures) for name in figures[0]}
        for figures in found.values()
    )
    # A log line is written once in H.iters_per_print steps at most: here it counts in every step.
    around = sum(one[name] for name in ("data", "ema", "log")) / (one["step"] + one["data"])
    report = {
        "step_s": one["step"],
        **{f"{name}_ms": one[name] * 1e3 for name in ("data", "ema", "log")},
        "around_share": around,
    }
    for figures in two:
        report["step_s_of_two_processes"] = figures["step"]
        report["parallel_efficiency"] = one["step"] / figures["step"]
    for name, value in report.items():
        print(f"{name:24} {value:.4g}")
    return report


if __name__ == "__main__":
    run_command(main)
