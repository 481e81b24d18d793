"""What a GPU does with this project: checks, then speed and memory of every preset.

    python benchmarks/gpu.py --out gpu.jsonl

needs no network and no data, and takes less than --seconds; each row is written as it is measured.
The same command goes on where the rows of gpu.jsonl end, and measures anew what ended in an error,
but for a lack of memory. gpu.md is a table of them. Of a preset and a mode: training images/s,
beside those of the plain rendition (reference.py, float32) measured in turns; kernels of a step;
busy, the share of a step's time without profiler in which some kernel runs; peak, bytes above what
is alive before a step. Never run on a GPU.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import peak_bytes, seconds
from gpu_checks import CHECKS, MODES, batch_of, functions, hparams, run_check, trainer
from reference import PlainVAE

from endings import run_command
from errors import UserError, reason_of
from hps import HPARAMS_REGISTRY
from launchers import resolve_device
from options import OneLineParser, setting
from vae import VAE

# ---- measurements --------------------------------------------------------------------------


def busy_seconds(intervals):
    """Seconds that lie in at least one of the intervals (start, end)."""
    total, end = 0.0, -float("inf")
    for start, stop in sorted(intervals):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def kernels_of(device, call):
    """(number of kernels, seconds in which some kernel runs) of a call; none on the CPU."""
    if not device.startswith("cuda"):
        return 0, 0.0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    cuda = torch.autograd.DeviceType.CUDA
    found = [e for e in profiler.profiler.kineto_results.events() if e.device_type() == cuda]
    return len(found), busy_seconds([(e.start_ns() / 1e9, e.end_ns() / 1e9) for e in found])


def plain_step(H):
    """A step of the plain rendition: forward, backward, clipping, AdamW, EMA tensor by tensor."""
    torch.manual_seed(0)
    model = PlainVAE(VAE(H)).to(H.device)
    ema = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=H.lr, foreach=False)
    batch = batch_of(H, H.n_batch)

    def step():
        model.zero_grad(set_to_none=True)
        model(*batch)["elbo"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), H.grad_clip, foreach=False).item()
        optimizer.step()
        with torch.no_grad():
            for e, p in zip(ema, model.parameters(), strict=True):
                e.lerp_(p, 1 - H.ema_rate)

    return step


def moments(optimizer):
    """The tensors of an optimizer's state."""
    states = optimizer.state.values()
    return [t for state in states for t in state.values() if torch.is_tensor(t)]


def measure(preset, mode, device, rounds):
    """A row of a preset in a mode, its plain rendition measured in turns where there is room."""
    H = hparams(preset, device, **MODES[mode])
    one, batch, unread = trainer(H), batch_of(H, H.n_batch), []

    def own():
        unread.append(one.launch(*batch, None, 0, *functions()))
        if len(unread) > 1:  # as in a run
            unread.pop(0).read()

    def first():
        for _ in range(3):
            own()

    # A graph's memory is taken once, when it is recorded: in these steps, as is what is alive
    # before a step of the other modes.
    peak = peak_bytes(device, first)
    if setting(H, "cuda_graphs"):
        held = [*moments(one.optimizer), *one.copies, *(p.grad for p in one.parameters)]
        peak -= sum(t.numel() * t.element_size() for t in held if t is not None)
    else:
        peak = peak_bytes(device, own)
    row = {"peak_mb": peak / 1e6, "n_batch": H.n_batch}
    calls, times = {"own": own}, {"own": [], "plain": []}
    try:
        calls["plain"] = plain_step(hparams(preset, device))
        for _ in range(2):
            calls["plain"]()
        row["plain_peak_mb"] = peak_bytes(device, calls["plain"]) / 1e6
    except torch.OutOfMemoryError:
        calls.pop("plain", None)
        row["plain"] = OUT_OF_MEMORY
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(seconds(device, call))
    for name in calls:
        prefix = "" if name == "own" else "plain_"
        median = statistics.median(times[name])
        kernels, busy = kernels_of(device, calls[name])
        row[f"{prefix}images_per_second"] = H.n_batch / median
        row |= {f"{prefix}kernels": kernels, f"{prefix}busy": busy / median}
    return row


# ---- rows ----------------------------------------------------------------------------------


OUT_OF_MEMORY = "out of memory"


def attempt(job):
    """A job's row; what goes wrong in it is a row too."""
    try:
        return job()
    except torch.OutOfMemoryError:
        return {"error": OUT_OF_MEMORY}
    except Exception as error:  # of whatever a machine is capable of: the other rows go on
        return {"error": f"{type(error).__name__}: {reason_of(error)}"[:300]}


def rows_of(path):
    """{(part, name): row} of a file of rows; a line that a kill cut short is passed over."""
    rows = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
            rows[row["part"], row["name"]] = row
        except (ValueError, KeyError):
            continue
    return rows


