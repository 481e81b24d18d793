"""File systems that refuse a call: a shim under a real run, and failing saves."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import ENV, IMPORTS, ROOT, SMALL, check_latest, hashes
from torch import nn

import file_systems
import files
import outputs
import packing
import run_folder
from checkpoints import complete_checkpoints, repair_checkpoints, write_checkpoint
from errors import UserError
from hps import Hyperparams

# ---- a shim of the C library's calls ---------------------------------------------------------

# FAULT_CALL=errno lets that call fail below the folder FAULT_ROOT.
SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static int fails(const char *call, const char *path) {
    const char *number = getenv(call), *root = getenv("FAULT_ROOT");
    if (!number || !root || (path[0] == '/' && strncmp(path, root, strlen(root)))) return 0;
    errno = atoi(number);
    return 1;
}
static const char *name_of(int fd, char *buffer) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, buffer, 4095);
    buffer[n < 0 ? 0 : n] = 0;
    return buffer;
}
#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

int symlink(const char *a, const char *b) {
    return fails("FAULT_SYMLINK", b) ? -1 : REAL(symlink)(a, b);
}
int symlinkat(const char *a, int d, const char *b) {
    return fails("FAULT_SYMLINK", b) ? -1 : REAL(symlinkat)(a, d, b);
}
int link(const char *a, const char *b) { return fails("FAULT_LINK", b) ? -1 : REAL(link)(a, b); }
int linkat(int c, const char *a, int d, const char *b, int f) {
    return fails("FAULT_LINK", b) ? -1 : REAL(linkat)(c, a, d, b, f);
}
static int rename_fails(const char *a, const char *b) {
    struct stat s;
    if (!lstat(a, &s) && S_ISDIR(s.st_mode) && fails("FAULT_RENAME_DIR", b)) return 1;
    if (!lstat(b, &s)) {
        if (S_ISLNK(s.st_mode) && fails("FAULT_RENAME_LINK", b)) return 1;
        if (fails("FAULT_RENAME_OVER", b)) return 1;
    }
    return fails("FAULT_RENAME", b);
}
int rename(const char *a, const char *b) { return rename_fails(a, b) ? -1 : REAL(rename)(a, b); }
int renameat(int c, const char *a, int d, const char *b) {
    return rename_fails(a, b) ? -1 : REAL(renameat)(c, a, d, b);
}
static int sync_fails(int fd) {
    struct stat s;
    char b[4096];
    int dir = !fstat(fd, &s) && S_ISDIR(s.st_mode);
    return fails(dir ? "FAULT_FSYNC_DIR" : "FAULT_FSYNC", name_of(fd, b));
}
int fsync(int fd) { return sync_fails(fd) ? -1 : REAL(fsync)(fd); }
int fdatasync(int fd) { return sync_fails(fd) ? -1 : REAL(fdatasync)(fd); }
int flock(int fd, int how) {
    char b[4096];
    return fails("FAULT_FLOCK", name_of(fd, b)) ? -1 : REAL(flock)(fd, how);
}
static int lock_fails(int fd, int command) {
    char b[4096];
    return (command == F_SETLK || command == F_SETLKW) && fails("FAULT_LOCKF", name_of(fd, b));
}
#define FCNTL(name)                                          \
    int name(int fd, int command, ...) {                     \
        va_list list;                                        \
        va_start(list, command);                             \
        void *argument = va_arg(list, void *);               \
        va_end(list);                                        \
        if (lock_fails(fd, command)) return -1;              \
        return REAL(name)(fd, command, argument);            \
    }
FCNTL(fcntl)
FCNTL(fcntl64)
#define OPEN(name)                                                     \
    int name(const char *path, int flags, ...) {                       \
        va_list list;                                                  \
        va_start(list, flags);                                         \
        mode_t mode = va_arg(list, mode_t);                            \
        va_end(list);                                                  \
        if ((flags & O_APPEND) && fails("FAULT_APPEND", path)) return -1; \
        return REAL(name)(path, flags, mode);                          \
    }
OPEN(open)
OPEN(open64)
int unlinkat(int d, const char *a, int flags) {
    return fails("FAULT_UNLINK", a) ? -1 : REAL(unlinkat)(d, a, flags);
}
"""

# Runs train.py in a fork for each case, {name: [{FAULT_CALL: errno}, arguments]}.
RUNS = """
import json, os, sys
import IMPORTS

cases, out = json.load(sys.stdin), sys.argv[1]
for name, (faults, argv) in cases.items():
    if not os.fork():
        output = os.open(f"{out}/{name}.out", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1), os.dup2(output, 2)
        os.environ.update(faults)
        sys.argv = ["train.py", *argv]
        train.run_command(train.main)
    status = os.waitstatus_to_exitcode(os.wait()[1])
    print(json.dumps([name, status]), flush=True)
""".replace("IMPORTS", ", ".join(IMPORTS))


