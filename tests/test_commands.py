"""Commands that launch, train, restore, measure: as the pages have them, with tiny numbers.

Those that use a trained model are in test_docs.py.
"""

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import imageio.v3 as imageio
import pytest
import test_setup_scripts
from fakes import tiny_network, write_data, write_released
from pages import COMMANDS, FIRST, PAGES, commands, is_use
from runs import BIN, ROOT, environment, free_port, run_until

from hps import get_hparams

USING = [c for c in COMMANDS if is_use(c)]  # in test_docs.py
TRAINING = [
    c for c in COMMANDS if "train.py --hps" in c and "--test_eval" not in c and c not in USING
]
RESTORING = [c for c in COMMANDS if "--test_eval" in c and c not in USING]
BENCHMARKS = [c for c in COMMANDS if c.startswith("python benchmarks/")]


def test_every_command_has_a_test():
    elsewhere = set(FIRST)  # below, what all tests run in, and what runs this file
    scripts = {f"./{name}" for name in test_setup_scripts.SCRIPTS}
    for command in set(COMMANDS) - {*TRAINING, *RESTORING, *BENCHMARKS, *USING} - elsewhere:
        assert command.split()[0] in scripts, f"{command!r} is not tested"
    for kind in (TRAINING, RESTORING, BENCHMARKS, USING):
        assert len(kind) > 5  # the pages are read


def test_every_training_has_its_own_folder():
    """No command takes up another's run, unless it says so (--resume), whatever the page."""
    folders = ["digits"]  # make demo's
    for command in COMMANDS:
        trains = "train.py --hps" in command and "--test_eval" not in command
        if trains and "--dry_run" not in command:
            words = command.split()
            desc = words[words.index("--desc") + 1]
            assert desc not in folders or "--resume" in words, command
            folders.append(desc)


@pytest.mark.parametrize("page", PAGES)
def test_weights_are_those_of_a_training_before_on_the_page(page):
    known = {"digits"}
    for command in commands(PAGES[page]):
        for folder in re.findall(r"saved_models/([\w-]+)", command):
            assert folder in known, command
        known.update(re.findall(r"--desc ([\w-]+)", command))


@pytest.fixture(scope="module")
def data_of(tmp_path_factory):
    """data_of(preset): a folder with its data, made once."""
    made = {}

    def data_of(preset):
        if preset not in made:
            made[preset] = tmp_path_factory.mktemp(preset)
            write_data(preset, made[preset])
        return made[preset]

    yield data_of
    for folder in made.values():
        shutil.rmtree(folder)


def tiny(command, data_of, tmp_path):
    """(argv, environment, cwd): the command for two processes at most and a tiny network."""
    words = shlex.split(command)
    preset = words[words.index("--hps") + 1]
    cwd = data_of(words[words.index("--dataset") + 1] if "--dataset" in words else preset)
    if "--data_root" in words:
        words += ["--data_root", str(cwd / "photos")]
    words += tiny_network(get_hparams(preset).image_size)
    words += ["--save_dir", str(tmp_path), "--n_batch=1"]
    env = environment()
    if words[0] == "mpiexec":
        words = [str(BIN / "mpiexec"), "-n", "2", *words[3:], "--port", str(free_port())]
    elif words[0] == "torchrun":
        words = [str(BIN / "torchrun"), f"--master_port={free_port()}", *words[1:]]
    elif words[0] == "srun":  # what it sets, for a job step of one task
        words = words[3:]
        env |= {"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"}
    words = [sys.executable if word == "python" else word for word in words]
    words = [str(ROOT / word) if word == "train.py" else word for word in words]
    return words, env, cwd


@pytest.mark.parametrize("command", TRAINING)
def test_training(command, data_of, tmp_path):
    lines = run_until(*tiny(command, data_of, tmp_path), "type: train_loss")
    processes = 2 if "mpiexec" in command or "torchrun" in command else 1
    assert any(f"x {processes} processes" in line for line in lines)
    assert "step: 1," in lines[-1] and "bits_per_dim: " in lines[-1]


