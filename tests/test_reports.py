"""What a run tells of itself: summary, rates, bound, progress line, TensorBoard."""

import contextlib
import os
import pty
import subprocess
import sys
import termios
import threading

import imageio.v3 as imageio
import pytest
import torch
from fakes import tiny_network
from golden import model
from runs import ROOT, environment, log_of
from torch.profiler import ProfilerActivity, profile

import reports
from errors import UserError
from hps import get_hparams
from reports import activation_bytes, log_evaluation, progress_bar, summary, with_tensorboard
from vae import VAE

RUN = [sys.executable, ROOT / "train.py", "--hps", "digits", *tiny_network(8), "--num_epochs=1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(its folder, its stdout, what the terminal showed that is its stderr) of a run."""
    cwd = tmp_path_factory.mktemp("run")
    ours, its = pty.openpty()
    termios.tcsetwinsize(its, (24, 100))
    shown = []

    def read():
        with contextlib.suppress(OSError):  # the terminal is closed
            while True:
                shown.append(os.read(ours, 4096))

    argv = [*RUN, "--tensorboard", "--iw_samples=1"]
    process = subprocess.Popen(
        argv, cwd=cwd, env=environment(), stdout=subprocess.PIPE, stderr=its, text=True
    )
    os.close(its)
    reader = threading.Thread(target=read)
    reader.start()
    out, _ = process.communicate()
    reader.join()
    os.close(ours)
    terminal = b"".join(shown).decode()
    assert process.returncode == 0, terminal
    return cwd / "saved_models" / "test", out, terminal


def test_rates_by_layer_and_resolution(run):
    folder, _, _ = run
    events = {e["type"]: e for e in log_of(folder) if "type" in e}
    rates, loss = events["eval_rates"], events["eval_loss"]
    assert rates["step"] == loss["step"] == 43 and len(rates["rate_per_layer"]) == 3
    assert sum(rates["rate_per_layer"]) == pytest.approx(loss["rate"], rel=1e-4)
    assert list(rates["rate_per_resolution"].values()) == rates["rate_per_layer"]  # one layer each
    assert list(rates["rate_per_resolution"]) == ["1", "4", "8"]
    assert imageio.imread(folder / "rates-43.png").shape[1] > 1000


def test_one_sample_of_the_bound_is_the_elbo(run):
    loss = next(e for e in log_of(run[0]) if e.get("type") == "eval_loss")
    assert loss["iw_elbo"] == pytest.approx(loss["elbo"], rel=1e-6)


def test_rates_of_layers_of_one_resolution_are_added(tmp_path, monkeypatch):
    titles, draw = [], reports.draw_rates
    monkeypatch.setattr(reports, "draw_rates", lambda *a: titles.append(a[-1]) or draw(*a))
    H, vae = model("tiny")
    H.update(save_dir=str(tmp_path), desc="test")
    bases = [block.base for block in vae.decoder.dec_blocks]
    assert len(set(bases)) < len(bases)
    rates, logged = [2.0**-i for i in range(len(bases))], []
    figures = {"elbo": 3.0, "rate_per_layer": rates}
    log_evaluation(H, vae, figures, lambda **e: logged.append(e), "9", type="eval_loss", step=9)
    assert [e["type"] for e in logged] == ["eval_rates", "eval_loss"]
    wanted = {r: sum(x for x, b in zip(rates, bases, strict=True) if b == r) for r in set(bases)}
    assert logged[0]["rate_per_resolution"] == pytest.approx(wanted, rel=1e-4)
    assert titles == ["test, step 9: rate by layer"] and (tmp_path / "rates-9.png").exists()


def test_a_terminal_shows_the_time_left_and_files_do_not(run, capfd):
    folder, out, terminal = run
    assert "/43 [" in terminal and "bits/dim" in terminal and "steps/s" in terminal
    logged = (folder / "log.txt").read_text().splitlines()
    hparams = [line for line in logged if "type: hparam" in line]  # in the files alone
    assert hparams and [line for line in logged if line not in hparams] == out.splitlines()
    progress_bar(10, 0).update(5)
    assert capfd.readouterr().err == ""  # which is no terminal


def test_tensorboard(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _, _ = run
    scalars = EventAccumulator(str(folder))
    scalars.Reload()
    [point] = scalars.Scalars("eval_loss/bits_per_dim")
    loss = next(e for e in log_of(folder) if e.get("type") == "eval_loss")
    assert point.step == 43 and point.value == pytest.approx(loss["bits_per_dim"], rel=1e-6)
    steps = [e["step"] for e in log_of(folder) if e.get("type") == "train_loss"]
    assert [p.step for p in scalars.Scalars("train_loss/grad_norm")] == steps


def test_tensorboard_that_is_not_installed(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        with_tensorboard(print, str(tmp_path))


def test_dry_run_ends_after_the_summary(tmp_path):
    argv = [*RUN, "--dry_run"]
    done = subprocess.run(argv, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    for fact in (
        "preset    digits", "parameters, 3 stochastic layers: 1 at 1x1, 1 at 4x4, 1 at 8x8",
        "digits, 8x8, grey, 1,397 to train on, 200 to validate", "cpu, fp32, 1 process",
        "32 a process, 32 a step", "AdamW, lr 0.002 after 100 steps", "43 steps",
        "MiB a process", str(tmp_path / "saved_models" / "test"),
    ):  # fmt: skip
        assert fact in done.stdout
    assert "train_loss" not in done.stdout and not list(tmp_path.rglob("*.th"))


@pytest.mark.small
@pytest.mark.parametrize("n", [4, 32])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_of_activations_is_what_a_forward_pass_leaves(checkpointing, n):
    """Counted without data, against the bytes alive after a real pass."""
    H = get_hparams("digits", n_batch=n, checkpoint_activations=checkpointing)
    vae, x = VAE(H), torch.zeros(n, 8, 8, 1)
    if checkpointing:
        vae.checkpoint_activations()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        elbo = vae(x, x)["elbo"]
    events = profiler.profiler.kineto_results.events()
    alive = sum(e.nbytes() for e in events if e.name() == "[memory]")
    if checkpointing:  # the generator's state before each segment, in any batch as large
        n_segments = len(vae.encoder.segments) + len(vae.decoder.segments)
        alive -= n_segments * torch.get_rng_state().nbytes
    assert elbo.requires_grad and activation_bytes(H) == pytest.approx(alive, rel=0.05)


def test_memory_of_a_batch_of_any_size_is_counted_on_32_images():
    """A million of them, before anything else refuses it: their mixtures are some 12,600 parts."""
    one, many = (activation_bytes(get_hparams("cifar10", n_batch=n)) for n in (32, 10**6))
    assert many == one * 10**6 // 32


def test_every_preset_has_a_summary():
    H = get_hparams("ffhq1024", device="cpu", hparam_sets="ffhq1024")
    with torch.device("meta"):
        vae = VAE(H)
    text = "\n".join(summary(H, vae, 65000, 5000))
    assert "109,366,904 parameters, 70 stochastic layers" in text
    assert "GiB a process to train: 2.04 GiB for weights and optimizer" in text  # 20 bytes each
