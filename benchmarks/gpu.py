"""What a GPU does with this project: checks, then speed and memory of every preset.

    python benchmarks/gpu.py --out gpu.jsonl

needs no network and no data, and takes less than --seconds; each row is written as it is measured.
The same command goes on where the rows of gpu.jsonl end, and measures anew what ended in an error,
but for a lack of memory. gpu.md is a table of them. Of a preset and a mode: training images/s,
beside those of the plain rendition (reference.py, float32) measured in turns; kernels of a step;
busy, the share of a step's time without profiler in which some kernel runs; peak, bytes above what
is alive before a step. Never run on a GPU.
"""

import copy
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import peak_bytes, seconds
from reference import PlainVAE

import train
from batches import Images, make_loader
from checkpoints import write_checkpoint
from endings import run_command
from errors import UserError, reason_of
from graphs import steps_of
from hps import HPARAMS_REGISTRY
from image_sets import IMAGE_SETS
from launchers import resolve_device
from noise import image_generators
from optimizers import make_optimizer
from options import OneLineParser, setting
from precision import allow_tf32
from presets import get_hparams
from steps import Steps
from train_helpers import load_vaes
from vae import VAE
from weights import load_model

MODES = {
    "fp32": {},
    "bf16": {"precision": "bf16"},
    "bf16, checkpointed": {"precision": "bf16", "checkpoint_activations": True},
    "bf16, graph": {"precision": "bf16", "cuda_graphs": True},
    "bf16, graph, checkpointed": {
        "precision": "bf16",
        "cuda_graphs": True,
        "checkpoint_activations": True,
    },
}
# Of figures on the GPU against those of the CPU in float32: the loss, and the gradients' norm.
TOLERANCE = {"fp32": 1e-4, "tf32": 1e-2, "bf16": 3e-2}
# A network that takes little time, of cifar10's kind.
SHORT = {
    "enc_blocks": "32x2,32d2,16x1,16d2,8d2,4d4,1x1",
    "dec_blocks": "1x1,4m1,8m4,16m8,16x1,32m16,32x2",
    "width": 96,
}

# ---- models and batches --------------------------------------------------------------------


def hparams(preset, device, **options):
    """A preset's hyperparameters, for one process on a device."""
    H = get_hparams(preset, **(SHORT if preset == "cifar10" and options.pop("short", 0) else {}))
    size = IMAGE_SETS[H.dataset].image_size if H.dataset in IMAGE_SETS else None
    H.update(image_size=H.image_size or size, image_channels=H.image_channels or 3)
    H.update(device=device, seed=0, local_rank=0, mpi_size=1, **options)
    return H


def batch_of(H, n, seed=0):
    """Input and target of random levels, (n, S, S, channels) each, on H.device."""
    generator = torch.Generator().manual_seed(seed)
    shape = n, H.image_size, H.image_size, H.image_channels
    levels = torch.randint(0, 256, shape, generator=generator).float()
    return tuple(t.to(H.device) for t in ((levels - 120) / 64, levels / 127.5 - 1))


def trainer(H):
    """The Steps of a new model, its EMA and its optimizer, as a run makes them."""
    torch.manual_seed(0)
    allow_tf32(H.precision == "tf32")
    vae, ema = load_vaes(H, lambda *_, **__: None)
    optimizer, _ = make_optimizer(vae.parameters(), H, use_apex=False)
    return steps_of(H, (vae, ema, optimizer), True, functions())


def functions():
    return train.get_cpu_stats_over_ranks, train.update_ema


def take(one, n_steps, n=None):
    """(statistics, weights) of steps of a Steps, on batches of n images."""
    H, stats = one.H, []
    n = n or H.n_batch * (H.grad_accum or 1)
    for step in range(n_steps):
        torch.manual_seed(step)
        stats.append(one.launch(*batch_of(H, n, step), None, step, *functions()).read())
    return stats, [p.detach().clone() for p in one.parameters]


def apart(tensors, others):
    """The distance of two lists of tensors over the length of the first."""
    pairs = zip(tensors, others, strict=True)
    distance = sum((a.double() - b.double()).square().sum() for a, b in pairs)
    return (distance / sum(a.double().square().sum() for a in tensors)).sqrt().item()


# ---- checks --------------------------------------------------------------------------------


def check_precision(device, precision):
    """Loss and gradients' norm against the CPU's in float32, with the same noise."""
    H = hparams("cifar10", device, short=True, precision=precision)
    torch.manual_seed(0)
    cpu = VAE(H)
    figures = []
    for vae, where in ((cpu, "cpu"), (copy.deepcopy(cpu).to(device), device)):
        allow_tf32(precision == "tf32")
        x, target = (t.to(where) for t in batch_of(H, 4))
        kind = precision if vae is not cpu else "fp32"
        with train.forward_precision(kind, where):
            loss = vae(x, target, generators=image_generators(range(4), 0))["elbo"]
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in vae.parameters()])
        figures.append((loss.item(), norm.item()))
    off = [abs(a / b - 1) for a, b in zip(*figures, strict=True)]
    return max(off) < TOLERANCE[precision], f"loss {off[0]:.1e}, gradients {off[1]:.1e}"


