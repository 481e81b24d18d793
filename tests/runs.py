"""Training runs and commands in processes of their own, and what they leave on the disk."""

import contextlib
import hashlib
import itertools
import json
import multiprocessing
import os
import runpy
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent

# A network of a few milliseconds a step; 13 steps an epoch.
SMALL = (
    "--hps digits --device cpu --width 8 --zdim 2 --num_mixtures 2 --enc_blocks 8x1,8d8,1x1 "
    "--dec_blocks 1x1,8m1 --n_batch 100 --warmup_iters 20 --num_epochs 3 --epochs_per_eval 1 "
    "--iters_per_print 5 --iters_per_images 1000 --num_images_visualize 1 "
    "--num_variables_visualize 1 --num_temperatures_visualize 1"
).split()
# The same with saves on the way, to be taken up again.
SAVING = [*SMALL, "--iters_per_save", "4", "--iters_per_ckpt", "10", "--resume"]
# A network of three blocks, for several processes; 43 steps of 32 images an epoch in one.
TINY = (
    "--hps digits --num_epochs 1 --width 8 --zdim 2 --num_mixtures 2 --iters_per_print 10 "
    "--enc_blocks 8x1,8d2,4d4,1x1 --dec_blocks 1x1,4m1,8m4 --num_variables_visualize 1"
).split()


def environment(**extra):
    """This one's, one thread a process, without variables of launchers or of `make test`."""
    launchers = ("OMPI_", "PMI", "SLURM_", "TORCHELASTIC_", "RANK", "WORLD_SIZE", "LOCAL_RANK")
    others = (*launchers, "MAKE", "MFLAGS")
    env = {k: v for k, v in os.environ.items() if not k.startswith(others)}
    return env | {"OMP_NUM_THREADS": "1"} | extra


ENV = environment(PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}")

# What a run imports by and by, of its own and through torch: two of a short one's three seconds. A
# process that has them forks others that begin at once.
IMPORTS = (
    "train sklearn.model_selection sklearn.datasets torch._dynamo "
    "torch.fx.experimental.symbolic_shapes matplotlib.figure matplotlib.backends.backend_agg"
).split()
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["runs", *IMPORTS])


def _started(target, args):
    """A process that the fork server has started."""
    process = _server.Process(target=target, args=args, daemon=True)
    with contextlib.ExitStack() as stack:
        old = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"  # the fork server starts with the first process
        if old is None:
            stack.callback(os.environ.pop, "OMP_NUM_THREADS")
        process.start()
    return process


def _become_command(output, errors, environ, cwd):
    """What a command has of its own: where its output goes, its variables, its folder."""
    # Daemonic, it dies with the tests; only that multiprocessing lets it have no loader workers.
    multiprocessing.current_process()._config.pop("daemon")
    multiprocessing.set_start_method("fork", force=True)  # Python 3.11's own, not the fork server's
    for path, descriptor in ((output, 1), (errors, 2)):
        if path:
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        else:
            os.dup2(1, 2)
    sys.stdin = open(os.devnull)
    os.environ.update(environ)
    os.chdir(cwd or ROOT)


def _run(argv, output, errors, wrap, environ, cwd):
    """In the new process: train.py's main with argv, after `wrap`, what it prints in a file."""
    import train

    _become_command(output, errors, environ, cwd)
    sys.argv = ["train.py", *map(str, argv)]
    if wrap:
        wrap()
    train.run_command(train.main)


