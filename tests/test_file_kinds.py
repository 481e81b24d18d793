"""What a file is, where it is not what was asked for: said by name, in one line."""

import gzip
import io
import json
import os
import pickle
import socket
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from fakes import noise, own_H, tiny_network
from PIL import Image

from checkpoints import holds_run
from data import read_cifar10_batch, set_up_data
from errors import UserError
from file_kinds import kind_of, not_regular, what_file
from files import read_json
from hps import get_hparams
from image_files import open_npy
from optimizers import restore_optimizer
from torch_files import read_torch_file
from vae import VAE
from weights import check_weights, load_model, read_weights


def tiny():
    H = get_hparams("digits")
    options = [option.removeprefix("--").split("=") for option in tiny_network(8)]
    H.update({name: type(H[name])(value) for name, value in options})
    return VAE(H)


def written(path, content):
    path.write_bytes(content)
    return path


def tar_of(content):
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        member = tarfile.TarInfo("model.th")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    return data.getvalue()


def zip_of(**members):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, content in members.items():
            archive.writestr(name.replace("__", "."), content)
    return data.getvalue()


def npz():
    data = io.BytesIO()
    np.savez(data, z000=np.zeros(3))
    return data.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
KINDS = {
    "lfs": (LFS, "a git-lfs pointer, not the file itself", "git lfs pull"),
    "page": (b"\n <!DOCTYPE html><html>sign in", "a web page", "fetch the file itself"),
    "xml": (b"<?xml version='1.0'?><Error>AccessDenied", "a web page", "fetch"),
    "json": (b'{"step": 3}', "JSON", "name a model.th"),
    "list": (b" [1, 2]", "JSON", "name a model.th"),
    "tar": (tar_of(b"x" * 3000), "a tar archive", "unpack it"),
    "gzip": (gzip.compress(b"x" * 100), "compressed by gzip", "unpack it"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(99), "compressed by zstd", "unpack it"),
    "text": ("step 3\nпотеря 2.5".encode(), "text", "name a model.th"),
    "empty": (b"", "empty", "name a model.th"),
    "npz": (npz(), "an .npz file", "name a model.th"),
    "zip": (zip_of(a__txt="x", b__txt="y"), "a zip archive of a.txt, b.txt", "name a model.th"),
    "zeros": (bytes(2000), "zero bytes and nothing else", "fetch it anew"),
    "cut": (zip_of(a__pkl=bytes(99))[:-30], "a zip archive without its end", "fetch it anew"),
    "hdf": (b"\x89HDF\r\n\x1a\n" + bytes(99), "an HDF5 file", "name a"),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_file_of_another_kind_says_what_it_is(tmp_path, name):
    content, kind, remedy = KINDS[name]
    path = written(tmp_path / "m.th", content)
    assert what_file(path)[0] == kind
    vae = tiny()
    optimizer = torch.optim.AdamW(vae.parameters())
    for use in (
        read_torch_file,
        read_weights,
        load_model,
        lambda p: restore_optimizer(optimizer, p),
    ):
        with pytest.raises(UserError) as error:
            use(str(path))
        line = str(error.value)
        assert f"it is {kind}" in line and remedy in line and "\n" not in line


def test_bytes_that_tell_nothing():
    assert kind_of(bytes(range(128, 256))) is None
    assert kind_of(b"\x80\x02}q\x00.") is None  # a pickle


def test_a_broken_safetensors_file(tmp_path):
    """Weights may be such files; an optimizer's state may not."""
    path = written(tmp_path / "m.th", (9).to_bytes(8, "little") + b'{"a":{}}  ')
    assert what_file(path)[0] == "a safetensors file"
    with pytest.raises(UserError, match="no complete safetensors file .*fetch it anew"):
        read_weights(path)
    with pytest.raises(UserError, match="it is a safetensors file"):
        restore_optimizer(torch.optim.AdamW(tiny().parameters()), str(path))


def test_letters_that_are_cut():
    assert kind_of("ä".encode() * 600)[:4] == "text"  # cut within a letter
    assert kind_of("ä".encode()[:1] * 3) is None


def test_classes_are_named(tmp_path):
    import argparse

    torch.save({"args": argparse.Namespace(lr=1), "model": {}}, tmp_path / "m.th")
    with pytest.raises(UserError, match=r"argparse.Namespace, not tensors alone, which could run"):
        read_weights(tmp_path / "m.th")
    torch.save(tiny(), tmp_path / "m.th")
    with pytest.raises(UserError, match=r"the class vae\.VAE"):
        read_weights(tmp_path / "m.th")


def test_foreign_bytes_are_not_called_objects(tmp_path):
    """As of ONNX, of another pickle protocol, of MessagePack: nothing in them could run."""
    for content in (b"\x08\x07\x12\x07pytorch", pickle.dumps({"a": 1}), b"\x83\xa6params\x80"):
        path = written(tmp_path / "m.th", content + bytes(99))
        with pytest.raises(UserError, match="it is none that torch.save wrote") as error:
            read_torch_file(path)
        assert "run code" not in str(error.value)


def test_what_stands_in_for_a_file_is_not_opened(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "m.th")
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("s.th")
        for path, kind in (("m.th", "a FIFO"), ("s.th", "a socket"), ("/dev/zero", "a device")):
            assert not_regular(path) == kind
            with pytest.raises(UserError, match=f"{path} is {kind}"):
                read_torch_file(path)
    os.mkfifo(tmp_path / "a.npy")
    os.mkfifo(tmp_path / "images.json")
    os.mkfifo(tmp_path / "log.jsonl")
    for open_it in (
        lambda: set_up_data(own_H(tmp_path / "a.npy", 8)),
        lambda: open_npy(tmp_path / "a.npy", (9, 8, 8, 3), "name another"),
        lambda: read_cifar10_batch(tmp_path / "a.npy"),
        lambda: read_json(tmp_path / "images.json"),
    ):
        with pytest.raises(UserError, match="it is a FIFO"):
            open_it()
    assert not holds_run(tmp_path)  # what its log.jsonl is, is said when it is to be written
    written(tmp_path / "b.npy", LFS)
    with pytest.raises(UserError, match="git lfs pull"):
        set_up_data(own_H(tmp_path / "b.npy", 8))


def test_weights_and_optimizers_taken_for_each_other(tmp_path):
    vae = tiny()
    optimizer = torch.optim.AdamW(vae.parameters())
    torch.save(optimizer.state_dict(), tmp_path / "opt.th")
    torch.save(vae.state_dict(), tmp_path / "model.th")
    torch.save({"epoch": 3, "state_dict": vae.state_dict()}, tmp_path / "nested.th")
    with pytest.raises(UserError, match="an optimizer's state: give it with --restore_optimizer"):
        read_weights(tmp_path / "opt.th")
    with pytest.raises(UserError, match="it holds weights, which --restore_path"):
        restore_optimizer(optimizer, tmp_path / "model.th")
    with pytest.raises(UserError, match="a dict of epoch, state_dict: save what is under 'state_d"):
        read_weights(tmp_path / "nested.th")


@pytest.mark.parametrize(
    "prefixes",
    ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module.",
     "_orig_mod._orig_mod.module._fsdp_wrapped_module."],
)  # fmt: skip
def test_names_that_wrappers_put_before_others(tmp_path, prefixes):
    vae = tiny()
    state = vae.state_dict()
    torch.save({prefixes + name: t for name, t in state.items()}, tmp_path / "m.th")
    read = read_weights(tmp_path / "m.th")
    assert list(read) == list(state)
    check_weights(vae, read, "m.th")
    # Blocks that were compiled one by one.
    inner = {
        name.replace("dec_blocks.0.", "dec_blocks.0._orig_mod."): t for name, t in state.items()
    }
    torch.save(inner, tmp_path / "m.th")
    assert list(read_weights(tmp_path / "m.th")) == list(state) != list(inner)
    assert list(read_weights(tmp_path / "m.th", map_ddp=False)) == list(inner)
    first = next(iter(state))
    torch.save(state | {f"module.{first}": state[first]}, tmp_path / "m.th")
    with pytest.raises(UserError, match="twice"):
        read_weights(tmp_path / "m.th")


