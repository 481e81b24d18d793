"""Gaussians, convolutions, small functions: their figures, their layouts."""

import numpy as np
import pytest
import torch
from golden import figures
from torch import nn

from hps import Hyperparams
from vae_helpers import (
    HModule,
    const_max,
    const_min,
    draw_gaussian_diag_samples,
    gaussian_analytical_kl,
    get_1x1,
    get_3x3,
    get_conv,
    log_prob_from_logits,
)


def test_gaussians():
    expected = figures("likelihood")
    mu1, mu2, logsigma1, logsigma2 = (
        torch.from_numpy(np.random.RandomState(seed).standard_normal(5).astype(np.float32))
        for seed in (20, 21, 22, 23)
    )
    kl = gaussian_analytical_kl(mu1, mu2, logsigma1, logsigma2)
    assert kl.tolist() == pytest.approx(expected["gaussian_kl"]["kl"], rel=1e-5)
    torch.manual_seed(21)
    sample = draw_gaussian_diag_samples(mu1, logsigma1)
    assert sample.tolist() == pytest.approx(expected["gaussian_sample_seed21"], rel=1e-5)


def test_convolutions():
    conv = get_conv(4, 6, 3, 2, 1, groups=2)
    assert conv.weight.shape == (6, 2, 3, 3) and conv.stride == (2, 2) and not conv.bias.any()
    assert get_3x3(4, 6, zero_bias=False).bias.any()
    conv = get_1x1(4, 6, zero_weights=True)
    assert conv.weight.shape == (6, 4, 1, 1) and not conv.weight.any()
    assert get_3x3(1, 1)(torch.ones(1, 1, 5, 5)).shape == (1, 1, 5, 5)


def test_hmodule_builds_from_H():
    class Linear(HModule):
        def build(self):
            self.layer = nn.Linear(self.H.width, 1)

    H = Hyperparams(width=3)
    made = Linear(H)
    assert made.H is H and made.layer.in_features == 3


def test_small_functions():
    t = torch.tensor([-2.0, 0.0, 2.0])
    assert const_max(t, 0.0).tolist() == [0, 0, 2]
    assert const_min(t, 0.0).tolist() == [-2, 0, 0]
    assert log_prob_from_logits(t[None]).exp().sum().item() == pytest.approx(1)