def measured(path):
    """The (part, name) of a file's rows that need not be measured again."""
    errors = (None, OUT_OF_MEMORY)
    return {key for key, row in rows_of(path).items() if row.get("error") in errors}


def run_jobs(jobs, path, limit, facts):
    """Runs the jobs {(part, name): function} that the file has no row of, until limit seconds.

    Those too that ended in an error, but for a lack of memory: one error of CUDA may have brought
    the others with it. Returns the number of jobs that are left.
    """
    start = time.monotonic()
    missing = [key for key in jobs if key not in measured(path)]
    if path.exists() and not path.read_bytes().endswith(b"\n"):
        with path.open("a") as file:
            file.write("\n")
    while missing and time.monotonic() - start < limit:
        part, name = key = missing.pop(0)
        begun = time.monotonic()
        row = {"part": part, "name": name, **facts, **attempt(jobs[key])}
        row["took_s"] = round(time.monotonic() - begun, 1)
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(describe(row), flush=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return len(missing)


def describe(row):
    """A row as a line of a table in Markdown."""
    name = row["name"].replace(" / ", " | ")
    if "error" in row:
        return f"| {name} | {row['error']} |"
    if row["part"] == "checks":
        return f"| {name} | {row['result']} {row['detail']} |"

    def cell(key, form):
        return format(row[key], form) if key in row else row.get("plain", "-")

    ratio = "-"
    if "plain_images_per_second" in row:
        ratio = f"{row['images_per_second'] / row['plain_images_per_second']:.2f}x"
    return (
        f"| {name} | {row['n_batch']} | {cell('plain_images_per_second', '.1f')} → "
        f"{cell('images_per_second', '.1f')} | {ratio} | {cell('plain_kernels', ',d')} → "
        f"{cell('kernels', ',d')} | {cell('plain_busy', '.0%')} → {cell('busy', '.0%')} | "
        f"{cell('plain_peak_mb', ',.0f')} → {cell('peak_mb', ',.0f')} |"
    )


def table(rows):
    """All rows in Markdown, under the name of the card."""
    rows = list(rows)
    checks = [describe(row) for row in rows if row["part"] == "checks"]
    speeds = [describe(row) for row in rows if row["part"] == "speed"]
    cards = sorted({f"{row['card']}, PyTorch {row['torch']}" for row in rows})
    head = "| preset | mode | batch | images/s, plain → own | speed | kernels | busy | peak MB |"
    return "\n".join(
        ["; ".join(cards), "", "| check | |", "|---|---|", *checks, "", head, "|---" * 8 + "|"]
        + speeds
    )


def main(s=None):
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="gpu.jsonl", help="file of rows; the table lies beside it")
    parser.add_argument("--parts", default="checks,speed", help="one of the two, or both")
    parser.add_argument("--presets", default=",".join(HPARAMS_REGISTRY), help="with commas")
    parser.add_argument("--modes", default=";".join(MODES), help="with semicolons")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--rounds", type=int, default=5, help="turns of which to take the median")
    parser.add_argument("--seconds", type=float, default=420, help="after which no row is begun")
    args = parser.parse_args(s)
    device = resolve_device(args.device)
    wanted = {"parts": args.parts.split(","), "presets": args.presets.split(",")}
    wanted["modes"] = args.modes.split(";")
    known = {"parts": ("checks", "speed"), "presets": HPARAMS_REGISTRY, "modes": MODES}
    for option, values in wanted.items():
        for value in values:
            if value not in known[option]:
                raise UserError(
                    f"--{option}: got {value!r}; it must be one of {', '.join(known[option])}"
                )
    jobs = {}
    if "checks" in wanted["parts"]:
        for name in CHECKS:
            jobs["checks", name] = lambda name=name: run_check(name, device)
    if "speed" in wanted["parts"]:
        for preset in wanted["presets"]:
            for mode in wanted["modes"]:
                jobs["speed", f"{preset} / {mode}"] = lambda preset=preset, mode=mode: measure(
                    preset, mode, device, args.rounds
                )
    card = torch.cuda.get_device_name(device) if device.startswith("cuda") else "CPU"
    path = Path(args.out)
    print(f"{len(jobs.keys() - measured(path))} rows to measure on {card}", flush=True)
    left = run_jobs(jobs, path, args.seconds, {"card": card, "torch": torch.__version__})
    text = table(rows_of(path).values())
    path.with_suffix(".md").write_text(text + "\n")
    print(f"{path.with_suffix('.md')}: {len(jobs) - left} of {len(jobs)} rows"
          + (": the same command measures the rest" if left else ""))  # fmt: skip


if __name__ == "__main__":
    run_command(main)
