"""One file to share: exported, opened anywhere, the same model; what does not fit is refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from fakes import arr_0, noise, tiny_network, write_released, write_sample_folder
from PIL import Image
from runs import SMALL, Run, log_of, sample_in
from safetensors.torch import load_file, save_file

from errors import UserError
from image_sets import IMAGE_SETS
from safetensors_files import metadata_of
from weights import load_model, weights_hash


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run's folder with an evaluation on each set, and its weights as one file elsewhere."""
    folder = tmp_path_factory.mktemp("trained")
    place = ["--save_dir", folder, "--desc", "test"]
    status, text = Run([*SMALL, *place], folder / "out").wait()
    assert status == 0, text
    weights = folder / "test" / "latest-model-ema.th"
    evaluation = [*SMALL, *place, "--test_eval", "--restore_ema_path", weights]
    status, text = Run(evaluation, folder / "out").wait()
    assert status == 0, text
    return folder / "test"


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    """run("export"): sample.py in this process, in a folder of its own."""
    return sample_in(trained, tmp_path, monkeypatch)


def rewritten(path, new, change):
    """The file of safetensors `path` as `new`, its metadata changed by a function."""
    content = change(metadata_of(path))
    save_file(
        load_file(path), new, {"vdvae": content if type(content) is str else json.dumps(content)}
    )
    return str(new)


def figures_of(text):
    line = next(line for line in text.splitlines() if "type: test_loss" in line)
    return line.partition("type: test_loss")[2].partition(", time")[0]


def test_an_exported_model_is_the_same_and_needs_nothing_beside_it(run, trained, tmp_path):
    weights = str(trained / "latest-model-ema.th")
    run("export", weights)
    (tmp_path / "away").mkdir()
    one = str(shutil.move("model.safetensors", tmp_path / "away" / "a name of any kind"))
    before, after = load_model(weights, device="cpu"), load_model(one, device="cpu")
    assert weights_hash(before) == weights_hash(after)
    for key in "enc_blocks dec_blocks width zdim dataset image_size image_channels".split():
        assert before.H[key] == after.H[key]
    assert before.H.label_names == after.H.label_names
    assert np.array_equal(before.forward_uncond_samples(4, generators=None, mean=True, t=0),
                          after.forward_uncond_samples(4, mean=True, t=0))  # fmt: skip
    run("samples --n 5 --out a.npz", weights)
    run("samples --n 5 --out b.npz", one)
    assert np.array_equal(arr_0("a.npz"), arr_0("b.npz"))
    run("export --out again.safetensors", one)
    assert metadata_of("again.safetensors") == metadata_of(one)
    # An unfinished output goes on, latents are known.
    run("samples --n 3 --n_batch 2 --out pngs", weights)
    run("samples --n 5 --n_batch 2 --out pngs", one)
    # And so does an evaluation.
    place = ["--save_dir", tmp_path / "runs", "--desc", "test", "--test_eval"]
    said = []
    for path in (weights, one):
        status, text = Run([*SMALL, *place, "--restore_ema_path", path], tmp_path / "out").wait()
        assert status == 0, text
        said.append(figures_of(text))
    assert said[0] == said[1]


def test_what_it_tells(run, trained):
    run("export", str(trained / "latest-model-ema.th"))
    content = metadata_of("model.safetensors")
    assert content["format"] == 1 and content["preset"] == "digits"
    assert content["hparams"]["dec_blocks"] == "1x1,8m1" and content["hparams"]["width"] == 8
    assert (content["mean"], content["std"]) == IMAGE_SETS["digits"][1:3]
    assert content["images"] is None
    events = log_of(trained)
    for name, kind, n in (("validation", "eval_loss", 200), ("test", "test_loss", 200)):
        event = [event for event in events if event.get("type") == kind][-1]
        figures = content["figures"][name]
        assert figures["bits_per_dim"] == event["bits_per_dim"] and figures["n_images"] == n
        assert figures["step"] == 39 and figures["split"] == name
        assert figures["iw_bits_per_dim"] is None and figures["labels"] == event.get("labels")
    # Other weights of the run were not those that the test set saw.
    run("export --out other.safetensors", str(trained / "latest-model.th"))
    assert metadata_of("other.safetensors")["figures"] == {"validation": None, "test": None}
    model = load_model("model.safetensors", device="cpu")
    tensors = load_file("model.safetensors")
    assert tensors.keys() == model.state_dict().keys()
    assert {t.dtype for t in tensors.values()} == {torch.float32}