RUN = [*SMALL, "--iters_per_save", "4", "--iters_per_ckpt", "10", "--num_epochs", "1"]


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    """The compiled shim, which lets a symbolic link fail and no more, as a first try."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not compiler or not sys.platform.startswith("linux"):
        pytest.skip("no C compiler here, or no Linux")
    folder = tmp_path_factory.mktemp("shim")
    (folder / "shim.c").write_text(SHIM)
    library = folder / "shim.so"
    subprocess.run(
        [compiler, "-w", "-shared", "-fPIC", "-o", library, folder / "shim.c", "-ldl"], check=True
    )
    return library


def run(shim, folder, cases):
    """{name: (status, output, folder)} of runs with the shim's faults, each with its own --desc."""
    out = folder / "out"
    out.mkdir()
    env = ENV | {"LD_PRELOAD": str(shim), "FAULT_ROOT": str(folder / "runs")}
    words = {
        name: [
            {f"FAULT_{call}": str(number) for call, number in faults.items()},
            [*RUN, "--save_dir", str(folder / "runs"), "--desc", name, *argv],
        ]
        for name, (faults, argv) in cases.items()
    }
    done = subprocess.run(
        [sys.executable, "-c", RUNS, out], input=json.dumps(words), cwd=ROOT, env=env, text=True,
        capture_output=True, timeout=600,
    )  # fmt: skip
    statuses = dict(json.loads(line) for line in done.stdout.splitlines())
    assert statuses.keys() == cases.keys(), done.stderr
    return {
        name: (status, (out / f"{name}.out").read_text(), folder / "runs" / name)
        for name, status in statuses.items()
    }


# call → (what the message says, errors that file systems answer it with; the first is the short
# form's)
REFUSED = {
    "SYMLINK": ("make symbolic links", "EOPNOTSUPP EPERM ENOSYS EINVAL EACCES"),
    "RENAME": ("rename a folder", "ENOSYS EPERM EXDEV EOPNOTSUPP"),
    "RENAME_DIR": ("rename a folder", "EXDEV ENOSYS EPERM EMFILE"),
    "RENAME_OVER": ("rename a file over another", "EEXIST EPERM EACCES EBUSY"),
    "RENAME_LINK": ("rename a symbolic link over another", "EPERM EEXIST EINVAL"),
    "FSYNC": ("write a file to the disk", "EINVAL ENOSYS EOPNOTSUPP"),
    "LOCKF": ("lock a file", "ENOLCK ENOSYS EOPNOTSUPP EINVAL"),
}
# What is no failure: a run is then as on any other.
HARMLESS = {
    "FSYNC_DIR": "EINVAL EOPNOTSUPP ENOSYS",
    "LINK": "EPERM EOPNOTSUPP EMLINK",
    "FLOCK": "ENOLCK",
}


def hold_refused(call, what, result):
    """One line that names what is missing and what helps; nothing on the disk."""
    status, text, folder = result
    lines = [line for line in text.splitlines() if "error: " in line]
    assert status == 2 and "Traceback" not in text, text
    assert text.splitlines()[-1:] == lines and len(lines) == 1, text
    if "Too many open files" not in lines[0]:
        assert f"refuses to {what}" in lines[0] and "--save_dir" in lines[0]
    assert not folder.exists() or not any(folder.iterdir()), [*folder.iterdir()]


def a_run_with_plain_files(folder):
    """The original's files under our names, which the save of them makes links of."""
    folder.mkdir(parents=True)
    for name in ("model.th", "model-ema.th", "opt.th"):
        (folder / f"iter-10-{name}").write_text("old")


def hold_trained(result, whole):
    status, text, folder = result
    assert status == 0 and "not saved" not in text, text
    assert check_latest(folder) == 13 and hashes(folder) == hashes(whole)
    assert not [p for p in folder.rglob("*") if p.suffix == ".partial" or not p.exists()]


SHORT = ("SYMLINK", "LOCKF")  # test_a_trial_... has the others


@pytest.fixture(scope="module")
def short(shim, tmp_path_factory):
    """Of the runs of test_every_error_of_every_call a few, from one start of Python."""
    folder = tmp_path_factory.mktemp("short")
    harmless = {call: getattr(errno, errors.split()[0]) for call, errors in HARMLESS.items()}
    cases = {"none": ({}, ()), "harmless": (harmless, ())}
    cases |= {call: ({call: getattr(errno, REFUSED[call][1].split()[0])}, ()) for call in SHORT}
    a_run_with_plain_files(folder / "runs" / "harmless")
    return run(shim, folder, cases)


