"""Files of weights, ours and released: layouts, formats, what is refused how; models opened."""

import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from fakes import Hostile, write_digits_run, write_sample_folder
from golden import inputs, model
from runs import ROOT, environment

from batches import preprocess
from errors import UserError
from hps import get_hparams
from torch_files import read_torch_file
from train_helpers import restore_params
from vae import VAE
from weights import load_model


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


# ---- damaged and hostile files ---------------------------------------------------------------


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
    hostile = Hostile(str(tmp_path / "made"))
    torch.save({"w": hostile}, tmp_path / "m.th", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="could run code"):
        read_torch_file(str(tmp_path / "m.th"))
    (tmp_path / "p.th").write_bytes(pickle.dumps(hostile))
    with pytest.raises(UserError):
        read_torch_file(str(tmp_path / "p.th"))
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("content", [[1, 2], {}, {"a": 1}, {"a": torch.zeros(1), "b": "text"}])
def test_files_that_hold_no_state_dict(content, tmp_path):
    torch.save(content, tmp_path / "m.th")
    H, vae = model("tiny")
    with pytest.raises(UserError, match="no state dict|none of the presets"):
        restore_params(vae, str(tmp_path / "m.th"), 0, 1)


# ---- load_model ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """ema.th, the weights of the preset digits."""
    return write_sample_folder(tmp_path_factory.mktemp("weights"))


@pytest.fixture
def other_run(tmp_path):
    """A run's folder whose weights have the shapes of the preset digits, but not its blocks."""
    return write_digits_run(tmp_path / "run")


def test_a_model_needs_no_data_no_mpi_no_argv(folder):
    code = (
        "import sys\n"
        "for name in ('mpi4py', 'sklearn', 'apex', 'matplotlib'):\n"
        "    sys.modules[name] = None\n"
        "from train_helpers import load_model\n"
        "model = load_model('ema.th')\n"
        "assert model.H.hparam_sets == 'digits' and not model.training\n"
        "assert not any(p.requires_grad for p in model.parameters())\n"
    )
    argv = [sys.executable, "-c", code, "--no_such_option"]
    env = environment(PYTHONPATH=str(ROOT))
    done = subprocess.run(argv, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr


def test_load_model_takes_a_preset_or_hyperparameters(folder):
    path = str(folder / "ema.th")
    one, two = load_model(path, "digits", "cpu"), load_model(path, get_hparams("digits"))
    assert all(map(torch.equal, one.parameters(), two.parameters()))
    assert load_model(folder / "ema.th", device=torch.device("cpu")).H.device == "cpu"
    with pytest.raises(UserError, match="digits"):
        load_model(path, "photos32")


def test_a_network_is_what_its_run_has_recorded(other_run, tmp_path):
    """The shapes alone would tell of the preset, and other pictures come of its order of blocks."""
    (tmp_path / "link.th").symlink_to(other_run / "latest-model-ema.th")
    paths = [other_run / "latest-model-ema.th", other_run / "latest-model.th"]
    paths += [*other_run.glob("sets/0*/model-ema.th"), tmp_path / "link.th"]
    assert len(paths) == 4
    for path in paths:
        H = load_model(str(path)).H
        assert (H.dec_blocks, H.dataset) == ("1x1,4m1,4x3,8m4,8x1", "images")
        assert (H.image_size, H.image_mean, H.image_std) == (8, 70.0, 90.0)
        assert H.hparam_sets == "digits"
    assert load_model(str(paths[0]), "digits").H.dec_blocks == get_hparams("digits").dec_blocks
    # Away from its run nothing but the shapes is left.
    alone = tmp_path / "latest-model-ema.th"
    alone.write_bytes(paths[0].read_bytes())
    assert load_model(str(alone)).H.dataset == "digits"


def _own_digits():
    return get_hparams("digits", dataset="images", image_size=8, image_channels=1, n_labels=10)


def test_own_images_are_normalized_as_images_json_says(other_run):
    """Beside the weights it counts more than what the run has recorded, or the preset."""
    (other_run / "images.json").write_text('{"mean": 100.0, "std": 50.0}')
    images = np.full((1, 8, 8, 3), 125, np.uint8)
    for hps in (None, _own_digits()):
        model = load_model(str(other_run / "latest-model-ema.th"), hps)
        assert preprocess(images, model.H)[0].unique().tolist() == [0.5]
    (other_run / "images.json").write_text('{"mean": 100.0}')
    with pytest.raises(UserError, match="images.json lacks"):
        load_model(str(other_run / "latest-model-ema.th"))


def test_a_state_that_tells_of_no_network_is_refused(other_run):
    path, state = other_run / "latest-model-ema.th", other_run / "latest-state.json"
    whole = state.read_text()
    hparams = json.loads(whole)["hparams"]
    contents = [whole[:-20], "", "{}", "[1]", '{"hparams": 3}', b"\xff\x00"]
    changes = [{"dataset": "mnist"}, {"width": "48"}, {"zdim": 1.5}, {"dec_blocks": "1x2,8q3"}]
    contents += [json.dumps({"hparams": hparams | change}) for change in changes]
    for content in contents:
        state.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(UserError, match="latest-state.json does not tell .*--hps") as error:
            load_model(str(path))
        assert "\n" not in str(error.value)
        assert load_model(str(path), "digits").H.dataset == "digits"
    state.write_text(json.dumps({"hparams": hparams | {"zdim": 4}}))
    words = "holds the digits model, not the one that the run beside it has recorded.*--hps digits"
    with pytest.raises(UserError, match=words):
        load_model(str(path))
