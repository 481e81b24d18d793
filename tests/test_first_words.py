"""What a command says first: one line where it is refused, and a dry run without the data."""

import errno
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from golden import model
from runs import ENV, ROOT, SMALL, Run
from test_plot import steps, write_log

import files_to_npy
import logs
import plot
import sample
from errors import UserError, needing, remedy_of
from hps import HPARAMS_REGISTRY, add_vae_arguments, parse_args_and_update_hparams
from image_sets import IMAGE_SETS
from options import OPTIONS, SYNONYMS, OneLineParser, add_own_options, given_options, hparams_of


def refused(tmp_path, *argv, **options):
    status, text = Run(argv, tmp_path / "out", **options).wait()
    assert status == 2 and len(text.splitlines()) == 1 and text.startswith("error: "), text
    return text


# ---- data ----------------------------------------------------------------------------------


def test_own_images_need_a_given_data_root(tmp_path):
    assert "--data_root" in refused(tmp_path, "--hps", "images32", cwd=tmp_path)
    argv = [*SMALL, "--dataset", "images", "--image_size", "8"]
    for more in ([], ["--data_root", ""]):
        assert "own images need --data_root" in refused(tmp_path, *argv, *more, cwd=tmp_path)
    for given in (".", "./"):
        text = refused(tmp_path, *argv, "--data_root", given, cwd=tmp_path)
        assert "holds no image" in text
    assert not (tmp_path / ".vdvae").exists() and not (tmp_path / "saved_models").exists()


@pytest.mark.parametrize("preset", ["cifar10", "imagenet32"])
def test_a_dry_run_needs_no_data(preset, tmp_path):
    argv = [
        "--hps",
        preset,
        "--width",
        "8",
        "--custom_width_str=",
        "--zdim",
        "1",
        "--device",
        "cpu",
    ]
    status, text = Run([*argv, "--dry_run"], tmp_path / "out", cwd=tmp_path).wait()
    facts = IMAGE_SETS[HPARAMS_REGISTRY[preset].dataset]
    assert status == 0 and f"data      not here, run {facts.setup}" in text, text
    assert f"{facts.counts[0]:,} to train on, {facts.counts[1]:,} to validate" in text
    assert "memory    about" in text and not (tmp_path / "saved_models").exists()
    assert facts.setup.split()[0] in refused(tmp_path, *argv, cwd=tmp_path)


def test_a_dry_run_of_damaged_or_own_data_is_refused(tmp_path):
    (tmp_path / "imagenet32-train.npy").write_bytes(b"cut")
    argv = ["--hps", "imagenet32", "--data_root", tmp_path, "--device", "cpu", "--dry_run"]
    assert "no complete .npy" in refused(tmp_path, *argv)
    argv = ["--hps", "images32", "--data_root", tmp_path / "absent", "--dry_run"]
    assert "is no folder" in refused(tmp_path, *argv)


# ---- options -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong, meant",
    [("--learning_rate", "--lr"), ("--batch-size=8", "--n_batch"), ("--epochs", "--num_epochs"),
     ("--Weight_Decay", "--wd"), ("--gradient_checkpointing", "--checkpoint_activations")],
)  # fmt: skip
def test_words_of_other_programs_are_understood(wrong, meant):
    parser = OneLineParser()
    add_vae_arguments(parser)
    add_own_options(parser)
    with pytest.raises(UserError, match=f"did you mean {meant}\\?"):
        parser.parse_args([wrong, "1"])


def test_synonyms_are_of_options_that_are_there():
    names = {name for rows in OPTIONS.values() for name, *_ in rows} | {"hps", "n", "temperature"}
    words = [word for text in SYNONYMS.values() for word in text.split()]
    assert SYNONYMS.keys() <= names and not set(words) & names and len(words) == len(set(words))


def test_a_home_folder_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    parser = add_vae_arguments(OneLineParser())
    add_own_options(parser)
    for name in ("data_root", "save_dir", "restore_path", "init_from", "restore_log_path"):
        assert getattr(parser.parse_args([f"--{name}=~/x"]), name) == "/home/ann/x"
    assert parser.parse_args(["--restore_path", "http://h/~a"]).restore_path == "http://h/~a"


def test_given_options_and_the_no_form_of_flags():
    parser = add_vae_arguments(OneLineParser())
    add_own_options(parser)
    argv = ["--hps", "images32", "--no_ema_warmup", "--lr=1.5e-4"]
    assert given_options(parser, argv) == {"hparam_sets", "ema_warmup", "lr"}
    H = hparams_of("images32", {}, add_vae_arguments, parse_args_and_update_hparams)
    parse_args_and_update_hparams(H, parser, argv)
    assert H.ema_warmup is False
    parse_args_and_update_hparams(H, parser, [*argv, "--ema_warmup"])
    assert H.ema_warmup is True
    assert "--no_ema_warmup" not in parser.format_help()