def test_a_file_of_before_and_a_foreign_one(tmp_path, monkeypatch):
    """Weights without a run beside them; tensors that another program has saved."""
    folder = tmp_path / "source"
    folder.mkdir()
    write_sample_folder(folder)
    (tmp_path / "here").mkdir()
    run = sample_in(folder, tmp_path / "here", monkeypatch)
    run("export")
    content = metadata_of("model.safetensors")
    assert content["preset"] == "digits" and content["figures"] == {
        "validation": None,
        "test": None,
    }
    state = torch.load("ema.th")
    save_file({f"module.{k}": t.half() for k, t in state.items()}, "foreign.safetensors")
    model = load_model("foreign.safetensors", device="cpu")
    assert model.H.hparam_sets == "digits"
    assert torch.equal(model.decoder.gain, state["decoder.gain"].half().float())
    # Half of the numbers, the same hash: what counts are the values.
    torch.save({k: t.half() for k, t in state.items()}, "half.th")
    assert weights_hash(load_model("half.th", device="cpu")) == weights_hash(model)


def test_released_weights_are_exported(tmp_path, monkeypatch):
    """In the released layouts, with `module.` before each name or without, and nothing beside."""
    for name in ("source", "here"):
        (tmp_path / name).mkdir()
    prefix = "cifar10-seed0-iter-900000"
    write_released(str(tmp_path / "source" / prefix), "cifar10")
    run, network = sample_in(tmp_path / "source", tmp_path / "here", monkeypatch), tiny_network(32)
    options = " ".join(["--hps cifar10", *network])
    for name in ("model", "model-ema"):
        run(f"{options} export --out {name}.safetensors", f"{prefix}-{name}.th")
        content = metadata_of(f"{name}.safetensors")
        assert content["preset"] == "cifar10" and content["hparams"]["width"] == 4
        assert (content["mean"], content["std"]) == IMAGE_SETS["cifar10"][1:3]
        assert content["label_names"] is None and content["images"] is None
        run(f"{options} samples --n 3 --out {name}-a.npz", f"{prefix}-{name}.th")
        run(f"samples --n 3 --out {name}-b.npz", f"{name}.safetensors")
        assert np.array_equal(arr_0(f"{name}-a.npz"), arr_0(f"{name}-b.npz"))


def test_what_does_not_fit_is_refused_in_one_line(run, trained, tmp_path):
    run("export", str(trained / "latest-model-ema.th"))
    path = "model.safetensors"
    hparams = metadata_of(path)["hparams"]
    for change, words in (
        (lambda c: c | {"format": 2}, "format 2, newer than 1"),
        (lambda c: c | {"format": "new"}, "can't be read .*export its model anew"),
        (lambda c: {}, "can't be read"),
        (lambda c: "no JSON", "can't be read"),
        (lambda c: c | {"hparams": hparams | {"zdim": 3}}, "not the one that its metadata tell"),
        (lambda c: c | {"hparams": hparams | {"dec_blocks": "none"}}, "metadata that tell no net"),
        (lambda c: c | {"hparams": None}, "metadata that tell no network"),
        (lambda c: c | {"mean": "x", "std": 1}, "metadata that tell no network"),
        (lambda c: c | {"std": 0}, "metadata that tell no network"),
        (lambda c: c | {"label_names": ["a", "b"]}, "metadata that tell no network"),
        (lambda c: c | {"label_names": "0123456789"}, "metadata that tell no network"),
        (lambda c: c | {"preset": 3}, "metadata that tell no network"),
        (lambda c: c | {"images": {"mean": "x", "std": 1}}, "metadata that tell no network"),
    ):
        new = rewritten(path, tmp_path / "changed.safetensors", change)
        with pytest.raises(UserError, match=words) as error:
            load_model(new, device="cpu")
        assert "changed.safetensors" in str(error.value) and "\n" not in str(error.value)
    load_model(rewritten(path, "more.safetensors", lambda c: c | {"later": [1]}), device="cpu")
    data = (tmp_path / path).read_bytes()
    for name, part in (("cut", data[:-9]), ("short", data[:100])):
        (tmp_path / name).write_bytes(part)
        with pytest.raises(UserError, match=f"{name} is no complete safetensors file"):
            load_model(name, device="cpu")
    for line, words in (
        ("export", "model.safetensors exists already"),
        ("export --out m.th", "a model goes to NAME.safetensors"),
    ):
        with pytest.raises(UserError, match=words):
            run(line, str(trained / "latest-model-ema.th"))


