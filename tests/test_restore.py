"""Checkpoint files, ours and released ones: layouts, formats, and what is refused how."""

import http.server
import json
import math
import os
import pickle
import threading

import pytest
import torch
from golden import inputs, model

from hps import UserError, get_hparams
from train_helpers import (
    load_vaes,
    make_optimizer,
    read_torch_file,
    restore_log,
    restore_params,
    save_model,
)
from utils import maybe_download
from vae import VAE


def _elbo(H, vae):
    torch.manual_seed(0)
    with torch.no_grad():
        return vae(*inputs(H, 2, 0))["elbo"].item()


@pytest.mark.parametrize("prefix", ["module.", ""])
@pytest.mark.parametrize("zipped", [True, False])
def test_released_layouts_and_formats(prefix, zipped, tmp_path):
    H, vae = model("tiny")
    state = {prefix + name: t for name, t in vae.state_dict().items()}
    torch.save(state, tmp_path / "m.th", _use_new_zipfile_serialization=zipped)
    other = VAE(H)
    restore_params(other, str(tmp_path / "m.th"), 0, 1, map_cpu=True)
    assert _elbo(H, other) == _elbo(H, vae)


def test_names_are_kept_without_map_ddp(tmp_path):
    H, vae = model("tiny")
    torch.save(vae.state_dict(), tmp_path / "m.th")
    restore_params(VAE(H), str(tmp_path / "m.th"), 0, 1, map_ddp=False)
    torch.save({f"module.{k}": t for k, t in vae.state_dict().items()}, tmp_path / "m.th")
    with pytest.raises(UserError, match="766 entries differ"):
        restore_params(VAE(H), str(tmp_path / "m.th"), 0, 1, map_ddp=False)


def test_load_vaes_restores_each_from_its_file(tmp_path):
    H, vae = model("tiny")
    H.update(local_rank=0, mpi_size=1, device="cpu")
    torch.save({f"module.{k}": t for k, t in vae.state_dict().items()}, tmp_path / "m.th")
    torch.save({k: t * 0.9 for k, t in vae.state_dict().items()}, tmp_path / "e.th")
    vae_only, ema_only = H.copy(), H.copy()
    vae_only.restore_path, ema_only.restore_ema_path = (str(tmp_path / n) for n in ("m.th", "e.th"))

    wrapped, ema = load_vaes(vae_only, print)  # the EMA starts from the weights
    assert _elbo(H, wrapped.module) == _elbo(H, ema) == _elbo(H, vae)
    _, ema = load_vaes(ema_only, print)
    assert _elbo(H, ema) != _elbo(H, vae)
    both = vae_only | ema_only | {"restore_path": vae_only.restore_path}
    wrapped, ema_of_both = load_vaes(type(H)(both), print)
    assert _elbo(H, wrapped.module) == _elbo(H, vae) and _elbo(H, ema_of_both) == _elbo(H, ema)
    assert not any(p.requires_grad for p in ema.parameters())


def test_what_is_saved_is_plain_and_restores(tmp_path):
    H, vae = model("tiny")
    H.update(lr=1e-3, adam_beta1=0.9, adam_beta2=0.9, wd=0.0, save_dir=str(tmp_path))
    optimizer, _ = make_optimizer(vae.parameters(), H, use_apex=False)
    vae(*inputs(H, 2, 0))["elbo"].backward()
    optimizer.step()
    (tmp_path / "log.jsonl").write_text('{"type": "message"}\n')
    save_model(str(tmp_path / "iter-7"), vae, vae, optimizer, H)
    other = VAE(H)
    other.load_state_dict(torch.load(tmp_path / "iter-7-model-ema.th", weights_only=True))
    assert _elbo(H, other) == _elbo(H, vae)
    content = torch.load(tmp_path / "iter-7-opt.th", weights_only=True)
    assert content["state"][0].keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert (tmp_path / "iter-7-log.jsonl").read_text() == '{"type": "message"}\n'
    assert torch.load(tmp_path / "iter-7-model.th", weights_only=True).keys() == (
        vae.state_dict().keys()
    )


@pytest.mark.parametrize("held, asked", [("ffhq256", "ffhq1024"), ("cifar10", "imagenet32")])
def test_a_file_of_another_preset_is_named(held, asked, tmp_path):
    """Files of that size need not be written: one number repeated in every place."""
    with torch.device("meta"):
        state, wanted = (VAE(get_hparams(name)).state_dict() for name in (held, asked))
    one = torch.zeros(1)
    torch.save({f"module.{k}": one.expand(t.shape) for k, t in state.items()}, tmp_path / "m.th")
    assert os.path.getsize(tmp_path / "m.th") < 10e6

    class Asked(torch.nn.Module):
        def state_dict(self):
            return wanted

    with pytest.raises(UserError) as error:
        restore_params(Asked(), str(tmp_path / "m.th"), 0, 1)
    message = str(error.value)
    assert f"holds the {held} model" in message and f"--hps {held}" in message
    assert "\n" not in message and len(message) < 400