# ---- what can't be written, imported, found ------------------------------------------------


def test_remedies_fit_the_error():
    assert remedy_of(OSError(errno.ENOSPC, "No space")) == "make room"
    for code in (errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EIO, errno.ENOLINK):
        assert "room" not in remedy_of(OSError(code, os.strerror(code)))


def _no_one():
    os.setuid(54321)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become no one")
def test_a_folder_that_may_not_be_looked_into_is_one_line(tmp_path):
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed").chmod(0o700)
    text = refused(tmp_path, *SMALL, "--save_dir", tmp_path / "closed", wrap=_no_one)
    assert "Permission denied" in text and "change its permissions" in text


def test_a_folder_without_permission_is_no_matter_of_room(tmp_path):
    (tmp_path / "file").touch()
    text = refused(tmp_path, *SMALL, "--save_dir", tmp_path / "file")
    assert "make room" not in text and "move away what stands there" in text


@pytest.mark.parametrize("error", [TypeError("descriptors"), ImportError("x\ny"), OSError(5, "z")])
def test_an_import_may_fail_in_any_way(error):
    with pytest.raises(UserError, match="--tensorboard needs the package tensorboard") as found:
        with needing("tensorboard", "--tensorboard", ", or leave the option out"):
            raise error
    assert "\n" not in str(found.value)


def _tensorboard_is_broken():
    sys.modules["torch.utils.tensorboard"] = None  # an ImportError
    import builtins

    original = builtins.__import__

    def broken(name, *args, **kwargs):
        if name == "torch.utils.tensorboard" or name == "matplotlib.figure":
            raise TypeError("Descriptors cannot be created directly")
        return original(name, *args, **kwargs)

    builtins.__import__ = broken


@pytest.mark.parametrize("module", ["matplotlib", "matplotlib.figure"])
def test_a_chart_without_matplotlib_says_what_it_needs(module, tmp_path, monkeypatch):
    write_log(tmp_path / "log", steps([5, 10]))
    monkeypatch.setitem(sys.modules, module, None)
    argv = ["plot.py", tmp_path / "log", "--out", tmp_path / "a.png"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in argv])
    with pytest.raises(UserError, match="needs the package matplotlib.*pip install matplotlib$"):
        plot.main()


def test_packages_that_are_broken(tmp_path):
    """TensorBoard's ends the run at its start; matplotlib's, hours later, costs the picture."""
    argv = [*SMALL, "--save_dir", tmp_path, "--num_epochs", "1"]
    text = refused(tmp_path, *argv, "--tensorboard", wrap=_tensorboard_is_broken)
    assert "Descriptors cannot be created directly" in text
    status, text = Run(argv, tmp_path / "out", _tensorboard_is_broken).wait()
    assert status == 0 and "WARNING: no picture" in text and "Descriptors" in text


def _nobody():
    os.environ.pop("HOME", None)
    os.environ.pop("XDG_CACHE_HOME", None)
    os.setuid(54321)