ODD = {
    "meta": (lambda t: t.to("meta"), "on the device meta"),
    "sparse": (lambda t: t.to_sparse(), "of the layout sparse_coo"),
    "quantized": (lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8), "quantized"),
    "complex": (lambda t: t.to(torch.complex64), "of the type complex64"),
    "float8": (lambda t: t.to(torch.float8_e4m3fn), "of the type float8_e4m3fn"),
    "nested": (lambda t: torch.nested.nested_tensor([t]), "nested"),
    "text": (lambda t: "text", "of the type str"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ODD)
def test_odd_tensors_are_one_line(tmp_path, name):
    change, words = ODD[name]
    vae = tiny()
    state = vae.state_dict()
    last = list(state)[-1]
    torch.save(state | {last: change(state[last])}, tmp_path / "m.th")
    with pytest.raises(UserError) as error:
        load_model(tmp_path / "m.th", vae.H)
    allowed = words if name != "nested" else ("nested", "complete checkpoint")
    assert any(word in str(error.value) for word in np.atleast_1d(allowed))

    optimizer = torch.optim.AdamW(vae.parameters())
    for p in vae.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for key in ("exp_avg", "exp_avg_sq", "step"):
        content = optimizer.state_dict()
        content["state"][0] = content["state"][0] | {key: change(content["state"][0][key])}
        torch.save(content, tmp_path / "opt.th")
        if key == "step" and name in ("complex", "sparse", "float8", "quantized"):
            continue  # a number all the same, or of no layout that a scalar can have
        with pytest.raises(UserError) as error:
            restore_optimizer(torch.optim.AdamW(vae.parameters()), tmp_path / "opt.th")
        assert "\n" not in str(error.value)


def test_a_picture_named_as_weights(tmp_path):
    Image.fromarray(noise(1, 8)[0]).save(tmp_path / "m.th", "PNG")
    with pytest.raises(UserError, match="it is a PNG picture"):
        read_torch_file(tmp_path / "m.th")


def test_a_log_is_not_weights(tmp_path):
    (tmp_path / "log.jsonl").write_text("".join(json.dumps({"step": i}) + "\n" for i in range(99)))
    with pytest.raises(UserError, match="it is JSON"):
        read_weights(tmp_path / "log.jsonl")
