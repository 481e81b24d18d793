"""Whatever room it belongs to, bad input is refused at the door by the whole command.

Each row ends with status 2 and one line that names the culprit; nothing is written or changed.
"""

import json
import os
import pickle
import random
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from fakes import Hostile
from runs import ENV, ROOT, SMALL, Run

from errors import UserError
from torch_files import read_torch_file

# ---- the folder that the rows refer to -----------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of some steps in runs/test, and files broken in every way beside it."""
    path = tmp_path_factory.mktemp("bad") / "work"
    path.mkdir()
    run = Run([*SMALL, "--num_epochs", "1", "--save_dir", path / "runs"], path.parent / "out")
    assert run.wait()[0] == 0
    good = path / "runs" / "test"
    for name in ("model", "model-ema", "opt"):
        content = (good / f"latest-{name}.th").read_bytes()
        (path / f"{name}.th").write_bytes(content)
        (path / f"cut-{name}.th").write_bytes(content[: len(content) // 2])
    (path / "log.jsonl").write_bytes((good / "latest-log.jsonl").read_bytes())
    state = torch.load(path / "model.th", weights_only=True)
    key = next(iter(state))

    def write(name, **changes):
        torch.save(state | {k.replace("first", key): v for k, v in changes.items()}, path / name)

    write("nan.th", first=state[key] * float("nan"))
    write("inf.th", first=state[key] / 0)
    write("shape.th", first=torch.zeros(1, 2, 3))
    write("integers.th", first=state[key].long())
    write("sparse.th", first=state[key].to_sparse())
    write("more.th", other=torch.zeros(1))
    write("text.th", first="text")
    torch.save({k: v for k, v in state.items() if k != key}, path / "fewer.th")
    torch.save([1, 2], path / "list.th")
    torch.save({}, path / "empty-dict.th")
    torch.save(state | {"x": Hostile("executed")}, path / "hostile.th")
    (path / "hostile-pickle.th").write_bytes(pickle.dumps(Hostile("executed")))
    (path / "empty.th").write_bytes(b"")
    (path / "page.th").write_text("<html>404</html>" * 99)
    (path / "noise.th").write_bytes(random.Random(0).randbytes(5000))
    with zipfile.ZipFile(path / "zip.th", "w") as file:
        file.writestr("readme.txt", "a zip of other people")
    os.mkdir(path / "folder.th")
    opt = torch.load(path / "opt.th", weights_only=True)

    def write_opt(name, change):
        content = torch.load(path / "opt.th", weights_only=True)
        change(content)
        torch.save(content, path / name)

    write_opt("opt-nan.th", lambda c: c["state"][0]["exp_avg"].fill_(float("nan")))
    write_opt("opt-shape.th", lambda c: c["state"][0].update(exp_avg=torch.zeros(9)))
    write_opt("opt-keys.th", lambda c: c["state"][0].pop("exp_avg_sq"))
    write_opt("opt-step.th", lambda c: c["state"][0].update(step=torch.tensor(-3.0)))
    write_opt("opt-groups.th", lambda c: c.update(param_groups=opt["param_groups"] * 2))
    write_opt("opt-fewer.th", lambda c: c["param_groups"][0]["params"].pop())
    train = {"type": "train_loss", "step": 5, "epoch": 1}
    for name, text in {
        "log-empty": "",
        "log-other": '{"type": "message"}\n[1]\n7\n',
        "log-text": "no json at all\n",
        "log-no-step": '{"type": "train_loss", "epoch": 1}\n',
        "log-infinite": json.dumps(train | {"step": float("inf")}),
        "log-negative": json.dumps(train | {"step": -5}),
        "log-words": json.dumps(train | {"epoch": "first"}),
        "log-deep": "[" * 100_000,
    }.items():
        (path / f"{name}.jsonl").write_text(text)
    (path / "log-bytes.jsonl").write_bytes(random.Random(1).randbytes(3000))
    for name in ("cifar", "cifar-hostile", "cifar-shape", "cifar-cut"):
        os.makedirs(path / name / "cifar-10-batches-py")
        batch = {b"data": np.zeros((2, 3072), np.uint8)}
        if name == "cifar-hostile":
            batch = Hostile("executed")
        if name == "cifar-shape":
            batch = {b"data": np.zeros((2, 30), np.uint8)}
        content = pickle.dumps(batch, protocol=2)
        content = content[:40] if name == "cifar-cut" else content
        for i in range(1, 6):
            (path / name / "cifar-10-batches-py" / f"data_batch_{i}").write_bytes(content)
    for name, array in {
        "npy-few": np.zeros((3, 32, 32, 3), np.uint8),
        "npy-float": np.zeros((3, 32, 32, 3)),
        "npy-object": np.array([Hostile("executed")], dtype=object),
    }.items():
        os.mkdir(path / name)
        np.save(path / name / "imagenet32-train.npy", array, allow_pickle=True)
    os.mkdir(path / "npy-cut")
    (path / "npy-cut" / "imagenet32-train.npy").write_bytes(b"\x93NUMPY\x01\x00v")
    (path / "file").write_text("a file")
    rng = np.random.RandomState(0)  # beside the folder: what is measured of it is kept beside it
    np.save(path.parent / "own.npy", rng.randint(0, 256, (9, 8, 8, 3), dtype=np.uint8))
    os.makedirs(path / "log-is-folder" / "test" / "log.jsonl")
    (path / "log-is-folder" / "test" / "lock").write_text("")
    return path


def contents(folder):
    """What stands in a folder: {path: content}. The lock's content is no one's loss."""
    return {
        path: path.read_bytes() if path.is_file() and path.name != "lock" else b""
        for path in folder.rglob("*")
    }


# ---- the table: name → (arguments, a word of the message, environment) -------------------------

NEW = ["--save_dir", "new"]  # no row makes this folder


def _small(*more):
    return [*SMALL, *NEW, *more]


ROWS = {
    "no preset": ([*NEW], "no preset given", {}),
    "unknown preset": (["--hps", "cifra10", *NEW], "did you mean cifar10", {}),
    "unknown second preset": (["--hps", "cifar10,i64", *NEW], "i64", {}),
    "unknown option": (_small("--learning_rate", "1"), "--learning_rate", {}),
    "mistyped option": (_small("--n_bacth", "1"), "--n_batch", {}),
    "shortened option": (_small("--num_ep", "1"), "--num_ep", {}),
    "option without a value": (_small("--lr"), "--lr", {}),
    "a word too many": (_small("resume"), "resume", {}),
    "n_batch larger than the data": (_small("--n_batch", "2000"), "--n_batch 2000", {}),
    "n_batch beyond all bounds": (_small("--n_batch", "9" * 30), "--n_batch", {}),
    "device of another world": (_small("--device", "tpu"), "--device", {}),
    "no CUDA here": (_small("--device", "cuda"), "--device cuda", {"CUDA_VISIBLE_DEVICES": ""}),
    "unknown dataset": (_small("--dataset", "mnist"), "unknown dataset 'mnist'", {}),
    "test_eval without weights": (_small("--test_eval"), "--restore_ema_path", {}),
    "save_dir below a file": (_small("--save_dir", "file"), "file", {}),
    "desc below a file": ([*SMALL, "--save_dir", ".", "--desc", "file"], "file", {}),
    "save_dir where no one writes": (_small("--save_dir", "/proc/1/x"), "/proc/1/x", {}),
    "log that is a folder": ([*SMALL, "--save_dir", "log-is-folder"], "log.jsonl", {}),
}
for option, value in {
    "lr": "nan", "warmup_iters": "inf", "wd": "-0.1", "adam_beta1": "1", "adam_beta2": "-0.1",
    "ema_rate": "1.5", "grad_clip": "0", "skip_threshold": "nan", "n_batch": "0", "width": "1.5",
    "zdim": "-1", "num_mixtures": "ten", "seed": "-1", "port": "70000", "num_epochs": "1e3",
    "iters_per_save": "0", "bottleneck_multiple": "0", "keep_ckpts": "0", "timeout": "-5",
    "max_skips": "0x10",
}.items():  # fmt: skip
    ROWS[f"{option} {value}"] = (_small(f"--{option}={value}"), option, {})
ROWS["seed beyond 64 bits"] = (_small("--seed", str(2**70)), "--seed", {})
for option, value in (
    ("enc_blocks", ""), ("enc_blocks", "8x"), ("enc_blocks", "8x1,8d0,1x1"), ("enc_blocks", "8y2"),
    ("enc_blocks", "4x1"), ("enc_blocks", "8x1,8d3,2x1"), ("enc_blocks", "8x1,8m4"),
    ("enc_blocks", "8x1,8d8,1x1,"), ("enc_blocks", "8x1,8d8,1x-1"), ("dec_blocks", "1x1"),
    ("dec_blocks", "1x1,8d0"), ("dec_blocks", "1x1,8m3"), ("dec_blocks", "1x1,4m1,8m4"),
    ("dec_blocks", "8m1,1x1;"), ("dec_blocks", "1x1 8m1"), ("custom_width_str", "8:16"),
    ("custom_width_str", "1"), ("custom_width_str", "1:0"),
    ("dec_blocks", "\N{ARABIC-INDIC DIGIT ONE}x1,8m1"),
):  # fmt: skip
    ROWS[f"{option} {value!r}"] = (_small(f"--{option}={value}"), option.split("_")[1][:5], {})
for name in (
    "absent", "cut-model", "nan", "inf", "shape", "integers", "sparse", "more", "text", "fewer",
    "list", "empty-dict", "hostile", "hostile-pickle", "empty", "page", "noise", "zip", "folder",
    "opt",
):  # fmt: skip
    ROWS[f"restore_path {name}"] = (_small("--restore_path", f"{name}.th"), f"{name}.th", {})
ROWS["own images and restore_path nan"] = (
    _small("--dataset", "images", "--data_root", "../own.npy", "--restore_path", "nan.th"),
    "nan.th", {},
)  # fmt: skip
for name in ("nan", "hostile", "cut-model-ema"):
    arguments = [*SMALL, "--save_dir", "runs", "--restore_ema_path", f"{name}.th", "--test_eval"]
    ROWS[f"restore_ema_path {name}, in a folder with a run"] = (arguments, f"{name}.th", {})
for name in ("cut-opt", "opt-nan", "opt-shape", "opt-keys", "opt-step", "opt-groups", "opt-fewer",
             "model", "hostile"):  # fmt: skip
    ROWS[f"restore_optimizer_path {name}"] = (
        _small("--restore_optimizer_path", f"{name}.th"), f"{name}.th", {},
    )  # fmt: skip
for name in ("empty", "other", "text", "no-step", "infinite", "negative", "words", "deep",
             "bytes", "absent"):  # fmt: skip
    arguments = [*SMALL, "--save_dir", "runs", "--restore_log_path", f"log-{name}.jsonl"]
    ROWS[f"restore_log_path {name}"] = (arguments, f"log-{name}.jsonl", {})
for dataset, root in (
    ("cifar10", "absent"), ("cifar10", "cifar"), ("cifar10", "cifar-hostile"),
    ("cifar10", "cifar-shape"), ("cifar10", "cifar-cut"), ("imagenet32", "absent"),
    ("imagenet32", "npy-few"), ("imagenet32", "npy-float"), ("imagenet32", "npy-object"),
    ("imagenet32", "npy-cut"), ("ffhq256", "absent"), ("ffhq1024", "absent"),
):  # fmt: skip
    ROWS[f"{dataset} in {root}"] = (
        ["--hps", dataset, "--device", "cpu", "--data_root", root, *NEW], root, {},
    )  # fmt: skip
for variables, word in (
    ({"RANK": "0", "WORLD_SIZE": "two", "LOCAL_RANK": "0"}, "WORLD_SIZE"),
    ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "rank 2 of 2"),
    ({"RANK": "0", "WORLD_SIZE": "0", "LOCAL_RANK": "0"}, "rank 0 of 0"),
    ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "MASTER_ADDR"),
    ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
      "MASTER_PORT": "none"}, "torchrun"),
    ({"TORCHELASTIC_RUN_ID": "x"}, "RANK"),
    ({"PMI_SIZE": "many"}, "PMI_SIZE"),
    ({"OMPI_COMM_WORLD_SIZE": "3"}, "3"),
    ({"SLURM_PROCID": "first", "SLURM_STEP_ID": "0"}, "SLURM_PROCID"),
    ({"SLURM_PROCID": "3", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}, "rank 3 of 2"),
):  # fmt: skip
    ROWS[f"launcher {variables}"] = (_small(), word, variables)