def check_no_wait(device):
    """A step up to the read of its statistics makes the processor wait for nothing."""
    for options in MODES.values():
        one = trainer(hparams("cifar10", device, short=True, n_batch=4, **options))
        take(one, 2)
        batch = batch_of(one.H, 4)
        torch.cuda.set_sync_debug_mode("error")
        try:
            launched = one.launch(*batch, None, 2, *functions())
        finally:
            torch.cuda.set_sync_debug_mode("default")
        launched.read()
    return True, ""


def check_alike(device, options, tolerance, n=None, against=None):
    """Three steps with options against the plain eager ones: the weights that they lead to."""
    weights = []
    for more in (against or {}, options):
        one = trainer(hparams("cifar10", device, short=True, n_batch=4, lr=1e-3, **more))
        for size in (None, n, None) if n else (None,):
            _, found = take(one, 1 if n else 3, size)
        weights.append(found)
    off = apart(*weights)
    return off <= tolerance, f"weights {off:.1e}"


def check_pictures(device):
    """Pictures and an evaluation between the steps of a graph."""
    one = trainer(hparams("cifar10", device, short=True, n_batch=4, cuda_graphs=True))
    H = one.H
    H.update(num_variables_visualize=1, num_temperatures_visualize=1, desc="gpu")
    take(one, 2)
    images = Images(torch.randint(0, 256, (6, 32, 32, 3), dtype=torch.uint8).numpy())
    train.evaluate(H, one.ema_vae, images, lambda batch: batch_of(H, len(batch[0])))
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "samples.png"))
        train.write_images(H, one.ema_vae, images.array[:2], batch_of(H, 2)[0], path, print)
        made = Path(path).stat().st_size > 1000
    stats, _ = take(one, 1)
    return made and stats[0]["skipped_updates"] == 0, ""


def check_apex(device):
    """NVIDIA Apex's step against AdamW's, where it is."""
    weights = []
    for use_apex in (False, True):
        H = hparams("cifar10", device, short=True, n_batch=4, lr=1e-3)
        torch.manual_seed(0)
        vae, ema = load_vaes(H, lambda *_, **__: None)
        optimizer, name = make_optimizer(vae.parameters(), H, use_apex)
        if use_apex and "Apex F" not in name:
            return None, name
        weights.append(take(Steps(H, vae, ema, optimizer), 3)[1])
    off = apart(*weights)
    return off < 1e-4, f"weights {off:.1e}"


def check_files(device):
    """A save on the GPU, read on the CPU: the same weights, contiguous."""
    one = trainer(hparams("cifar10", device, short=True, n_batch=4))
    take(one, 1)
    with tempfile.TemporaryDirectory() as folder:
        one.H.save_dir = folder
        write_checkpoint(str(Path(folder, "latest")), one.vae, one.ema_vae, one.optimizer, one.H)
        model = load_model(Path(folder, "latest-model.th"), one.H.copy(), "cpu")
        opt = torch.load(Path(folder, "latest-opt.th"), weights_only=True)
    there = [p.detach().cpu() for p in one.parameters]
    same = all(map(torch.equal, there, model.parameters()))
    moments = [s["exp_avg"] for s in opt["state"].values()]
    return same and all(t.is_contiguous() for t in moments), ""


def check_pinned(device):
    """Batches of the loader lie in pinned memory."""
    H = hparams("cifar10", device, num_workers=0)
    images = Images(torch.zeros(8, 32, 32, 3, dtype=torch.uint8).numpy())
    [batch] = make_loader(H, images, batch_size=8)
    return batch[0].is_pinned(), ""


GRAPH = {"cuda_graphs": True}
CHECKS = {
    "fp32 as the CPU": lambda d: check_precision(d, "fp32"),
    "bf16 as the CPU": lambda d: check_precision(d, "bf16"),
    "tf32 as the CPU": lambda d: check_precision(d, "tf32"),
    "no wait before the read": check_no_wait,
    "checkpointed": lambda d: check_alike(d, {"checkpoint_activations": True}, 1e-5),
    "graph": lambda d: check_alike(d, GRAPH, 1e-5),
    "graph, accumulation": lambda d: check_alike(
        d, GRAPH | {"grad_accum": 2}, 1e-5, against={"grad_accum": 2}
    ),
    "graph, short batch": lambda d: check_alike(d, GRAPH, 1e-5, n=3),
    "graph, bf16, checkpointed": lambda d: check_alike(
        d, MODES["bf16, graph, checkpointed"], 1e-4, against={"precision": "bf16"}
    ),
    "compiled": lambda d: check_alike(d, {"compile": True}, 1e-3),
    "compiled, bf16": lambda d: check_alike(
        d, {"compile": True, "precision": "bf16"}, 3e-2, against={"precision": "bf16"}
    ),
    "pictures": check_pictures,
    "Apex": check_apex,
    "files": check_files,
    "pinned": check_pinned,
}


def run_check(name, device):
    torch.backends.cudnn.deterministic = True
    try:
        ok, detail = CHECKS[name](device)
    finally:
        torch.backends.cudnn.deterministic = False
        allow_tf32(False)
    return {"result": {True: "ok", False: "FAILED", None: "not here"}[ok], "detail": detail}


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