class Run:
    """A training run in a process forked from one that has done all imports: a tenth of a second.

    wrap, a function of a module, is called in the process before main. What goes to stderr is in
    the file `errors`, if one is named.
    """

    def __init__(self, argv, output, wrap=None, environ=(), cwd=None, errors=None):
        self.output = Path(output)
        self.process = _started(_run, (list(argv), str(output), errors, wrap, dict(environ), cwd))

    def wait(self, timeout=600):
        """(exit status, what it printed); a process killed by signal n has status -n."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, self.output.read_text()[-2000:]
        return self.process.exitcode, self.output.read_text()

    def kill(self):
        self.process.kill()
        self.process.join()


def _python(words, output, errors, cwd):
    """In the new process: a file with its arguments, or `-c` and code, as the command it is."""
    _become_command(output, errors, {}, cwd)
    if words[0] == "-c":
        sys.argv = words[:1]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def python(words, cwd):
    """The finished `python WORDS`, forked from a process that has done all imports."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [os.path.join(folder, name) for name in ("output", "errors")]
        process = _started(_python, ([*map(str, words)], *paths, str(cwd)))
        process.join(120)
        texts = [Path(path).read_text() for path in paths]
        assert process.exitcode is not None, texts
        return subprocess.CompletedProcess(words, process.exitcode, *texts)


class Signal:
    """Sends the run's process group, in its n-th training step or batch of an evaluation, a signal.

    As a terminal and most schedulers do: a run's loader workers get it too.
    """

    def __init__(self, number, where, n):
        self.number, self.where, self.n = number, where, n

    def __call__(self):
        import train

        os.setsid()
        name = "training_step" if self.where == "step" else "heartbeat"
        original, calls = getattr(train, name), itertools.count(1)

        def wrapped(*args):
            evaluating = not args
            if (name == "training_step" or evaluating) and next(calls) == self.n:
                # Not by this process: a loader worker takes its parent's SIGTERM for a good end.
                kill = ["kill", f"-{int(self.number)}", "--", f"-{os.getpgrp()}"]
                subprocess.run(kill, start_new_session=True)
            return original(*args)

        setattr(train, name, wrapped)


def quick_watch():
    """In the process: what its watch notices after 5 s it notices after 2, and asks for 1 s."""
    import endings

    endings.ALIVE_S, endings.LOOK_S, endings.SILENT_S, endings.ANSWER_S = 0.5, 0.1, 2, 1


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(size, argv, folder, wrap=None, port=None, **environ):
    """`size` processes as srun starts them, each with a file of what it prints."""
    port = port or free_port()
    return [
        Run(
            [*argv, "--save_dir", folder, "--port", port],
            folder / f"out{rank}",
            wrap,
            environ
            | {
                "SLURM_PROCID": str(rank),
                "SLURM_LOCALID": str(rank),
                "SLURM_STEP_ID": "0",
                "SLURM_STEP_NUM_TASKS": str(size),
                "SLURM_STEP_TASKS_PER_NODE": str(size),
                "MASTER_ADDR": "127.0.0.1",
            },
        )
        for rank in range(size)
    ]


def command(argv, launcher=(), **options):
    """A `python train.py` process, under a launcher if one is given."""
    python = [] if launcher and "torchrun" in str(launcher[0]) else [sys.executable]
    return subprocess.Popen(
        [*map(str, launcher), *python, "train.py", *map(str, argv)],
        **{
            "cwd": ROOT,
            "env": ENV,
            "text": True,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.STDOUT,
            "start_new_session": True,
        }
        | options,
    )


def run_until(argv, env, cwd, text, end=signal.SIGINT):
    """Starts a command, waits for a line of its output that holds `text`, ends it: the lines."""
    process = subprocess.Popen(
        argv, cwd=cwd, env=env, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            break
    else:
        raise AssertionError("".join(lines))
    process.send_signal(end)
    try:
        process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
    return lines


def launch(launcher, n, args, cwd, port):
    """The finished n processes of train.py: a list of CompletedProcess, one for all or one each."""
    script = [str(ROOT / "train.py"), *args]
    if launcher == "slurm":
        step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": str(n), "SLURM_STEP_NODELIST": "",
                "SLURM_STEP_TASKS_PER_NODE": str(n), "MASTER_ADDR": "127.0.0.1"}  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            files = [[Path(folder, f"{name}{i}") for name in ("out", "errors")] for i in range(n)]
            tasks = [
                Run([*args, "--port", str(port)], out, None,
                    step | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}, cwd, errors)
                for i, (out, errors) in enumerate(files)
            ]  # fmt: skip
            statuses = [task.wait()[0] for task in tasks]
            texts = [[path.read_text() for path in paths] for paths in files]
        return [
            subprocess.CompletedProcess(script, status, *text)
            for status, text in zip(statuses, texts, strict=True)
        ]
    if launcher == "mpiexec":
        command = [BIN / "mpiexec", "-n", str(n), sys.executable, *script, "--port", str(port)]
    else:
        command = [BIN / "torchrun", f"--nproc_per_node={n}", f"--master_port={port}", *script]
    done = subprocess.run(
        command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=600
    )
    return [done]


