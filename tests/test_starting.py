"""What a run starts from: --init_from, an EMA file alone, the mean and std of the weights."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import SMALL, Run, check_latest, events

import data
from errors import UserError
from options import Hyperparams
from presets import get_hparams
from train_helpers import load_vaes
from vae import VAE
from weights import load_model

NETWORK = SMALL[SMALL.index("--width") : SMALL.index("--n_batch")]


def run(tmp_path, *argv, **options):
    status, text = Run([*SMALL, "--save_dir", tmp_path, *argv], tmp_path / "out", **options).wait()
    assert "Traceback" not in text
    return status, text


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """The folder of a finished run whose EMA is far better than random weights."""
    folder = tmp_path_factory.mktemp("first")
    more = "--num_epochs 12 --lr 0.01 --ema_rate 0.8 --epochs_per_eval 12 --desc a".split()
    assert run(folder, *more)[0] == 0
    return folder / "a"


def lines(folder, kind):
    return [e for e in events(folder) if e.get("type") == kind]


def same_weights(a, b):
    a, b = (torch.load(path, weights_only=True) for path in (a, b))
    return a.keys() == b.keys() and all(map(torch.equal, a.values(), b.values()))


def test_init_from_is_a_new_training_that_starts_where_the_weights_are(first, tmp_path):
    """From a run's folder, its best EMA; step, warm-up and optimizer are new."""
    figure = lines(first, "eval_loss")[-1]["bits_per_dim"]
    more = ["--init_from", first, "--warmup_iters", "1e9", "--num_epochs", "1"]
    status, text = run(tmp_path, *more)
    assert status == 0 and f"weights and EMA from {first / 'best-model-ema.th'}" in text
    steps = lines(tmp_path / "test", "train_loss")
    assert steps[0]["step"] == 1 and steps[0]["lr"] < 1e-9
    [evaluated] = lines(tmp_path / "test", "eval_loss")
    # Nothing has moved at this learning rate: weights and EMA are still the file's.
    assert evaluated["bits_per_dim"] == pytest.approx(figure, abs=1e-4)
    assert steps[0]["bits_per_dim"] == pytest.approx(figure, abs=0.1)
    state = torch.load(tmp_path / "test" / "latest-opt.th", weights_only=True)["state"]
    assert {int(s["step"]) for s in state.values()} == {13}


def test_init_from_takes_a_file_too_and_resume_ignores_it(first, tmp_path):
    file = tmp_path / "own name.th"
    shutil.copy(first / "latest-model.th", file)
    more = ["--init_from", file, "--resume"]
    assert run(tmp_path, *more, "--num_epochs", "1")[0] == 0
    file.unlink()  # a later start needs it no more
    status, text = run(tmp_path, *more, "--num_epochs", "2")
    assert status == 0 and "resuming from" in text and "a new training" not in text
    assert check_latest(tmp_path / "test") == 26


@pytest.mark.parametrize("other", ["restore_path", "restore_ema_path", "restore_optimizer_path"])
def test_init_from_beside_restore_is_refused(other, first, tmp_path):
    status, text = run(tmp_path, "--init_from", first, f"--{other}", first / "latest-model.th")
    assert status == 2 and f"--{other} goes on with one" in text.splitlines()[-1]
    assert not (tmp_path / "test").exists()


def test_init_from_a_folder_without_weights_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    status, text = run(tmp_path, "--init_from", tmp_path / "empty")
    assert status == 2 and "best-model-ema.th" in text and len(text.splitlines()) == 1


def test_an_ema_file_alone_starts_both(first, tmp_path):
    """Released checkpoints have at times no other: formerly a random network trained under it."""
    ema = first / "latest-model-ema.th"
    status, text = run(tmp_path, "--restore_ema_path", ema, "--num_epochs", "1")
    assert status == 0 and f"restoring weights and EMA from {ema}: no --restore_path" in text
    figure = lines(first, "eval_loss")[-1]["bits_per_dim"]
    assert lines(tmp_path / "test", "train_loss")[0]["bits_per_dim"] < figure + 0.1
    # An evaluation needs the EMA alone.
    status, text = run(tmp_path, "--restore_ema_path", ema, "--test_eval", "--desc", "tested")
    assert status == 0 and "restoring EMA weights" in text and "weights and EMA" not in text


def test_load_vaes_starts_both_from_the_ema_in_a_program_too(first):
    H = Hyperparams(get_hparams("digits", restore_ema_path=str(first / "latest-model-ema.th")))
    options = dict(zip(NETWORK[::2], NETWORK[1::2], strict=True))
    H.update({k[2:]: type(H[k[2:]])(v) for k, v in options.items()}, device="cpu", mpi_size=1)
    vae, ema = load_vaes(H, lambda *_: None)
    assert all(map(torch.equal, vae.module.parameters(), ema.parameters()))


# ---- mean and std --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Two sets of own images of other means, 8 pixels; a run on the first: (folder, facts)."""
    folder = tmp_path_factory.mktemp("own")
    rng = np.random.RandomState(0)
    for name, top in (("dark", 90), ("light", 250)):
        np.save(folder / f"{name}.npy", rng.randint(0, top, (60, 8, 8, 3), dtype=np.uint8))
    argv = ["--dataset", "images", "--data_root", folder / "dark.npy", "--n_batch", "20"]
    assert run(folder, *argv, "--num_epochs", "1", "--desc", "dark")[0] == 0
    return folder, json.loads((folder / "dark" / "images.json").read_text())