@pytest.mark.parametrize("call", SHORT)
def test_a_call_that_is_refused_is_named_before_the_first_step(call, short):
    hold_refused(call, REFUSED[call][0], short[call])
    assert not short[call][2].exists()


def test_what_is_no_failure_changes_nothing(short):
    """No fsync of folders (network drives), no hard links (exFAT), no flock: whole runs."""
    for name in ("none", "harmless"):
        hold_trained(short[name], short["none"][2])


@pytest.mark.slow
def test_every_error_of_every_call(shim, tmp_path):
    cases = {
        f"{call}-{name}": ({call: getattr(errno, name)}, ())
        for call, errors in [*((c, e) for c, (_, e) in REFUSED.items()), *HARMLESS.items()]
        for name in errors.split()
    }
    for name in cases:
        if name.startswith("LINK"):
            a_run_with_plain_files(tmp_path / "runs" / name)
    found = run(shim, tmp_path, {"none": ({}, ()), **cases})
    for name in cases:
        call = name.split("-")[0]
        if call in HARMLESS:
            hold_trained(found[name], tmp_path / "runs" / "none")
        else:
            hold_refused(call, REFUSED[call][0], found[name])


# ---- a fault that comes later ----------------------------------------------------------------


def _save(folder, step):
    model = nn.Linear(3, 2)
    nn.init.constant_(model.weight, step)
    H = Hyperparams(save_dir=str(folder), progress={"step": step})
    path = os.path.join(folder, "latest")
    write_checkpoint(path, model, model, torch.optim.AdamW(model.parameters()), H)


def refusing(function, number, unless=lambda *a: False):
    def wrapped(*args, **kwargs):
        if unless(*args):
            return function(*args, **kwargs)
        raise OSError(number, os.strerror(number))

    return wrapped


@pytest.mark.parametrize("saves", [0, 2])
@pytest.mark.parametrize("call", ["symlink", "replace", "rename", "fsync", "link"])
def test_saves_that_fail_leave_nothing(call, saves, tmp_path, monkeypatch):
    """Time after time, where a quota or a disk of the network begins to refuse a call."""
    for step in range(saves):
        _save(tmp_path, step)
    before = sorted(tmp_path.rglob("*"))
    owner = os if call != "fsync" else files.os
    with monkeypatch.context() as m:
        m.setattr(owner, call, refusing(getattr(owner, call), errno.EIO))
        for step in range(10, 14):
            if call == "link":  # it is needed for no save
                _save(tmp_path, step)
                continue
            with pytest.raises(OSError):
                _save(tmp_path, step)
            assert check_latest(tmp_path) in (saves - 1 if saves else None, step)
            assert len(complete_checkpoints(tmp_path)) <= 2
    if call != "link" and not saves:
        assert not [p for p in tmp_path.rglob("*") if p.is_file()]
    elif call != "link":
        assert sorted(tmp_path.rglob("*")) == before
    _save(tmp_path, 20)
    repair_checkpoints(tmp_path)
    assert check_latest(tmp_path) == 20 and not [*tmp_path.rglob("*.partial")]


def test_names_that_fail_after_the_instant_leave_two_checkpoints_at_most(tmp_path, monkeypatch):
    """The names are those of the new one then; the old ones go all the same."""
    _save(tmp_path, 0)
    monkeypatch.setattr(
        "checkpoints.fsync",
        refusing(files.fsync, errno.EIO, lambda path: Path(path) != tmp_path),
    )
    for step in range(1, 6):
        with pytest.raises(OSError):
            _save(tmp_path, step)
        assert check_latest(tmp_path) == step and len(complete_checkpoints(tmp_path)) <= 2


def test_a_disk_that_keeps_old_files_is_asked_again(tmp_path, monkeypatch):
    """As NFS does while another process reads them."""
    rmtree, kept = shutil.rmtree, []

    def keep_one(path, **options):
        if str(path) not in kept and Path(path).exists():
            kept.append(str(path))
        else:
            rmtree(path, **options)

    monkeypatch.setattr("checkpoints.shutil.rmtree", keep_one)
    for step in range(8):
        _save(tmp_path, step)
    assert len([*(tmp_path / "sets").glob("*.partial")]) <= 1 < len(kept)