def test_a_file_of_no_preset_shows_one_entry_of_both(tmp_path):
    _, vae = model("tiny_res2")
    torch.save(vae.state_dict(), tmp_path / "m.th")
    H, _ = model("tiny")
    with pytest.raises(UserError, match="none of the presets.*in the file.*in the model"):
        restore_params(VAE(H), str(tmp_path / "m.th"), 0, 1)


class Hostile:
    def __reduce__(self):
        return os.mkdir, (Hostile.target,)


BROKEN = {
    "missing": (None, "does not exist"),
    "empty": (b"", "no complete checkpoint"),
    "page": (b"<html>not found</html>" * 50, "no complete checkpoint"),
    "other zip": (b"PK\x03\x04" + bytes(100), "no complete checkpoint"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files(case, tmp_path):
    content, message = BROKEN[case]
    path = tmp_path / "m.th"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_torch_file(str(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_files_and_a_folder(zipped, tmp_path):
    _, vae = model("tiny")
    path = tmp_path / "m.th"
    torch.save(vae.state_dict(), path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for share in (0.1, 0.5, 0.99):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(UserError, match="no complete checkpoint"):
            read_torch_file(str(path))
    with pytest.raises(UserError, match="is a folder"):
        read_torch_file(str(tmp_path))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_hostile_file_runs_nothing(zipped, tmp_path):
    Hostile.target = str(tmp_path / "made")
    torch.save({"w": Hostile()}, tmp_path / "m.th", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="could run code"):
        read_torch_file(str(tmp_path / "m.th"))
    (tmp_path / "p.th").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(UserError):
        read_torch_file(str(tmp_path / "p.th"))
    assert not os.path.exists(Hostile.target)


@pytest.mark.parametrize("content", [[1, 2], {}, {"a": 1}, {"a": torch.zeros(1), "b": "text"}])
def test_files_that_hold_no_state_dict(content, tmp_path):
    torch.save(content, tmp_path / "m.th")
    H, vae = model("tiny")
    with pytest.raises(UserError, match="no state dict|none of the presets"):
        restore_params(vae, str(tmp_path / "m.th"), 0, 1)


def test_step_and_epoch_come_from_the_log(tmp_path):
    path = tmp_path / "log.jsonl"
    lines = [
        {"type": "hparam", "key": "step", "value": 9},
        {"type": "train_loss", "step": 1000, "epoch": 3},
        {"type": "eval_loss", "step": 1000, "epoch": 3, "elbo": 2.5},
        {"message": "plain"},
        {"type": "train_loss", "step": 2000, "epoch": 6},
        {"type": "eval_loss", "step": 2000, "epoch": 6, "elbo": 2.6},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert restore_log(str(path), 0, 1) == (2.5, 2000, 6)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines[1:2]))
    assert restore_log(str(path), 0, 1) == (math.inf, 1000, 3)
    for text in ("", "{}\n", "no json\n", '{"type": "train_loss"}\n', "[1]\n"):
        path.write_text(text)
        with pytest.raises(UserError, match="no log.jsonl"):
            restore_log(str(path), 0, 1)
    with pytest.raises(UserError, match="can't be read"):
        restore_log(str(tmp_path / "absent"), 0, 1)


def test_an_address_is_fetched_once(tmp_path, monkeypatch):
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            if self.path != "/a/file.th":
                return self.send_error(404)
            self.send_response(200)
            self.send_header("Content-Length", "10" if len(asked) == 1 else "5")
            self.end_headers()
            self.wfile.write(b"hello")

        def log_message(self, *_):
            pass

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/a/file.th"
        with pytest.raises(UserError, match="can't be fetched"):
            maybe_download(url)  # cut short
        assert not list(tmp_path.iterdir())
        assert maybe_download(url) == "file.th" and maybe_download(url) == "file.th"
        assert len(asked) == 2 and (tmp_path / "file.th").read_bytes() == b"hello"
        assert maybe_download(url, "other.th") == "other.th"
        with pytest.raises(UserError, match="404"):
            maybe_download(url + "x")
        server.shutdown()
    assert maybe_download("local.th") == "local.th"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file.th", "other.th"]
