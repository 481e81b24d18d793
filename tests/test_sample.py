"""sample.py: its commands as a user runs them."""

import json

import numpy as np
import pytest
import torch
from fakes import arr_0, nearly_equal, write_digits_run

from errors import UserError
from hps import get_hparams
from vae import VAE
from weights import load_model


def test_samples_belong_to_their_index(run):
    run("samples --n 10 --n_batch 4 --out a.npz --temperature 0.8 --seed 3")
    a = arr_0("a.npz")
    assert a.shape == (10, 8, 8, 1) and a.dtype == np.uint8
    run("samples --n 7 --n_batch 7 --out b.npz --temperature 0.8 --seed 3")
    assert nearly_equal(arr_0("b.npz"), a[:7])
    run("samples --n 7 --out c.npz --temperature 0.8 --seed 4")
    assert not nearly_equal(arr_0("c.npz"), a[:7])
    run("samples --n 7 --out d.npz --temperature 1:0.8,4:0.8,8:0.8 --seed 3")
    assert nearly_equal(arr_0("d.npz"), a[:7])
    run("samples --n 7 --out e.npz --temperature 1:0.8,4:0.8 --seed 3")
    run("samples --n 7 --out f.npz --temperature 1:0.8,4:0.8,8:1 --seed 3")
    assert not nearly_equal(arr_0("e.npz"), a[:7]) and np.array_equal(
        arr_0("e.npz"), arr_0("f.npz")
    )


def test_the_mean_of_the_mixture_has_no_noise_of_pixels(run):
    run("reconstruct a.png b.jpg --mean --out m1.npz")
    run("reconstruct a.png b.jpg --mean --out m2.npz")
    run("reconstruct a.png b.jpg --out s.npz")
    run("encode a.png b.jpg")
    run("decode latents.npz --mean --seed 5 --out m3.npz")  # the same latents, another seed
    assert np.array_equal(arr_0("m1.npz"), arr_0("m2.npz"))
    assert np.array_equal(arr_0("m1.npz"), arr_0("m3.npz"))
    assert not nearly_equal(arr_0("m1.npz"), arr_0("s.npz"))


def test_latents_of_other_weights_are_noted(run, tmp_path, capsys):
    run("encode a.png")
    run("decode latents.npz")
    assert "other weights" not in capsys.readouterr().err
    state = torch.load(tmp_path / "ema.th")
    state["decoder.gain"] += 1
    torch.save(state, tmp_path / "other.th")
    run("decode latents.npz --out other.png", weights="other.th")
    assert "latents.npz was encoded with other weights" in capsys.readouterr().err


def test_encode_and_decode_are_reconstruct(run):
    """Byte for byte: both draw an image's latents, and then its pixels, from the same noise."""
    run("reconstruct a.png b.jpg --out r.npz")
    run("encode a.png b.jpg --gaussians")
    run("decode latents.npz --out d.npz")
    assert np.array_equal(arr_0("r.npz"), arr_0("d.npz")) and arr_0("d.npz").shape == (2, 8, 8, 1)
    with np.load("latents.npz") as file:
        assert str(file["preset"]) == "digits" and file["images"].tolist() == ["a.png", "b.jpg"]
        for i, r in enumerate([1] + [4] * 3 + [8] * 3):
            for name in ("z", "qm", "qv", "pm", "pv"):
                assert file[f"{name}{i:03}"].shape == (2, 8, r, r)
            qm, qv, pm, pv = (file[f"{name}{i:03}"] for name in ("qm", "qv", "pm", "pv"))
            kl = pv - qv + (np.exp(2 * qv) + (qm - pm) ** 2) / (2 * np.exp(2 * pv)) - 0.5
            assert file[f"rate{i:03}"] == pytest.approx(kl.sum(axis=(1, 2, 3)) / 64, rel=1e-3)
        partial = {f"z{i:03}": file[f"z{i:03}"] for i in range(3)}
        np.savez("three.npz", **partial)
        np.savez("wrong.npz", z000=file["z006"])
    run("decode three.npz --out three_of_file.npz")  # the others are sampled
    run("decode latents.npz --layers 3 --out three_of_all.npz")
    assert np.array_equal(arr_0("three_of_file.npz"), arr_0("three_of_all.npz"))
    assert not np.array_equal(arr_0("three_of_all.npz"), arr_0("d.npz"))
    with pytest.raises(UserError, match="z000 is .*8, 8.*1, 1"):
        run("decode wrong.npz --force")


def test_keeping_up_to_a_resolution_is_keeping_its_layers(run):
    run("reconstruct a.png --layers 4 --mean --out a.npz")
    run("reconstruct a.png --resolution 4 --mean --out b.npz")
    assert np.array_equal(arr_0("a.npz"), arr_0("b.npz"))


def test_interpolate_ends_at_the_reconstructions(run):
    run("interpolate a.png b.jpg --steps 5 --mean --out i.npz")
    run("reconstruct a.png --mean --out a.npz")  # the noise of image 0, as all steps have
    run("reconstruct b.jpg --mean --out b.npz")
    frames = arr_0("i.npz").astype(int)
    for frame, end in ((frames[0], arr_0("a.npz")[0]), (frames[4], arr_0("b.npz")[0])):
        assert abs(frame - end).max() <= 1  # a lerp's rounding
    gaps = [abs(frames[i + 1] - frames[i]).mean() for i in range(4)]
    assert 1 < max(gaps) < abs(frames[4] - frames[0]).mean()
    # What is sampled is alike in all: pixels, and the latents that are not kept.
    run("interpolate a.png a.png --layers 3 --steps 3 --out same.npz")
    same = arr_0("same.npz")
    assert nearly_equal(same[1:], same[:1].repeat(2, axis=0))