@pytest.mark.parametrize(
    "call, what",
    [
        ("symlink", "make symbolic links"),
        ("rename", "rename a folder"),
        ("replace", "rename a file over another"),
        ("fsync", r"write a file to the disk \(fsync\)"),
    ],
)
def test_a_trial_says_what_is_refused_and_removes_itself(call, what, tmp_path, monkeypatch):
    file_systems.try_file_system(tmp_path)
    with monkeypatch.context() as m:
        m.setattr(os, call, lambda *_: None)  # says yes, and does nothing
        if call != "fsync":
            with pytest.raises(UserError, match=rf"refuses to {what} \(.*\), which.*--save_dir"):
                file_systems.try_file_system(tmp_path)
    for number in (errno.EPERM, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES):
        with monkeypatch.context() as m:
            m.setattr(os, call, refusing(getattr(os, call), number))
            with pytest.raises(UserError, match=rf"refuses to {what} \({os.strerror(number)}\)"):
                file_systems.try_file_system(tmp_path)
    with monkeypatch.context() as m:
        m.setattr(os, call, refusing(getattr(os, call), errno.ENOSPC))
        with pytest.raises(OSError, match="No space"):
            file_systems.try_file_system(tmp_path)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("name", ["EROFS", "EDQUOT", "ESTALE", "EIO", "ENOTCONN"])
@pytest.mark.parametrize("call", ["mkdir", "lockf", "symlink", "replace", "rename", "fsync"])
def test_a_disk_in_a_bad_state_is_not_blamed_for_what_it_lacks(call, name, tmp_path, monkeypatch):
    """What helps is another than where a file system knows no such call; nothing is left."""
    owner = run_folder.fcntl if call == "lockf" else os
    monkeypatch.setattr(owner, call, refusing(getattr(owner, call), getattr(errno, name)))
    with pytest.raises(UserError) as error:
        run_folder.lock_run(str(tmp_path / call / "run"))
    remedies = {"EROFS": "mount it", "EDQUOT": "make room"}
    said = f"({os.strerror(getattr(errno, name))}): {remedies.get(name, 'look after the disk')}"
    assert said in str(error.value) and "refuses" not in str(error.value)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("number", sorted(files.NO_SUCH_CALL))
def test_folders_need_no_fsync(number, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(os, "fsync", refusing(os.fsync, number))
    files.fsync(tmp_path)
    with pytest.raises(OSError):
        files.fsync(tmp_path / "file")


# ---- what else locks -------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["flock", "replace", "fsync"])
def test_packing_goes_where_it_can_be_locked_and_renamed(call, tmp_path, monkeypatch):
    root, home = tmp_path / "photos", tmp_path / "home"
    root.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    owner = packing.fcntl if call == "flock" else os
    place = {
        "flock": lambda file, _: file.name,
        "replace": lambda _, new: new,
        "fsync": lambda number: os.readlink(f"/proc/self/fd/{number}"),
    }[call]
    refused = refusing(
        getattr(owner, call), errno.ENOLCK, lambda *a: str(root) not in str(place(*a))
    )
    with monkeypatch.context() as m:
        m.setattr(owner, call, refused)
        folder, manifest = packing.cached(root, "8", "source", lambda _: {"made": 1})
        assert home in folder.parents and manifest["made"] == 1 and not [*root.iterdir()]
        m.setattr(owner, call, refusing(getattr(owner, call), errno.ENOLCK))
        with pytest.raises(UserError, match=r"locked neither in .*No locks.*XDG_CACHE_HOME"):
            packing.cached(root, "9", "source", dict)
        assert not [*root.iterdir()] and not [*home.rglob("9.*")]
    assert packing.cached(root, "8", "source", dict)[1]["made"] == 1


def test_an_npz_that_can_not_be_locked_is_named(tmp_path, monkeypatch):
    (tmp_path / "w.th").write_text("weights")
    args = Hyperparams(
        out=str(tmp_path / "a.npz"), restore_ema_path=str(tmp_path / "w.th"), n_batch=2
    )
    monkeypatch.setattr(outputs.fcntl, "flock", refusing(outputs.fcntl.flock, errno.ENOSYS))
    with pytest.raises(UserError, match=r"a.npz.part can't be locked .*name an --out"):
        outputs.NpzFile(args, "hash", (4, 4, 3))
    assert [p.name for p in tmp_path.iterdir()] == ["w.th"]


def test_a_disk_that_fails_while_images_are_read_is_named(tmp_path, monkeypatch):
    np.save(tmp_path / "a.npy", np.zeros((3, 4, 4, 3), np.uint8))
    images = packing.NpyImages(tmp_path / "a.npy")
    monkeypatch.setattr(os, "preadv", refusing(os.preadv, errno.EIO))
    with pytest.raises(UserError, match=r"a.npy can't be read \(Input/output error\)"):
        images[[0]]