def on_light(own, tmp_path, *argv):
    """The record that a run on the light images has, started as argv says, and its output."""
    root = ["--dataset", "images", "--data_root", own[0] / "light.npy", "--n_batch", "20"]
    status, text = run(tmp_path, *root, "--num_epochs", "1", *argv)
    assert status == 0, text
    return json.loads((tmp_path / "test" / "images.json").read_text()), text


@pytest.mark.parametrize("option", ["--init_from", "--restore_path"])
def test_mean_and_std_come_from_images_json_then_from_state_json(option, own, tmp_path):
    folder, dark = own
    record, text = on_light(own, tmp_path, option, folder / "dark" / "latest-model.th")
    assert (record["mean"], record["std"]) == (dark["mean"], dark["std"])
    assert f"(level - {dark['mean']:.5g}) / {dark['std']:.5g}, mean and std: " in text
    assert f"{folder / 'dark' / 'images.json'}" in text

    alone = tmp_path / "alone"  # with state.json, but without images.json
    alone.mkdir()
    for name in ("model.th", "state.json"):
        shutil.copy(folder / "dark" / f"latest-{name}", alone / f"latest-{name}")
    record, text = on_light(own, tmp_path, option, alone / "latest-model.th", "--overwrite")
    assert (record["mean"], record["std"]) == (dark["mean"], dark["std"])
    assert f"mean and std: {alone / 'latest-state.json'}" in text
    model = load_model(alone / "latest-model.th", device="cpu")  # sample.py sees the same
    assert (model.H.image_mean, model.H.image_std) == (dark["mean"], dark["std"])


def test_mean_and_std_of_a_run_on_another_data_set(first, own, tmp_path):
    """Its state.json names the data set, whose facts are known; sample.py says the same."""
    record, text = on_light(own, tmp_path, "--init_from", first)
    assert record["mean"] == 78.04011 and "the facts of digits, as " in text
    model = load_model(tmp_path / "test" / "latest-model-ema.th", device="cpu")
    assert model.H.image_mean == 78.04011


def test_weights_of_nothing_known_are_measured_for(first, own, tmp_path):
    shutil.copy(first / "latest-model.th", tmp_path / "unknown.th")
    record, text = on_light(own, tmp_path, "--init_from", tmp_path / "unknown.th")
    assert record["mean"] == pytest.approx(124.5, abs=2) and "measured on" in text


def test_a_published_presets_weights_on_own_images(tmp_path):
    """By their shapes alone they are known as the preset's, to training and to sample.py."""
    H = get_hparams("digits")
    torch.save(VAE(H).state_dict(), tmp_path / "w.th")
    np.save(tmp_path / "a.npy", np.random.RandomState(0).randint(0, 9, (30, 8, 8, 3), np.uint8))
    for option in ("init_from", "restore_path", "restore_ema_path"):
        own = Hyperparams(H, dataset="images", data_root=str(tmp_path / "a.npy"), device="cpu")
        own.update(image_size=8, logdir=None, **{option: str(tmp_path / "w.th")})
        data.set_up_data(own)
        assert (own.image_mean, own.image_std) == (78.04011, 95.98312), option
        assert "the facts of digits, of whose preset" in own.normalisation[2]
    own.dataset, own.hparam_sets = "images", "digits"
    model = load_model(tmp_path / "w.th", own, "cpu")
    assert (model.H.image_mean, model.H.image_std) == (78.04011, 95.98312)


def test_the_normalisation_stays_with_weights_on_a_published_data_set(own, tmp_path):
    """A fine-tuning of own weights on digits is fed as they were, also after a resume."""
    folder, dark = own
    argv = ["--init_from", folder / "dark", "--resume", "--n_batch", "100"]
    for epochs in "12":
        status, text = run(tmp_path, *argv, "--num_epochs", epochs)
        assert status == 0 and f"(level - {dark['mean']:.5g})" in text, text
    model = load_model(tmp_path / "test" / "latest-model-ema.th", device="cpu")
    assert model.H.dataset == "digits" and model.H.image_mean == dark["mean"]
    argv = ["--test_eval", "--restore_ema_path", tmp_path / "test" / "best-model-ema.th"]
    status, text = run(tmp_path, *argv)
    assert status == 0 and f"(level - {dark['mean']:.5g})" in text


def test_digits_weights_under_restore_keep_the_facts_of_the_data_set(first, tmp_path):
    """As in the original: --restore_* goes on with that training."""
    H = Hyperparams(get_hparams("digits"), restore_path=str(first / "latest-model.th"))
    H.update(device="cpu")
    assert data.set_up_data(H)[0].image_mean is None


def test_a_damaged_state_is_no_reason_to_refuse_a_named_network(first, tmp_path):
    for name in ("model-ema.th", "state.json"):
        shutil.copy(first / f"latest-{name}", tmp_path / f"latest-{name}")
    Path(tmp_path, "latest-state.json").write_text("{")
    with pytest.raises(UserError, match="latest-state.json does not tell"):
        load_model(tmp_path / "latest-model-ema.th")