def _train_as_no_one(tmp_path):
    from PIL import Image

    tmp_path.chmod(0o777)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos").chmod(0o777)
    for i in range(40):
        noise = np.random.RandomState(i).randint(0, 256, (9, 9, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "photos" / f"{i}.png")
    argv = [*SMALL, "--dataset", "images", "--image_size", "8", "--data_root", tmp_path / "photos",
            "--n_batch", "10", "--num_epochs", "1", "--save_dir", tmp_path / "runs"]  # fmt: skip
    status, text = Run(argv, tmp_path / "out", _nobody, cwd=tmp_path).wait()
    assert status == 0 and (tmp_path / "photos" / ".vdvae").is_dir(), text


# ---- Ctrl-C, the lines before an error -----------------------------------------------------


@pytest.mark.parametrize("command", ["train.py", "sample.py", "plot.py", "files_to_npy.py"])
def test_ctrl_c_while_a_command_imports_is_one_line(command, tmp_path):
    """The signal comes as numpy is looked for."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(name, *_):\n"
        "        if name == 'numpy':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder)\n"
    )
    done = subprocess.run([sys.executable, command, "x", "y"], cwd=ROOT, text=True,
                          env=ENV | {"PYTHONPATH": str(tmp_path)}, capture_output=True)  # fmt: skip
    assert (done.returncode, done.stderr, done.stdout) == (130, "interrupted\n", "")


def test_a_program_keeps_its_own_way_with_ctrl_c():
    code = "import signal, train; assert signal.getsignal(2) is signal.default_int_handler"
    assert subprocess.run([sys.executable, "-c", code], env=ENV, cwd="/").returncode == 0


def test_lines_are_kept_back_until_the_run_is_on_its_way(tmp_path, capfd, monkeypatch):
    logs.buffer_log()
    logs.log_event(str(tmp_path / "log"), ["early"], False, {})
    assert capfd.readouterr().out == "" and not list(tmp_path.iterdir())
    logs.show_log()
    logs.log_event(str(tmp_path / "log"), ["later"], False, {})
    out = capfd.readouterr().out
    assert "early" in out and "later" in out and not list(tmp_path.iterdir())
    logs.flush_log()
    assert (tmp_path / "log.txt").read_text() == out


def test_a_late_refusal_is_one_line_too(tmp_path):
    text = refused(tmp_path, *SMALL, "--restore_path", tmp_path / "absent.th")
    assert "absent.th does not exist" in text


# ---- plot.py -------------------------------------------------------------------------------


def test_a_log_of_step_0_is_drawn(tmp_path):
    write_log(tmp_path / "log", steps([0, 10]))
    train, _ = plot.read_log(tmp_path / "log")
    assert train["skip_rate"].tolist() == [5.0, 0.5]


@pytest.mark.parametrize(
    "event", [{"step": 10**400}, {"elbo": None, "elbo_filtered": None}, {"time": 3}, {"step": "x"}]
)
def test_a_log_of_nonsense_is_one_line(event, tmp_path):
    write_log(tmp_path / "log", [{**e, **event} for e in steps([5], skip_rate=0.0)])
    with pytest.raises(UserError, match="is no log.jsonl of a run") as error:
        plot.read_log(tmp_path / "log")
    assert "\n" not in str(error.value)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "log.jsonl")
    with pytest.raises(UserError, match="no file of lines"):
        plot.read_log(tmp_path / "log.jsonl")


def test_a_picture_tells_the_ema_from_the_weights(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    lines = steps([10, 20])
    lines.append({**lines[-1], "step": 20, "weights_bits_per_dim": 1.25})
    write_log(tmp_path / "log", lines)
    _, evals = plot.read_log(tmp_path / "log")
    assert np.isnan(evals["weights_bits_per_dim"][0]) and evals["weights_bits_per_dim"][1] == 1.25
    labels, set_ylabel, drawn = [], Axes.set_ylabel, Axes.plot
    words = []
    monkeypatch.setattr(Axes, "set_ylabel", lambda a, t, **k: words.append(t) or set_ylabel(a, t))
    monkeypatch.setattr(
        Axes, "plot", lambda a, *x, **k: labels.append(k.get("label")) or drawn(a, *x, **k)
    )
    plot.draw_curves(tmp_path / "c.png", {"run": plot.read_log(tmp_path / "log")})
    assert "run: weights" in labels and any("EMA" in w and "crosses" in w for w in words)


# ---- latents, interpolation ----------------------------------------------------------------


def test_numpy_latents_are_latents():
    H, vae = model("tiny")
    with torch.no_grad():
        z = [s["z"] for s in vae.forward_get_latents(torch.randn(2, 16, 16, 3))]
    as_numpy, made = [t.double().numpy() for t in z], []  # of another kind, too
    for latents in (z, as_numpy):
        torch.manual_seed(0)
        made.append(vae.forward_samples_set_latents(2, latents[:3] + [None]))
    assert np.array_equal(*made)
    block, xs = vae.decoder.dec_blocks[0], {1: torch.zeros(2, H.width, 1, 1)}
    a, b = (block.forward_uncond(dict(xs), lvs=lvs)[1] for lvs in (z[0], z[0].numpy()))
    assert torch.equal(a, b)
    half = z[0].half()
    a, b = (block.forward_uncond(dict(xs), lvs=lvs)[1] for lvs in (half.float(), half))
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    "command, line, words",
    [
        (sample, "interpolate a.png b.png --steps 1", "at least 2"),
        (sample, "encode ~/empty --restore_ema_path x", "^/.+/empty holds no image"),
        (files_to_npy, "~/absent a.npy", "^/.+/absent is neither"),
        (files_to_npy, "photos a.npy --sides 3", "did you mean --side"),
    ],
)
def test_refused_before_weights_are_read(command, line, words, tmp_path, monkeypatch):
    """A `~` in quotes is the home folder, as in an option."""
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["command", *line.split()])
    with pytest.raises(UserError, match=words):
        command.main()
