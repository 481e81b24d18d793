"""sample.py: its commands as a user runs them, in a process of their own where that matters."""

import fcntl
import json
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from golden import weight
from PIL import Image
from test_processes import REPO, environment

import sample
from data import preprocess
from hps import UserError, get_hparams
from train_helpers import load_model, save_run
from vae import VAE


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """ema.th, the weights of the preset digits; a.png and b.jpg, pictures of another size."""
    folder = tmp_path_factory.mktemp("sample")
    state = {k: weight(k, v.shape) for k, v in VAE(get_hparams("digits")).state_dict().items()}
    for name in state:  # so that another image makes another picture, not its noise alone
        state[name] *= 2.8 if name.startswith("encoder.") else 2 if ".enc." in name else 1
    torch.save(state, folder / "ema.th")
    pixels = np.random.RandomState(0).randint(0, 256, (2, 20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels[0]).save(folder / "a.png")
    Image.fromarray(pixels[1]).convert("L").save(folder / "b.jpg")
    return folder


@pytest.fixture
def run(folder, tmp_path, monkeypatch):
    """run("samples --n 4"): sample.py in this process, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    for name in ("ema.th", "a.png", "b.jpg"):
        (tmp_path / name).symlink_to(folder / name)

    def run(line, weights="ema.th"):
        argv = ["sample.py", "--restore_ema_path", weights, "--device", "cpu", *shlex.split(line)]
        monkeypatch.setattr(sys, "argv", argv)
        sample.main()

    return run


def arr_0(path="out.npz"):
    with np.load(path) as file:
        assert list(file) == ["arr_0"]
        return file["arr_0"]


def nearly_equal(a, b):
    """Equal but for what the rounding of another batch size does."""
    return a.shape == b.shape and (a != b).mean() < 0.01


def test_samples_belong_to_their_index(run):
    run("samples --n 10 --n_batch 4 --out a.npz --temperature 0.8 --seed 3")
    a = arr_0("a.npz")
    assert a.shape == (10, 8, 8, 3) and a.dtype == np.uint8
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


def test_folder_of_pngs(run, tmp_path):
    run("samples --n 5 --out a.npz")
    run("samples --n 3 --out pngs --n_batch 2")
    assert sorted(p.name for p in (tmp_path / "pngs").iterdir()) == [
        "000000.png", "000001.png", "000002.png", "settings.json",
    ]  # fmt: skip
    run("samples --n 5 --out pngs --n_batch 2")  # more of them
    pngs = np.stack([np.asarray(Image.open(f"pngs/{i:06}.png")) for i in range(5)])
    assert nearly_equal(pngs, arr_0("a.npz"))
    (tmp_path / "pngs" / "000001.png.partial").touch()  # of a kill
    run("samples --n 2 --out pngs --n_batch 2")  # fewer
    assert sorted(p.name for p in (tmp_path / "pngs").iterdir()) == [
        "000000.png", "000001.png", "settings.json",
    ]  # fmt: skip
    with pytest.raises(UserError, match="seed 0, not 1"):
        run("samples --n 5 --out pngs --seed 1")
    torch.save(VAE(get_hparams("digits")).state_dict(), tmp_path / "other.th")
    with pytest.raises(UserError, match="made with weights [0-9a-f]{64}, not [0-9a-f]{64}"):
        run("samples --n 5 --out pngs", weights="other.th")
    run("samples --n 5 --out pngs --seed 1 --force")
    assert np.asarray(Image.open("pngs/000000.png")).tolist() != pngs[0].tolist()


def test_force_removes_nothing_of_others(run, tmp_path):
    """A settings.json may be another program's, and other files may lie beside our own."""
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "settings.json").write_text("{}")
    with pytest.raises(UserError, match="holds other files"):
        run("samples --n 1 --out project --force")
    assert (tmp_path / "project" / "settings.json").read_text() == "{}"
    run("samples --n 2 --out pngs")
    (tmp_path / "pngs" / "notes.txt").write_text("mine")
    run("samples --n 1 --out pngs --seed 1 --force")
    assert sorted(p.name for p in (tmp_path / "pngs").iterdir()) == [
        "000000.png", "notes.txt", "settings.json",
    ]  # fmt: skip


