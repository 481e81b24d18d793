"""The page's script for sbatch, its srun and scontrol replaced: its job goes on by itself."""

import json
import re
import signal
import subprocess
import sys

from runs import ENV, IMPORTS, ROOT, SMALL, check_latest

SCRIPT = re.search(
    r"```sbatch\n(.*?)```", (ROOT / "docs" / "reliability.md").read_text(), re.DOTALL
)[1]

# Forks two tasks that are as srun starts them, sends them the signal that --signal asks for, once
# they have saved, and ends with the highest status.
SRUN = """#!{python}
import os, pathlib, signal, sys, time
import {imports}

assert sys.argv[1] == "python"
tasks = []
for r in range(2):
    tasks.append(os.fork())
    if not tasks[-1]:
        os.environ.update(
            SLURM_PROCID=str(r), SLURM_LOCALID=str(r), SLURM_STEP_ID="0", SLURM_STEP_NUM_TASKS="2",
            SLURM_STEP_TASKS_PER_NODE="2", SLURM_STEP_NODELIST="localhost",
        )
        sys.argv = sys.argv[2:]
        train.run_command(train.main)
if "LIMIT" in os.environ:
    while not pathlib.Path("saved_models/my_run/latest-state.json").exists():
        assert os.waitpid(-1, os.WNOHANG) == (0, 0)
        time.sleep(0.05)
    for task in tasks:
        os.kill(task, signal.SIGUSR1)
statuses = [os.waitstatus_to_exitcode(os.waitpid(task, 0)[1]) for task in tasks]
sys.exit(max(status if status >= 0 else 128 - status for status in statuses))
"""


def test_the_job_goes_on_by_itself(tmp_path):
    words = " ".join(SMALL)
    script = SCRIPT.replace("train.py --hps imagenet64", f"{ROOT / 'train.py'} {words}")
    script = script.replace("--resume", "--resume --n_batch 50 --iters_per_save 4 $MORE")
    assert script.count(words) == 1 and "--signal=USR1@" in script and "--requeue" in script
    commands = {"srun": SRUN.format(python=sys.executable, imports=", ".join(IMPORTS)),
                "scontrol": '#!/bin/sh\necho "$@" >>requeued\n'}  # fmt: skip
    for name, text in commands.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    env = ENV | {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "31"}

    def job(**more):
        return subprocess.run(["bash", "-c", script], cwd=tmp_path, env=env | more, text=True,
                              capture_output=True, timeout=600)  # fmt: skip

    done = job(LIMIT="1", MORE="--num_epochs 100000")
    assert done.returncode == 128 + signal.SIGUSR1, done.stderr[-2000:]
    assert (tmp_path / "requeued").read_text() == "requeue 31\n"
    saved = check_latest(tmp_path / "saved_models" / "my_run")
    done = job(SLURM_RESTART_COUNT="1", MORE=f"--num_epochs {saved // 13 + 1}")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "resuming from" in done.stdout and (tmp_path / "requeued").read_text().count("\n") == 1
    state = json.loads((tmp_path / "saved_models" / "my_run" / "latest-state.json").read_text())
    assert state["step"] == (saved // 13 + 1) * 13
