"""setup_checkpoints.sh against an HTTP server on this machine, with files of the real shapes."""

import hashlib
import io
import json
import re

import pytest
import torch
from pages import README
from test_setup_scripts import (  # noqa: F401  run, server, start: fixtures
    assert_done,
    assert_refused,
    kill_when,
    names_in,
    run,
    server,
    size_of,
    start,
)

from hps import get_hparams
from vae import VAE

SCRIPT = "setup_checkpoints.sh"
EMA = "cifar10-seed2-iter-650000-model-ema.th"


def saved(content):
    data = io.BytesIO()
    torch.save(content, data)
    return data.getvalue()


def empty(shape):
    """A tensor whose elements are one and the same, so that it takes no room in a file."""
    return torch.zeros(()).expand(shape)


def weights(preset, prefix=""):
    with torch.device("meta"):
        state = VAE(get_hparams(preset)).state_dict()
    return {f"{prefix}{name}": empty(t.shape) for name, t in state.items()}


def optimizer(preset):
    shapes = [t.shape for t in weights(preset).values()]
    state = {i: {"exp_avg": empty(s), "exp_avg_sq": empty(s)} for i, s in enumerate(shapes)}
    return {"state": state, "param_groups": [{"step": 3, "params": list(state)}]}


@pytest.fixture
def fetch(server, run, tmp_path):  # noqa: F811
    """fetch(NAME, ...): a run of the script against the server, in fetch.folder."""

    def fetch(*args, how=run):
        return how(SCRIPT, *args, CHECKPOINTS_URL=server.url)

    fetch.folder = tmp_path / "cwd"
    return fetch


def test_ema_alone_is_fetched_once_and_recorded(server, fetch):  # noqa: F811
    data = saved(weights("cifar10"))
    server.files[f"/vdvae-assets-2/{EMA}"] = data
    sha256 = hashlib.sha256(data).hexdigest()
    assert_done(fetch("cifar10-seed2"), f"{EMA} {len(data)} {sha256}", "--hps cifar10")
    assert names_in(fetch.folder) == ["checkpoints.txt", EMA, f"{EMA}.address"]
    record = (fetch.folder / "checkpoints.txt").read_text()
    assert record == f"{EMA} {len(data)} {sha256}\n"
    assert_done(fetch("cifar10-seed2", "all"), "is in place")
    assert len(server.requests) == 1
    with open(fetch.folder / EMA, "ab") as file:
        file.write(b"x")
    assert_refused(fetch("cifar10-seed2"), EMA, "checkpoints.txt", "move")


def test_all_files_of_a_training(server, fetch):  # noqa: F811
    prefix = "imagenet32-iter-1700000"
    files = {
        "model-ema.th": saved(weights("imagenet32")),
        "model.th": saved(weights("imagenet32", "module.")),
        "opt.th": saved(optimizer("imagenet32")),
        "log.jsonl": json.dumps({"type": "train_loss", "step": 3, "epoch": 1}).encode(),
    }
    for kind, data in files.items():
        server.files[f"/vdvae-assets/{prefix}-{kind}"] = data
    assert_done(fetch("imagenet32", "all"))
    for kind, data in files.items():
        assert (fetch.folder / f"{prefix}-{kind}").read_bytes() == data
    assert (fetch.folder / "checkpoints.txt").read_text().count("\n") == 4


def test_a_killed_download_goes_on(server, fetch, start):  # noqa: F811
    data = saved(weights("cifar10"))
    server.files[f"/vdvae-assets-2/{EMA}"] = data
    server.stall = True
    part = fetch.folder / f"{EMA}.part"
    kill_when(fetch("cifar10-seed2", how=start), lambda: size_of(part) > len(data) // 3)
    got = size_of(part)
    server.stall = False
    assert_done(fetch("cifar10-seed2"))
    assert server.requests[1][1] == f"bytes={got}-"
    assert (fetch.folder / EMA).read_bytes() == data


def test_what_is_no_such_model_never_gets_its_name(server, fetch):  # noqa: F811
    """Another model, as the released ffhq1024 file was reported to be; damage; code."""
    name = "ffhq1024-iter-1700000-model-ema.th"
    other = saved(weights("ffhq256"))
    for data, words in [
        (other, ("the ffhq256 model", "deleted")),
        (other[: len(other) // 2], ("no complete checkpoint",)),
        (saved({"a": print}), ("could run code",)),
    ]:
        server.files[f"/vdvae-assets/{name}"] = data
        assert_refused(fetch("ffhq1024"), name, *words)
        assert names_in(fetch.folder) == []


def test_every_name_asks_for_the_file_that_the_readme_restores(server, fetch):  # noqa: F811
    released = set(re.findall(r"--restore_ema_path (\w+-(?:seed\d-)?iter-\S+)", README))
    assert len(released) == 8
    for file in released:
        name, preset = file.split("-iter-")[0], file.split("-")[0]
        server.requests.clear()
        assert_refused(fetch(name), "404", file)
        place = "vdvae-assets-2" if preset in ("cifar10", "imagenet64") else "vdvae-assets"
        assert server.requests == [(f"/{place}/{file}", None)]


def test_names(fetch):
    assert_refused(fetch("cifar10"), "'cifar10'", "-h")
    assert_refused(fetch("ffhq256", "everything"), "'everything'", "-h")
