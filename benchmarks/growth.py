"""How time and memory grow with batch size, resolution and depth: a table and a picture.

    python benchmarks/growth.py --out docs/growth.png

One of the three grows at a time, from two encoder and two decoder blocks at each of 32, 16, 8, 4
and 1 pixels. Figures are per image: linear growth with the batch is a flat line, with resolution
and depth a straight one.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import peak_bytes, seconds

from endings import run_command
from launchers import resolve_device
from options import OneLineParser
from presets import get_hparams
from reports import saved_bytes
from vae import VAE

# What grows: {its value: (batch, resolution, blocks at each resolution)}.
SERIES = {
    "batch": {n: (n, 32, 2) for n in (1, 2, 4, 8, 16, 32)},
    "resolution": {r: (4, r, 2) for r in (16, 32, 64, 128)},
    "depth": {k: (4, 32, k) for k in (2, 4, 8, 16)},
}
FIGURES = {
    "train_ms": "training step, ms",
    "evaluate_ms": "evaluation, ms",
    "saved_mb": "kept for the backward pass, MB",
    "checkpointed_mb": "the same, --checkpoint_activations",
    "peak_mb": "peak of a training step, MB",
}


def network(resolution, depth, width, device):
    """A VAE with `depth` encoder and decoder blocks at each power of two up to the resolution."""
    sizes = [2**i for i in range(2, resolution.bit_length())]  # 4, 8, ... resolution
    rest = f"x{depth - 1}"  # beside the block that pools, or mixes in
    down = [f"{r}{rest},{r}d{2 if r > 4 else 4}" for r in reversed(sizes)]
    up = [f"{r}m{r // 2 if r > 4 else 1},{r}{rest}" for r in sizes]
    H = get_hparams("cifar10", width=width, zdim=8, num_mixtures=5, device=device)
    H.update(
        image_size=resolution,
        enc_blocks=",".join([*down, f"1x{depth}"]),
        dec_blocks=",".join([f"1x{depth}", *up]),
    )
    return VAE(H).to(device)


def measure(batch, resolution, depth, args):
    """The figures of one network, each per image; times are medians."""
    torch.manual_seed(0)
    vae = network(resolution, depth, args.width, args.device)
    x = torch.randn(batch, resolution, resolution, 3, device=args.device)
    target = torch.rand_like(x) * 2 - 1

    def forward():
        return vae(x, target)["elbo"]

    def train():
        vae.zero_grad(set_to_none=True)
        forward().backward()

    def evaluate():
        with torch.no_grad():
            forward()

    figures = {}
    for name, call in (("train_ms", train), ("evaluate_ms", evaluate)):
        call()
        times = [seconds(args.device, call) for _ in range(args.rounds)]
        figures[name] = statistics.median(times) * 1e3 / batch
    vae.zero_grad(set_to_none=True)
    figures["peak_mb"] = peak_bytes(args.device, train) / batch / 1e6
    figures["saved_mb"] = saved_bytes(vae, forward) / batch / 1e6
    vae.checkpoint_activations()
    figures["checkpointed_mb"] = saved_bytes(vae, forward) / batch / 1e6
    return figures


def draw(path, rows):
    """Writes the picture: a column for what grows, times above and memory below."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(11, 6.5), layout="constrained")
    axes = figure.subplots(2, len(SERIES), sharex="col", sharey="row", squeeze=False)
    for column, series in enumerate(SERIES):
        found = [row for row in rows if row["series"] == series]
        values = [row["value"] for row in found]
        for key, words in FIGURES.items():
            place = axes[0 if key.endswith("ms") else 1][column]
            place.plot(values, [row[key] for row in found], marker="o", markersize=4, label=words)
        for place in axes[:, column]:
            place.set_xscale("log", base=2)
            place.set_yscale("log", base=2)
            place.set_xticks(values, [f"{v}" for v in values], minor=False)
            place.yaxis.set_major_formatter("{x:g}")
            place.grid(alpha=0.3)
            place.spines[["top", "right"]].set_visible(False)
        axes[1][column].set_xlabel(
            {
                "batch": "images a batch",
                "resolution": "pixels of a side",
                "depth": "blocks at each resolution",
            }[series]
        )
    axes[0][0].set_ylabel("milliseconds an image")
    axes[1][0].set_ylabel("MB an image")
    for place in axes[:, 0]:
        place.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main(s=None):
    parser = OneLineParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--width", type=int, default=96, help="channels")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--rounds", type=int, default=5, help="calls of which to take the median")
    parser.add_argument("--largest", type=int, default=128, help="value at which a series ends")
    parser.add_argument("--out", default="growth.png", help="picture")
    parser.add_argument("--json", default=None, help="file for the figures")
    args = parser.parse_args(s)
    args.device = resolve_device(args.device)
    rows = []
    print(f"{'what grows':>14} " + " ".join(f"{key:>15}" for key in FIGURES), flush=True)
    for series, points in SERIES.items():
        for value, point in points.items():
            if value > args.largest:
                continue
            row = {"series": series, "value": value, **measure(*point, args)}
            rows.append(row)
            print(
                f"{series:>10} {value:3} " + " ".join(f"{row[key]:15.2f}" for key in FIGURES),
                flush=True,
            )
    draw(args.out, rows)
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1))
    return rows


if __name__ == "__main__":
    run_command(main)