def sample_in(source, folder, monkeypatch):
    """run("samples --n 4"): sample.py in this process and a folder, with the files of `source`."""
    import sample

    monkeypatch.chdir(folder)
    for path in source.iterdir():
        (folder / path.name).symlink_to(path)

    def run(line, weights="ema.th"):
        argv = ["sample.py", "--restore_ema_path", weights, "--device", "cpu", *shlex.split(line)]
        monkeypatch.setattr(sys, "argv", argv)
        sample.main()

    return run


def log_of(folder):
    """The log's lines as dicts, every one whole."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def events(folder):
    """The log's lines as dicts; one that a kill cut short is passed over."""
    found = []
    for line in Path(folder, "log.jsonl").read_text().splitlines():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def figures(folder):
    """{(type, step): the line without times}; a line that stands twice must say the same."""
    found = {}
    for event in events(folder):
        if event.get("type") in ("train_loss", "eval_loss"):
            for key in ("time", "iter_time", "images_per_second", "images_per_second_overall"):
                event.pop(key, None)
            key, text = (event["type"], event["step"]), json.dumps(event)
            assert found.setdefault(key, text) == text
    return found


def hashes(folder, prefix="latest"):
    """The sha256 of a set's files, each read under its public name."""
    return {
        name: hashlib.sha256(Path(folder, f"{prefix}-{name}").read_bytes()).hexdigest()
        for name in ("model.th", "model-ema.th", "opt.th")
    }


def check_latest(folder):
    """The step of the set under the `latest` names, which is whole, or None where there is none."""
    names = [p for p in Path(folder).glob("latest-*") if p.exists()]
    if not names:
        return None
    state = json.loads(Path(folder, "latest-state.json").read_text())
    for name, digest in hashes(folder).items():
        assert state["sha256"][name] == digest, f"{name} is of another set"
    return state["step"]


def saved_step(folder):
    """The step of the set under the `latest` names of a run that may save meanwhile."""
    with contextlib.suppress(FileNotFoundError):
        return json.loads(Path(folder, "latest-state.json").read_text())["step"]


def assert_same(folder, whole):
    """That a run in pieces left what the run in one go did."""
    assert hashes(folder) == hashes(whole)
    assert figures(folder) == figures(whole)
    for n in (10, 20, 30):
        assert hashes(folder, f"iter-{n}") == hashes(whole, f"iter-{n}")


def check_resumes(options, folder):
    """That a run of two epochs with these options, killed in its middle, goes on to the same bits.

    The folder of the run in one go is folder/whole/test.
    """

    def train(*argv, wrap=None):
        return Run([*SMALL, *options, "--num_epochs", "2", *argv], folder / "out", wrap).wait()

    assert train("--save_dir", folder / "whole")[0] == 0
    parts = "--save_dir", folder / "parts", "--iters_per_save", "17"
    assert train(*parts, wrap=Signal(signal.SIGKILL, "step", 20))[0] != 0
    assert check_latest(folder / "parts" / "test") == 17
    status, text = train(*parts, "--resume", "--num_workers", "1")
    assert status == 0, text
    assert hashes(folder / "parts" / "test") == hashes(folder / "whole" / "test")
    assert figures(folder / "parts" / "test") == figures(folder / "whole" / "test")
