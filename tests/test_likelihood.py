"""The likelihood and the Gaussians against the original's figures, and against their meaning."""

import numpy as np
import pytest
import torch
from golden import figures

from vae_helpers import (
    discretized_mix_logistic_loss,
    draw_gaussian_diag_samples,
    gaussian_analytical_kl,
    sample_from_discretized_mix_logistic,
)


@pytest.mark.parametrize("K", [10, 5, 2])
@pytest.mark.parametrize("low_bit", [False, True])
def test_mixture(K, low_bit):
    expected = figures("likelihood")[f"mixtures={K},low_bit={low_bit}"]
    r = np.random.RandomState(11 + K)
    l = (2 * r.standard_normal((3, 4, 4, 10 * K))).astype(np.float32)
    img = r.randint(0, 256, (3, 4, 4, 3))
    img[0, 0], img[0, 1] = 0, 255
    l[1, :, :, K:] *= 5
    if low_bit:
        img = np.floor(img / 8) * 8
    x = torch.from_numpy(((img - 127.5) / 127.5).astype(np.float32))
    l = torch.from_numpy(l).requires_grad_()

    loss = discretized_mix_logistic_loss(x, l, low_bit)
    assert loss.tolist() == pytest.approx(expected["loss"], rel=1e-5)
    (gradient,) = torch.autograd.grad(loss.sum(), l)
    assert gradient.double().norm().item() == pytest.approx(expected["grad_norm"], rel=1e-4)
    per_image = gradient.double().flatten(1).norm(dim=1).tolist()
    assert per_image == pytest.approx(expected["grad_norm_per_image"], rel=1e-4)

    torch.manual_seed(9)
    sample = sample_from_discretized_mix_logistic(l.detach(), K)
    assert sample.shape == (3, 4, 4, 3)
    assert sample.double().sum().item() == pytest.approx(expected["sample_seed9_sum"], rel=1e-5)
    assert sample[0, 0, 0].tolist() == pytest.approx(expected["sample_seed9_first"], rel=1e-5)
    assert sample[-1, -1, -1].tolist() == pytest.approx(expected["sample_seed9_last"], rel=1e-5)


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


def _mass(l, channel, levels, low_bit=False):
    """Probability of all levels of one channel, for l (10K,) whose others are surely at level 0."""
    x = torch.full((len(levels), 1, 1, 3), -1.0, dtype=torch.float64)
    x[:, 0, 0, channel] = (levels - 127.5) / 127.5
    nats = 3 * discretized_mix_logistic_loss(x, l.expand(len(levels), 1, 1, -1), low_bit)
    return (-nats).exp().sum().item()


def _mixture(channel, generator, K=3, log_scale=None):
    """Random parameters (10K,) in which every channel but one has its mass at level 0."""
    l = torch.randn(10 * K, generator=generator, dtype=torch.float64)
    rest = l[K:].view(3, 3, K)  # channel; mean, log scale, coefficient; component
    others = [c for c in range(3) if c != channel]
    rest[others, 0] = -100.0
    rest[others, 1] = 0.0
    if log_scale is not None:
        rest[channel, 0] *= 0.2  # well inside, whatever the other channels add
        rest[:, 2] = 0.0
        rest[channel, 1] = log_scale
    return l


@pytest.mark.parametrize("channel", range(3))
@pytest.mark.parametrize("seed", range(10))
def test_probabilities_of_the_256_levels_sum_to_1(channel, seed):
    l = _mixture(channel, torch.Generator().manual_seed(seed))
    assert _mass(l, channel, torch.arange(256.0)) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("log_scale, total", [(-3.5, 1.028), (-4.0, 1.028)])
def test_probabilities_of_the_32_levels_do_not(log_scale, total):
    """As documented: bins of 2/31 around targets 8/127.5 apart overlap."""
    l = _mixture(0, torch.Generator().manual_seed(0), log_scale=log_scale)
    assert _mass(l, 0, torch.arange(0, 256.0, 8), low_bit=True) == pytest.approx(total, abs=2e-3)


def test_a_wide_component_loses_mass_above_the_highest_of_the_32_levels():
    l = _mixture(0, torch.Generator().manual_seed(0), log_scale=1.0)
    assert _mass(l, 0, torch.arange(0, 256.0, 8), low_bit=True) < 0.7


def test_extreme_parameters_have_finite_gradients():
    for scale in (1e1, 1e3, 1e6, 1e18):
        l = scale * torch.randn(2, 4, 4, 30, generator=torch.Generator().manual_seed(0))
        l = l.requires_grad_()
        x = torch.linspace(-1, 1, 96).view(2, 4, 4, 3)
        (gradient,) = torch.autograd.grad(discretized_mix_logistic_loss(x, l).sum(), l)
        assert gradient.isfinite().all(), scale