def test_what_a_kill_or_another_program_has_left(run, tmp_path):
    (tmp_path / "pngs").mkdir()
    (tmp_path / "pngs" / "settings.json.partial").write_text('{"wei')
    run("samples --n 1 --out pngs")
    assert {p.name for p in (tmp_path / "pngs").iterdir()} == {"000000.png", "settings.json"}
    for content in (b"", b"[]", b'{"weights": "1', b"\xff"):
        (tmp_path / "pngs" / "settings.json").write_bytes(content)
        (tmp_path / "a.npz.part.json").write_bytes(content)
        for out, file in (("pngs", "pngs/settings.json"), ("a.npz", "a.npz.part.json")):
            with pytest.raises(UserError, match=f"{file} does not tell.*name another --out"):
                run(f"samples --n 1 --out {out}")
            assert (tmp_path / file).read_bytes() == content
    (tmp_path / "a.npz.part.json").unlink()
    (tmp_path / "a.npz.part").write_text("another program's")
    with pytest.raises(UserError, match="a.npz.part is there without a.npz.part.json"):
        run("samples --n 1 --out a.npz")
    assert (tmp_path / "a.npz.part").read_text() == "another program's"
    (tmp_path / "a.png.partial").write_text("half a picture")
    run("samples --n 1 --out a.png --force")
    assert not (tmp_path / "a.png.partial").exists()


def test_the_place_is_tried_before_anything_is_made(run, tmp_path, monkeypatch):
    """And a grid, unlike an .npz or a folder, begins anew: its message promises nothing else."""
    for name in ("forward_samples_set_latents", "forward_get_latents"):
        monkeypatch.setattr(VAE, name, lambda *args: pytest.fail("made before the door"))
    (tmp_path / "taken.png").touch()
    for line in ("samples", "reconstruct a.png", "progressive", "progressive a.png"):
        for out, words in (("no/such/g.png", "No such file.*--out$"), ("taken.png", "exists")):
            with pytest.raises(UserError, match=words):
                run(f"{line} --out {out}")
    for out in ("no/such/a.npz", "a.png/folder"):
        with pytest.raises(UserError, match="can't be written.*then goes on$"):
            run(f"samples --out {out}")
    with pytest.raises(UserError, match=r"No such file.*another --out$"):
        run("encode a.png --out no/such/a.npz")


def test_the_mean_of_the_mixture_has_no_noise_of_pixels(run):
    run("reconstruct a.png b.jpg --mean --out m1.npz")
    run("reconstruct a.png b.jpg --mean --out m2.npz")
    run("reconstruct a.png b.jpg --out s.npz")
    run("encode a.png b.jpg")
    run("decode latents.npz --mean --seed 5 --out m3.npz")  # the same latents, another seed
    assert np.array_equal(arr_0("m1.npz"), arr_0("m2.npz"))
    assert np.array_equal(arr_0("m1.npz"), arr_0("m3.npz"))
    assert not nearly_equal(arr_0("m1.npz"), arr_0("s.npz"))