def test_progressive_ends_at_the_image_itself(run, monkeypatch):
    run("progressive --n 3 --mean --temperature 0.7 --out p.npz")
    rows = arr_0("p.npz").reshape(3, 3, 8, 8, 1)  # 1x1, 4x4, 8x8; three samples
    run("progressive --n 3 --mean --temperature 0.7 --rest 0.7 --out q.npz")
    others = arr_0("q.npz").reshape(3, 3, 8, 8, 1)
    assert np.array_equal(rows[2], others[2])
    assert all(np.array_equal(others[i], others[2]) for i in (0, 1))
    assert not np.array_equal(rows[0], rows[2])
    run("samples --n 3 --mean --temperature 0.7 --out s.npz")
    assert np.array_equal(rows[2], arr_0("s.npz"))
    run("progressive --n 3 --n_batch 4 --mean --temperature 0.7 --out b.npz")  # across rows
    assert nearly_equal(arr_0("b.npz"), rows.reshape(9, 8, 8, 1))
    sizes, encode = [], VAE.forward_get_latents

    def counted(self, x, *args, **more):
        sizes.append(len(x))
        return encode(self, x, *args, **more)

    monkeypatch.setattr(VAE, "forward_get_latents", counted)
    run("progressive a.png b.jpg a.png --n_batch 2 --mean --out p3.npz")
    assert sizes == [2, 1]  # each image once, not once a row
    run("progressive a.png b.jpg --mean --out p2.npz")
    run("reconstruct a.png b.jpg --mean --out r.npz")
    assert np.array_equal(arr_0("p2.npz")[4:], arr_0("r.npz"))
    run("reconstruct a.png b.jpg --layers 1 --temperature 0.1 --mean --out r2.npz")
    assert np.array_equal(arr_0("p2.npz")[:2], arr_0("r2.npz"))


def test_errors_are_one_line(run, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "folder.png").mkdir()
    z = np.zeros((1, 8, 1, 1))
    np.savez("infinite.npz", z000=z, z001=np.full((1, 8, 4, 4), np.inf))
    run("samples --n 1 --out taken.png")
    before = (tmp_path / "taken.png").read_bytes()
    for line, words in [
        ("samples --out taken.png", "taken.png exists already.*--force"),
        ("samples --n 2000", "2000 images in one grid"),
        ("samples --out no/folder/a.npz", "no/folder/a.npz can't be written"),
        ("samples --temperature 2:0.5", "resolution 2: .* 1, 4, 8"),
        ("samples --temperature 1:a", "'a'"),
        ("samples --layer 3", r"'--layer': did you mean --layers \(of reconstruct, .*decode\)"),
        (
            "samples --layers 3",
            "'--layers': it is an option of reconstruct, interpolate, embed, decode$",
        ),
        ("samples --temprature 3", r"did you mean --temperature\?"),
        ("samples --out s.JPG", "s.JPG: images go to NAME.png.* must not end in .jpg"),
        ("samples --out s.npy", "must not end in .npy"),
        ("samples --out folder.png --force", "folder.png is a folder"),
        ("progressive --n 500", "1500 images in one grid"),
        ("decode infinite.npz", "infinite.npz holds no latents.*z001 .*not finite"),
        ("samples --zdim 3", "--zdim.*--hps"),
        ("reconstruct text.png", "text.png cannot be decoded"),
        ("reconstruct a.png --layers 12", "--layers 12: this model has 7 layers"),
        ("reconstruct a.png --resolution 2", "--resolution 2: .* 1, 4, 8"),
        ("decode a.png", "a.png holds no latents"),
        ("decode absent.npz", "absent.npz does not exist"),
        ("encode a.png --out infinite.npz", "exists"),
        ("encode a.png --out b.png", ".npz"),
        ("encode a.png --out no/folder/b.npz", "no/folder/b.npz can't be written"),
        ("--hps cifar10 samples", "holds the digits model"),
    ]:
        with pytest.raises(UserError, match=words) as error:
            run(line)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="--restore_ema_path"):
        run("samples", weights="")
    assert (tmp_path / "taken.png").read_bytes() == before


def test_weights_of_no_preset(run, tmp_path):
    H = get_hparams("digits", zdim=3)
    torch.save(VAE(H).state_dict(), tmp_path / "other.th")
    with pytest.raises(UserError, match="none of the presets.*--hps"):
        run("samples", weights="other.th")
    run("--hps digits --zdim 3 samples --n 2 --out out.npz", weights="other.th")
    assert len(arr_0()) == 2


def test_a_network_of_no_preset_has_a_name_in_titles(run, tmp_path):
    """As a program may have saved it that made its hyperparameters by hand."""
    folder = write_digits_run(tmp_path / "run")
    state = folder / "latest-state.json"
    content = json.loads(state.read_text())
    del content["hparams"]["hparam_sets"]
    state.write_text(json.dumps(content))
    run("samples --n 1 --out g.png", weights=str(folder / "latest-model-ema.th"))
    assert load_model(str(folder / "latest-model-ema.th")).H.hparam_sets == "own network"