def check(status, errors, word, folder, before, name):
    assert status == 2, f"{name}: {status}, {errors[-500:]}"
    assert errors.endswith("\n") and errors.count("\n") == 1, f"{name}: {errors[-2000:]}"
    assert "error: " in errors and word in errors and len(errors) < 600, f"{name}: {errors}"
    assert contents(folder) == before, name


def test_there_are_rows_enough():
    assert len(ROWS) >= 60
    print(len(ROWS), "rows")


@pytest.mark.parametrize("name", ROWS)
def test_bad_input(name, folder):
    arguments, word, environ = ROWS[name]
    before = contents(folder)
    errors = folder.parent / "errors"
    run = Run(arguments, folder.parent / "out", environ=environ, cwd=folder, errors=str(errors))
    check(run.wait()[0], errors.read_text(), word, folder, before, name)


@pytest.mark.parametrize(
    "name",
    ["no preset", "enc_blocks '8y2'", "restore_path hostile", "launcher {'PMI_SIZE': 'many'}"],
)
def test_bad_input_of_the_command(name, folder):
    arguments, word, environ = ROWS[name]
    before = contents(folder)
    command = [sys.executable, ROOT / "train.py", *arguments]
    done = subprocess.run(command, cwd=folder, env=ENV | environ, capture_output=True, text=True)
    check(done.returncode, done.stderr, word, folder, before, name)


def test_a_checkpoint_cut_at_any_place_is_refused(folder):
    content = (folder / "model.th").read_bytes()
    rng = random.Random(2)
    for offset in [rng.randrange(len(content)) for _ in range(20)]:
        path = folder.parent / "cut.th"
        path.write_bytes(content[:offset])
        with pytest.raises(UserError, match="cut.th is no complete checkpoint") as error:
            read_torch_file(str(path))
        assert "\n" not in str(error.value)