def test_a_killed_run_goes_on_where_it_stopped(run, tmp_path):
    """SIGKILL in the middle; then the same command, and the file is that of a run in one go."""
    line = "samples --n 40 --n_batch 4 --out killed.npz"
    argv = [sys.executable, REPO / "sample.py", "--restore_ema_path", "ema.th", *line.split()]
    process = subprocess.Popen(argv, env=environment(), cwd=tmp_path)
    part, deadline = tmp_path / "killed.npz.part", time.monotonic() + 60
    while not (part.exists() and part.stat().st_size > 8 * 8 * 3 * 4):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = part.stat().st_size
    assert not (tmp_path / "killed.npz").exists() and done < 40 * 8 * 8 * 3
    part.write_bytes(part.read_bytes()[: 8 * 8 * 3 * 4] + b"in the middle of an image")
    kept = part.read_bytes()[: 8 * 8 * 3 * 4]
    settings = part.with_name("killed.npz.part.json").read_bytes()
    with pytest.raises(UserError, match="temperature 1.0, not 0.5"):
        run(f"{line} --temperature 0.5")
    with_option = json.loads(settings) | {"dec_blocks": "1x2,4m1,8m4"}
    part.with_name("killed.npz.part.json").write_text(json.dumps(with_option))
    with pytest.raises(UserError, match="dec_blocks 1x2,4m1,8m4, not None"):
        run(line)
    part.with_name("killed.npz.part.json").write_bytes(settings)
    with open(part, "rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="is being written by another process"):
            run(line)
    made, forward = [], VAE.forward_uncond_samples
    VAE.forward_uncond_samples = lambda self, n, *args: made.append(n) or forward(self, n, *args)
    try:
        run(line)
    finally:
        VAE.forward_uncond_samples = forward
    assert sum(made) == 36  # the first batch was there
    run("samples --n 40 --n_batch 4 --out whole.npz")
    assert (tmp_path / "killed.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()
    assert arr_0("killed.npz")[:4].tobytes() == kept
    # A run that was to make more was killed.
    part.write_bytes(arr_0("whole.npz").tobytes())
    part.with_name("killed.npz.part.json").write_bytes(settings)
    (tmp_path / "killed.npz").rename(tmp_path / "resumed.npz")
    run("samples --n 30 --n_batch 4 --out killed.npz")
    assert np.array_equal(arr_0("killed.npz"), arr_0("whole.npz")[:30])
    size = (tmp_path / "whole.npz").stat().st_size - 10 * 8 * 8 * 3
    assert (tmp_path / "killed.npz").stat().st_size == size
    assert not list(tmp_path.glob("*part*"))


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
    assert np.array_equal(arr_0("r.npz"), arr_0("d.npz")) and arr_0("d.npz").shape == (2, 8, 8, 3)
    with np.load("latents.npz") as file:
        assert str(file["preset"]) == "digits" and file["images"].tolist() == ["a.png", "b.jpg"]
        for i, r in enumerate([1] * 2 + [4] * 4 + [8] * 5):
            for name in ("z", "qm", "qv", "pm", "pv"):
                assert file[f"{name}{i:03}"].shape == (2, 8, r, r)
            qm, qv, pm, pv = (file[f"{name}{i:03}"] for name in ("qm", "qv", "pm", "pv"))
            kl = pv - qv + (np.exp(2 * qv) + (qm - pm) ** 2) / (2 * np.exp(2 * pv)) - 0.5
            assert file[f"rate{i:03}"] == pytest.approx(kl.sum(axis=(1, 2, 3)) / 192, rel=1e-3)
        partial = {f"z{i:03}": file[f"z{i:03}"] for i in range(3)}
        np.savez("three.npz", **partial)
        np.savez("wrong.npz", z000=file["z010"])
    run("decode three.npz --out three_of_file.npz")  # the others are sampled
    run("decode latents.npz --layers 3 --out three_of_all.npz")
    assert np.array_equal(arr_0("three_of_file.npz"), arr_0("three_of_all.npz"))
    assert not np.array_equal(arr_0("three_of_all.npz"), arr_0("d.npz"))
    with pytest.raises(UserError, match="z000 is .*8, 8.*1, 1"):
        run("decode wrong.npz --force")


def test_pictures_are_their_middle_square(tmp_path):
    """Of the model's own size it stays as it is; a smaller one is enlarged."""
    pixels = np.random.RandomState(0).randint(0, 256, (8, 8, 3), dtype=np.uint8)
    wide = np.concatenate([np.zeros_like(pixels), pixels, np.zeros_like(pixels)], axis=1)
    for name, image in (("own", pixels), ("wide", wide), ("tall", wide.swapaxes(0, 1))):
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    own, wide, tall = sample.read_images(
        [tmp_path / f"{n}.png" for n in ("own", "wide", "tall")], 8
    )
    assert np.array_equal(own, pixels) and np.array_equal(wide, pixels)
    assert np.array_equal(tall, pixels.swapaxes(0, 1))
    assert sample.read_image(tmp_path / "own.png", 20).shape == (20, 20, 3)


def test_keeping_up_to_a_resolution_is_keeping_its_layers(run):
    run("reconstruct a.png --layers 6 --mean --out a.npz")
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
    rows = arr_0("p.npz").reshape(3, 3, 8, 8, 3)  # 1x1, 4x4, 8x8; three samples
    run("progressive --n 3 --mean --temperature 0.7 --rest 0.7 --out q.npz")
    others = arr_0("q.npz").reshape(3, 3, 8, 8, 3)
    assert np.array_equal(rows[2], others[2])
    assert all(np.array_equal(others[i], others[2]) for i in (0, 1))
    assert not np.array_equal(rows[0], rows[2])
    run("samples --n 3 --mean --temperature 0.7 --out s.npz")
    assert np.array_equal(rows[2], arr_0("s.npz"))
    run("progressive --n 3 --n_batch 4 --mean --temperature 0.7 --out b.npz")  # across rows
    assert nearly_equal(arr_0("b.npz"), rows.reshape(9, 8, 8, 3))
    sizes, encode = [], VAE.forward_get_latents
    monkeypatch.setattr(
        VAE, "forward_get_latents", lambda self, x, *a: sizes.append(len(x)) or encode(self, x, *a)
    )
    run("progressive a.png b.jpg a.png --n_batch 2 --mean --out p3.npz")
    assert sizes == [2, 1]  # each image once, not once a row
    run("progressive a.png b.jpg --mean --out p2.npz")
    run("reconstruct a.png b.jpg --mean --out r.npz")
    assert np.array_equal(arr_0("p2.npz")[4:], arr_0("r.npz"))
    run("reconstruct a.png b.jpg --layers 2 --temperature 0.1 --mean --out r2.npz")
    assert np.array_equal(arr_0("p2.npz")[:2], arr_0("r2.npz"))


def test_progressive_goes_on_with_the_same_columns_alone(run, monkeypatch, tmp_path):
    """The place of an image depends on how many there are in a row."""
    line, decoded, calls = "progressive --n_batch 2 --out p.npz", sample.decoded, []

    def stopped(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return decoded(*args)

    monkeypatch.setattr(sample, "decoded", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(f"{line} --n 4")
    with pytest.raises(UserError, match="columns 4, not 6"):
        run(f"{line} --n 6")
    run(f"{line} --n 4")
    assert len(calls) == 3 + 4 and arr_0("p.npz").shape == (12, 8, 8, 3)


@pytest.mark.parametrize(
    "line, width, height",
    [
        ("samples --n 20 --out g.PNG", 8 * 132, 3 * 132),
        ("samples --n 400 --out g.png", 20 * 68, 20 * 68),
        ("reconstruct a.png b.jpg --out g.png", 2 * 132, 2 * 132),
        ("interpolate a.png b.jpg --steps 3 --out g.png", 5 * 132, 132),
        ("progressive a.png b.jpg --out g.png", 2 * 132, 4 * 132),
    ],
)
def test_grids(run, line, width, height):
    run(line)
    picture = Image.open(line.split()[-1])
    # Images of 8 pixels are enlarged to 128 or 64; beside and above them stand the words.
    assert width < picture.width < width + 250 and height < picture.height < height + 50
    pixels = np.asarray(picture)
    assert (pixels[: picture.height - height] < 128).any()


def test_errors_are_one_line(run, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "folder.png").mkdir()
    z = np.array([[[[0.0]]] * 8])
    np.savez("infinite.npz", z000=z, z001=z + np.inf)
    run("samples --n 1 --out taken.png")
    before = (tmp_path / "taken.png").read_bytes()
    for line, words in [
        ("samples --out taken.png", "taken.png exists already.*--force"),
        ("samples --n 2000", "2000 images in one grid"),
        ("samples --out no/folder/a.npz", "no/folder/a.npz can't be written"),
        ("samples --temperature 2:0.5", "resolution 2: .* 1, 4, 8"),
        ("samples --temperature 1:a", "'a'"),
        ("samples --layer 3", r"'--layer': did you mean --layers \(of reconstruct, .*decode\)"),
        ("samples --layers 3", "'--layers': it is an option of reconstruct, interpolate, decode$"),
        ("samples --temprature 3", r"did you mean --temperature\?"),
        ("samples --out s.JPG", "s.JPG: images go to NAME.png.* must not end in .jpg"),
        ("samples --out s.npy", "must not end in .npy"),
        ("samples --out folder.png --force", "folder.png is a folder"),
        ("progressive --n 500", "1500 images in one grid"),
        ("decode infinite.npz", "infinite.npz holds no latents.*z001 .*not finite"),
        ("samples --zdim 3", "--zdim.*--hps"),
        ("reconstruct text.png", "text.png cannot be decoded"),
        ("reconstruct a.png --layers 12", "--layers 12: this model has 11 layers"),
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
    env = environment(PYTHONPATH=str(REPO))
    done = subprocess.run(argv, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr


@pytest.fixture
def other_run(tmp_path):
    """A run's folder whose weights have the shapes of the preset digits, but not its blocks."""
    H = get_hparams("digits", dec_blocks="1x2,4m1,4x4,8m4,8x3", dataset="images", image_size=8)
    H.update(hparam_sets="digits", image_mean=70.0, image_std=90.0, save_dir=str(tmp_path))
    vae, folder = VAE(H), tmp_path / "run"
    folder.mkdir()
    optimizer = torch.optim.AdamW(vae.parameters())
    save_run(str(folder / "latest"), vae, vae, optimizer, H, {"step": 1})
    return folder


def test_a_network_is_what_its_run_has_recorded(other_run, tmp_path):
    """The shapes alone would tell of the preset, and other pictures come of its order of blocks."""
    (tmp_path / "link.th").symlink_to(other_run / "latest-model-ema.th")
    paths = [other_run / "latest-model-ema.th", other_run / "latest-model.th"]
    paths += [*other_run.glob("sets/0*/model-ema.th"), tmp_path / "link.th"]
    assert len(paths) == 4
    for path in paths:
        H = load_model(str(path)).H
        assert (H.dec_blocks, H.dataset) == ("1x2,4m1,4x4,8m4,8x3", "images")
        assert (H.image_size, H.image_mean, H.image_std) == (8, 70.0, 90.0)
        assert H.hparam_sets == "digits"
    assert load_model(str(paths[0]), "digits").H.dec_blocks == get_hparams("digits").dec_blocks
    # Away from its run nothing but the shapes is left.
    alone = tmp_path / "latest-model-ema.th"
    alone.write_bytes(paths[0].read_bytes())
    assert load_model(str(alone)).H.dataset == "digits"


def test_a_network_of_no_preset_has_a_name_in_titles(other_run, run):
    """As a program may have saved it that made its hyperparameters by hand."""
    state = other_run / "latest-state.json"
    content = json.loads(state.read_text())
    del content["hparams"]["hparam_sets"]
    state.write_text(json.dumps(content))
    run("samples --n 1 --out g.png", weights=str(other_run / "latest-model-ema.th"))
    assert load_model(str(other_run / "latest-model-ema.th")).H.hparam_sets == "own network"


def test_own_images_are_normalized_as_images_json_says(other_run):
    """Beside the weights it counts more than what the run has recorded, or the preset."""
    (other_run / "images.json").write_text('{"mean": 100.0, "std": 50.0}')
    images = np.full((1, 8, 8, 3), 125, np.uint8)
    for hps in (None, get_hparams("digits", dataset="images", image_size=8)):
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


def test_load_model_takes_a_preset_or_hyperparameters(folder):
    path = str(folder / "ema.th")
    one, two = load_model(path, "digits", "cpu"), load_model(path, get_hparams("digits"))
    assert all(map(torch.equal, one.parameters(), two.parameters()))
    assert load_model(folder / "ema.th", device=torch.device("cpu")).H.device == "cpu"
    with pytest.raises(UserError, match="digits"):
        load_model(path, "photos32")
