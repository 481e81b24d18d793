"""Start-up, the model with its EMA, averages for the log."""

import math

import pytest
import torch
from golden import inputs, model
from torch import nn

import compiling
import train_helpers
from hps import get_hparams
from precision import forward_precision
from train_helpers import accumulate_stats, load_vaes, setup_mpi, update_ema


def test_tf32_and_cudnn_trials_are_as_asked(monkeypatch):
    flags = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [f.allow_tf32 for f in flags]
    H = get_hparams("digits", device="cpu")
    try:
        for precision, allowed in (("tf32", True), ("fp32", False), ("bf16", False)):
            H.update(precision=precision, cudnn_benchmark=allowed)
            setup_mpi(H)
            assert [f.allow_tf32 for f in flags] == [allowed] * 2
            assert torch.backends.cudnn.benchmark == allowed
            with forward_precision("fp32", "cpu"):  # the call of who uses train.evaluate alone
                assert [f.allow_tf32 for f in flags] == [allowed] * 2
    finally:
        torch.backends.cudnn.benchmark = False
        for flag, allowed in zip(flags, before, strict=True):
            flag.allow_tf32 = allowed


def _elbo(H, vae):
    torch.manual_seed(0)
    with torch.no_grad():
        return vae(*inputs(H, 2, 0))["elbo"].item()


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


def test_compile_compiles_the_network(monkeypatch):
    modes = []

    def compile(function, **how):
        modes.append(how["dynamic"])
        return function

    monkeypatch.setattr(compiling, "keep_compiled", lambda: None)
    monkeypatch.setattr(train_helpers, "try_compiler", lambda device: None)
    monkeypatch.setattr(torch, "compile", compile)
    H = get_hparams("digits", device="cpu", compile=True)
    load_vaes(H, print)
    assert modes == [False] * 2


def test_update_ema():
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    want = [0.9 * e + 0.1 * p for e, p in zip(b.parameters(), a.parameters(), strict=True)]
    update_ema(a, b, 0.9)
    assert all(map(torch.allclose, b.parameters(), want))


def test_accumulate_stats():
    keys = ("elbo", "rate", "grad_norm", "rate_nans", "skipped_updates")
    rows = [(9, 9, 99, 9, 9), (1, 2, 3, 0, 1), (math.nan, 4, math.inf, 1, 1), (2, 6, 2, 0, 0)]
    stats = [dict(zip(keys, map(float, row), strict=True)) for row in rows]
    result = accumulate_stats(stats, 3)
    assert result == pytest.approx(
        {"elbo": math.nan, "elbo_filtered": 1.5, "rate": 4, "grad_norm": 3, "rate_nans": 1,
         "skipped_updates": 2},
        nan_ok=True,
    )  # fmt: skip