def test_a_training_starts_from_it(run, trained, tmp_path):
    run("export", str(trained / "latest-model-ema.th"))
    argv = [*SMALL, "--save_dir", tmp_path / "runs", "--desc", "test", "--init_from"]
    status, text = Run([*argv, "model.safetensors", "--num_epochs", 1], tmp_path / "out",
                       cwd=str(tmp_path)).wait()  # fmt: skip
    assert status == 0 and "weights and EMA from model.safetensors" in text, text


OWN = (
    "--hps images32 --device cpu --width 8 --zdim 2 --n_batch 4 --enc_blocks 16x1,16d4,4x1 "
    "--dec_blocks 4x1,16m4 --no_bias_above 16 --bottleneck_multiple 0.5 --image_size 16 "
    "--num_images_visualize 1 --num_variables_visualize 0 --num_temperatures_visualize 1"
).split()


def test_the_record_of_own_images_goes_with_it(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    photos = tmp_path / "photos"
    photos.mkdir()
    for i, image in enumerate(noise(40, 16)):
        Image.fromarray(image).save(photos / f"secret{i:02}.png")
    place = ["--data_root", photos, "--save_dir", tmp_path / "runs"]
    environ = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    argv = [*OWN, *place, "--desc", "own", "--num_epochs", 1]
    status, text = Run(argv, tmp_path / "out", environ=environ).wait()
    assert status == 0, text
    (tmp_path / "here").mkdir()
    run = sample_in(tmp_path / "runs" / "own", tmp_path / "here", monkeypatch)
    run("export", "latest-model-ema.th")
    run("export --with_names --out named.safetensors", "latest-model-ema.th")
    bare, named = (metadata_of(name) for name in ("model.safetensors", "named.safetensors"))
    kept = json.loads((tmp_path / "here" / "images.json").read_text())
    assert named["images"] == kept and len(kept["files"]) == 40
    assert bare["images"] == {k: v for k, v in kept.items() if k != "files"}
    assert b"secret" not in (tmp_path / "here" / "model.safetensors").read_bytes()
    assert (bare["mean"], bare["std"]) == (kept["mean"], kept["std"])
    # Elsewhere: the same split, the same figures; and without a record a word on it.
    (tmp_path / "away").mkdir()
    for name in ("model", "named"):
        shutil.move(f"{name}.safetensors", tmp_path / "away")
    rewritten(tmp_path / "away" / "model.safetensors", tmp_path / "away" / "none.safetensors",
              lambda c: c | {"images": None})  # fmt: skip
    said, new = [], "the split is a new one"
    for name in ("runs/own/latest-model-ema.th", "away/model.safetensors", "away/none.safetensors"):
        argv = [*OWN, *place, "--desc", "eval", "--test_eval", "--restore_ema_path"]
        status, text = Run([*argv, tmp_path / name], tmp_path / "out", environ=environ).wait()
        assert status == 0, text
        assert (new in text) == ("none" in name)
        said.append(figures_of(text))
    assert said[0] == said[1]