@pytest.mark.parametrize("command", RESTORING)
def test_restoring(command, data_of, tmp_path):
    argv, env, cwd = tiny(command, data_of, tmp_path)
    for i, word in enumerate(argv):
        if word.endswith((".th", ".jsonl")):
            argv[i] = str(tmp_path / Path(word).name)
    preset = argv[argv.index("--hps") + 1]
    prefix = next(w.removesuffix("-model-ema.th") for w in argv if w.endswith("-model-ema.th"))
    write_released(prefix, preset)
    if "seed0" in command:  # one to its end
        argv += ["--n_batch=500"]
        done = subprocess.run(argv, cwd=cwd, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "type: test_loss, n_batches: 20, n_images: 10000, " in done.stdout
        assert "bits_per_dim: " in done.stdout and done.stderr == ""  # no progress bar in a pipe
    else:
        lines = run_until(argv, env, cwd, "evaluating on the test set")
        both = "--restore_path" in command
        for what in ["weights", "EMA weights"] if both else ["EMA weights"]:
            assert any(f"restoring {what} from {prefix}" in line for line in lines)


STARTED = {  # what a benchmark says once it has understood its options
    "bench.py": "own in ",
    "compiled.py": "compiling ",
    "gpu.py": "rows to measure on ",
    "growth.py": "what grows",
    "loading.py": '"measure": "memory"',
}


@pytest.mark.parametrize("command", [c for c in BENCHMARKS if "/step.py" not in c])
def test_benchmark_starts(command, tmp_path):
    """Its options are understood; what it measures is tested below and in test_benchmarks.py.

    So is step.py, with these options: it tells its figures together, at the end.
    """
    python, script, *options = shlex.split(command)
    argv = [sys.executable, str(ROOT / script), *options]
    env = environment(PYTHONUNBUFFERED="1", TMPDIR=str(tmp_path))
    run_until(argv, env, tmp_path, STARTED[Path(script).name], end=signal.SIGKILL)


def test_benchmark_of_loading():
    """One of its measures; it prints the figures of the table in docs/data.md as JSON."""
    argv = [sys.executable, ROOT / "benchmarks" / "loading.py", "folder"]
    done = subprocess.run(argv, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["second_start_s"] < figures["first_start_s"]
    assert figures["images"] == 2000


def test_make_demo(tmp_path):
    """The first command, for one epoch; what it prints at its end works as it stands."""
    done = subprocess.run(
        ["make", "demo", f"SAVE={tmp_path}", "FLAGS=--num_epochs 1"],
        cwd=ROOT, env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    [scored] = [line for line in lines if "type: test_loss" in line]
    assert "n_images: 200" in scored and "labels: given" in scored
    [drawn] = [line for line in lines if line.startswith("samples: ")]
    # Sixteen columns of 64 pixels, ten rows of samples and two of test images; words above and at
    # the left.
    height, width, _ = imageio.imread(drawn.removeprefix("samples: ")).shape
    assert 0 < height - 12 * 68 < 60 and 80 < width - 16 * 68 < 200
    commands = lines[lines.index("what to try next, in this folder:") + 1 :]
    assert len(commands) == 4 and commands[0].strip() == "source .venv/bin/activate"
    for line in commands[1:]:
        program, *argv = line.split()[1:]
        done = subprocess.run([sys.executable, ROOT / program, *argv], cwd=tmp_path,
                              env=environment(), capture_output=True, text=True)  # fmt: skip
        assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The folder of a run of two epochs on the digits, and what it printed."""
    cwd = tmp_path_factory.mktemp("digits")
    argv = [
        sys.executable, ROOT / "train.py", "--hps", "digits", *tiny_network(8), "--num_epochs=2",
        "--epochs_per_eval=1", "--iters_per_print=5", "--iters_per_save=20",
        "--iters_per_ckpt=50", "--iters_per_images=30",
    ]  # fmt: skip
    done = subprocess.run(argv, cwd=cwd, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return cwd / "saved_models" / "test", done


def test_what_a_run_leaves(digits):
    run, done = digits
    assert done.stderr == ""
    names = {path.name for path in run.iterdir()}
    suffixes = ("model.th", "model-ema.th", "opt.th", "log.jsonl")
    assert {f"{p}-{s}" for p in ("latest", "iter-50") for s in suffixes} <= names
    assert {f"samples-{i}.png" for i in (1, 8, 16, 30, 32, 60, 64, 86)} <= names
    log = (run / "log.txt").read_text().splitlines()
    hparams = [line for line in log if "type: hparam" in line]  # to the files alone
    assert len(hparams) > 60 and done.stdout.splitlines() == [x for x in log if x not in hparams]


def test_what_a_run_logs(digits):
    run, _ = digits
    events = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert all(list(event)[0] == "time" for event in events)
    hparams = {e["key"]: e["value"] for e in events if e.get("type") == "hparam"}
    assert hparams["width"] == 4 and hparams["dec_blocks"] == "1x1,4m1,8m4"
    assert any("torch.optim.AdamW" in e.get("message", "") for e in events)
    trains = [e for e in events if e.get("type") == "train_loss"]
    steps = sorted({1, 8, 16, 32, 64} | {*range(5, 87, 5)})
    assert [e["step"] for e in trains] == steps
    published = {"model", "lr", "epoch", "step", "elbo", "elbo_filtered", "distortion", "rate",
                 "grad_norm", "iter_time", "skipped_updates", "rate_nans",
                 "distortion_nans"}  # fmt: skip
    for before, e in zip([0, *steps[:-1]], trains, strict=True):
        assert published | {"bits_per_dim", "skip_rate", "images_per_second"} <= e.keys()
        assert e["images_per_second_overall"] > 0
        if e["step"] - before == 5:  # both are of the same five steps, one with loading and saves
            assert e["images_per_second_overall"] < 1.01 * e["images_per_second"]
        assert e["model"] == "test" and e["epoch"] == (e["step"] - 1) // 43
        assert e["lr"] == pytest.approx(2e-3 * min(1, e["step"] / 100))
        assert e["skip_rate"] == e["skipped_updates"] / min(5, e["step"])
    evals = [e for e in events if e.get("type") == "eval_loss"]
    assert [(e["epoch"], e["step"]) for e in evals] == [(0, 43), (1, 86)]
    for e in evals:
        assert {"n_batches", "filtered_elbo", "elbo", "distortion", "rate"} <= e.keys()
        assert e["elbo"] == pytest.approx(e["distortion"] + e["rate"])


def test_errors_of_a_command_are_one_line(tmp_path):
    cases = [
        (["--hps", "imagnet64"], "'imagnet64'"),
        (["--hps", "digits", "--enc_blocks", "8q3"], "'8q3'"),
        (["--hps", "cifar10"], "setup_cifar10.sh"),
        (["--hps", "digits", "--device", "cuda"], "--device cpu"),
        (["--hps", "digits", "--test_eval"], "--restore_ema_path"),
    ]
    for args, word in cases:
        argv = [sys.executable, ROOT / "train.py", *args]
        done = subprocess.run(argv, cwd=tmp_path, env=environment(), capture_output=True, text=True)
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
        assert word in done.stderr


@pytest.mark.parametrize(
    "line, options",
    [
        ("train.py --skip_t", ["--skip_threshold"]),
        ("train.py --hps digits --num_v", ["--num_variables_visualize"]),
        ("plot.py --o", ["--out"]),
        ("sample.py samples --temp", ["--temperature"]),
        ("train.py --hps dig", ["digits"]),
        ("train.py --hps cifar10 --dataset imagenet32_", ["imagenet32_box"]),
        ("sample.py --device c", ["cpu", "cuda"]),
        ("sample.py samples --hps photos", ["photos32"]),
    ],
)
def test_options_complete_by_tab(line, options, tmp_path):
    """As the shell's hook asks, by argcomplete's variables."""
    answer = tmp_path / "answer"
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "IFS": " "}
    asked |= {"_ARGCOMPLETE_IFS": " ", "_ARGCOMPLETE_STDOUT_FILENAME": str(answer)}
    argv = [sys.executable, ROOT / line.split()[0]]
    subprocess.run(argv, env=environment(**asked), cwd=tmp_path, timeout=600)
    assert answer.read_text().split() == options


def test_help_names_every_option(tmp_path):
    argv = [sys.executable, ROOT / "train.py", "--help"]
    done = subprocess.run(argv, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0 and "--skip_threshold" in done.stdout
    assert not list(Path(tmp_path).iterdir())
