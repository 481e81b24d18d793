"""The folder of a run: one run at a time, full and read-only disks."""

import os
import subprocess
import time

import pytest
from runs import ENV, ROOT, SAVING, Run, check_latest, events, hashes

RUN = [*SAVING, "--num_epochs", "2"]


@pytest.fixture(scope="module")
def whole(finished):
    """The folder of a run without a break."""
    return finished(RUN)


def _mounts():
    """Whether a mount of one's own can be made here, or why not."""
    probe = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"]
    try:
        return subprocess.run(probe, capture_output=True, text=True).stderr.strip()
    except FileNotFoundError as error:
        return str(error)


@pytest.mark.skipif(bool(_mounts()), reason=f"no mounts here: {_mounts()}")
def test_a_full_disk_and_a_read_only_one(whole, tmp_path):
    """A disk of 400 kB: a set is about 100 kB. Its log is cut short too; the run goes on.

    Then it has no byte free, or is read-only: a start is refused, what it prints to this disk lost.
    Then there is room: it ends as if nothing were.
    """
    disk = tmp_path / "disk"
    disk.mkdir()
    script = """
import os, subprocess, sys
import train

disk, copy, *argv = sys.argv[1:]

def run(name, *more):
    child = os.fork()
    if child == 0:
        sys.argv = ["train.py", *argv, *more]
        train.run_command(train.main)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(name, status, flush=True)

def mount(*words):
    subprocess.run(["mount", *words, disk], check=True)

mount("-t", "tmpfs", "-o", "size=400k", "none")
run("small", "--iters_per_ckpt", "2")
subprocess.run(f"cat /dev/zero > {disk}/fill", shell=True)
run("full")
os.remove(f"{disk}/fill")
mount("-o", "remount,ro")
run("read-only")
mount("-o", "remount,rw,size=40M")
run("roomy")
subprocess.run(["cp", "-r", f"{disk}/test", copy], check=True)
"""
    done = subprocess.run(
        ["unshare", "-rm", os.sys.executable, "-c", script, disk, tmp_path / "copy",
         *RUN, "--save_dir", disk],
        cwd=ROOT, env=ENV, text=True, capture_output=True,
    )  # fmt: skip
    out, err = done.stdout, done.stderr
    for line in ("small 2", "full 2", "read-only 2", "roomy 0"):
        assert line in out.splitlines(), out + err
    assert "is not saved at step" in out and "Traceback" not in err
    assert f"{disk}/test can't be written (No space left on device)" in err
    assert "lock can't be written or locked (Read-only file system)" in err
    check_latest(tmp_path / "copy")
    assert hashes(tmp_path / "copy") == hashes(whole)


def test_a_second_run_on_the_folder_is_refused(tmp_path):
    """For as long as the first lives: a SIGKILL frees the folder."""
    options = [*RUN, "--num_epochs", "999", "--save_dir", tmp_path]
    first = Run(options, tmp_path / "first")
    while not check_latest(tmp_path / "test"):
        assert first.process.exitcode is None, first.output.read_text()
        time.sleep(0.05)
    log = tmp_path / "test" / "log.jsonl"
    in_use = f"is in use by process {first.process.pid} on"
    for more, words in (([], "holds a run"), (["--resume"], in_use), (["--overwrite"], in_use)):
        arguments = [a for a in options if a != "--resume"] + more
        status, text = Run(arguments, tmp_path / "o").wait()
        last = text.splitlines()[-1]
        assert status == 2 and words in last and "--desc" in last
        assert text.count("error:") == 1
    assert check_latest(log.parent)
    assert sum(e.get("message", "").startswith("training model") for e in events(log.parent)) == 1
    first.kill()
    status, text = Run([*options, "--num_epochs", "2"], tmp_path / "o").wait()
    assert status == 0, text
