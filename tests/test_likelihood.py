"""The mixture's loss, samples and mean: the original's figures, their meaning, their memory."""

import bench
import numpy as np
import pytest
import torch
from golden import figures, generators, model
from hypothesis import given
from hypothesis import strategies as st
from reference import plain_mixture_loss
from torch import nn

import likelihood
from likelihood import (
    discretized_mix_logistic_loss,
    mean_of_discretized_mix_logistic,
    sample_from_discretized_mix_logistic,
)


@pytest.mark.parametrize("kept", [0, likelihood.KEPT_BYTES])
@pytest.mark.parametrize("K", [10, 5, 2])
@pytest.mark.parametrize("low_bit", [False, True])
def test_mixture(K, low_bit, kept, monkeypatch):
    monkeypatch.setattr(likelihood, "KEPT_BYTES", kept)
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


@torch.no_grad()
@pytest.mark.parametrize("spread", [0.3, 3])  # hardly any level is clipped, and many are
def test_the_mean_of_the_mixture_is_the_mean_of_its_samples(spread):
    torch.manual_seed(0)
    l = spread * torch.randn(1, 2, 2, 30)
    l[..., 3:].view(1, 2, 2, 3, 9)[..., 3:6] = -4  # logistics of scale e^-4
    mean = mean_of_discretized_mix_logistic(l, 3)
    n = 20_000
    sampled = sample_from_discretized_mix_logistic(l.expand(n, -1, -1, -1), 3)
    # Levels between -1 and 1: three standard errors of their mean are at most 0.021.
    assert torch.allclose(sampled.mean(dim=0), mean[0], atol=0.021)
    H, net = model("tiny")
    a, b = (net.forward_uncond_samples(2, 0, generators(2, k), mean=True) for k in (1, 2))
    assert np.array_equal(a, b)  # no noise at all


# ---- probabilities ---------------------------------------------------------------------------


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


parameters = st.floats(-4, 4, width=32)


@given(
    mean=st.floats(-1.5, 1.5, width=32),
    log_scale=st.floats(-8, 2, width=32),
    logit=parameters,
    channel=st.integers(0, 2),
)
def test_the_probabilities_of_all_levels_sum_to_one(mean, log_scale, logit, channel):
    """Of one sub-pixel in two components, the other two being certain to have level 0."""
    l = torch.zeros(256, 1, 1, 20)
    rest = l[..., 2:].view(256, 1, 1, 3, 6)
    rest[..., 0:2], rest[..., 2:4] = -9.0, -7.0  # mean, log scale: level 0, certainly
    rest[..., channel, 0:2] = torch.tensor([mean, -mean / 2])
    rest[..., channel, 2:4] = torch.tensor([log_scale, -1.0])
    l[..., 0] = logit
    levels = torch.zeros(256, 1, 1, 3)
    levels[..., channel] = torch.arange(256.0)[:, None, None]
    nats = discretized_mix_logistic_loss((levels - 127.5) / 127.5, l) * 3
    assert torch.exp(-nats.double()).sum().item() == pytest.approx(1, abs=2e-3)


# ---- extremes --------------------------------------------------------------------------------


def test_extreme_parameters_have_finite_gradients():
    for scale in (1e1, 1e3, 1e6, 1e18):
        l = scale * torch.randn(2, 4, 4, 30, generator=torch.Generator().manual_seed(0))
        l = l.requires_grad_()
        x = torch.linspace(-1, 1, 96).view(2, 4, 4, 3)
        (gradient,) = torch.autograd.grad(discretized_mix_logistic_loss(x, l).sum(), l)
        assert gradient.isfinite().all(), scale


extreme = st.floats(width=32, allow_nan=False, allow_infinity=False) | st.sampled_from(
    [3.4028234663852886e38, -3.4028234663852886e38, 1e-45, 0.0, -0.0]
)


@given(st.lists(extreme, min_size=20, max_size=20), st.integers(0, 255), st.booleans())
def test_the_likelihood_is_finite_for_any_finite_parameters(values, level, low_bit):
    l = torch.tensor(values).reshape(1, 1, 1, 20).requires_grad_()
    x = torch.full((1, 1, 1, 3), (level - 127.5) / 127.5)
    loss = discretized_mix_logistic_loss(x, l, low_bit)
    loss.sum().backward()
    assert loss.isfinite().all() and l.grad.isfinite().all()


# ---- computed in parts -----------------------------------------------------------------------


def image_and_mixture(size, dtype=torch.float32):
    torch.manual_seed(0)
    x = torch.randint(0, 256, (1, size, size, 3), dtype=dtype) / 127.5 - 1
    return x, torch.randn(1, size, size, 100, dtype=dtype).requires_grad_()


def calls(x, l):
    with bench._CountCalls() as counter:
        discretized_mix_logistic_loss(x, l).sum().backward()
    return counter.calls


def test_memory_of_the_mixtures_loss():
    x, l = image_and_mixture(128)
    n_bytes = 4 * (x.numel() + l.numel())

    def peak(loss):
        l.grad = None
        return bench.peak_bytes("cpu", lambda: loss(x, l, False).sum().backward()) / n_bytes

    assert peak(discretized_mix_logistic_loss) < 3 < peak(plain_mixture_loss)


@pytest.mark.small
def test_what_autograd_keeps_of_the_mixtures_loss_is_bounded():
    """What is small it keeps whole, for less time; of larger inputs the gradient alone."""

    def kept(side):
        x, l = image_and_mixture(side)
        return bench.saved_bytes(nn.Module(), lambda: discretized_mix_logistic_loss(x, l)) / (
            x.nbytes + l.nbytes
        )

    assert 5 < kept(12) < 7  # 59 KB
    assert kept(13) < 1.1  # 70 KB


def test_small_inputs_of_the_mixtures_loss_are_one_part():
    """As many operators for 4 KB as for 100; of 128 x 128 pixels, 7 MB, seven times as many."""
    one = calls(*image_and_mixture(3))
    assert calls(*image_and_mixture(16)) == one
    assert 6 * one < calls(*image_and_mixture(128)) < 8 * one


@pytest.mark.parametrize("low_bit", [False, True])
def test_the_mixtures_loss_in_parts_is_the_loss(low_bit, monkeypatch):
    x, l = image_and_mixture(9, torch.float64)
    whole = calls(x, l)
    monkeypatch.setitem(likelihood.PART_BYTES, "cpu", x.nbytes + l.nbytes >> 3)
    assert 7 * whole < calls(x, l) < 9 * whole  # 81 pixels are no multiple of 8
    x.requires_grad_()
    weight = torch.tensor([3.0])
    losses = [f(x, l, low_bit) for f in (discretized_mix_logistic_loss, plain_mixture_loss)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-12)
    for own, plain in zip(
        *(torch.autograd.grad((weight * loss).sum(), (x, l)) for loss in losses), strict=True
    ):
        assert torch.allclose(own, plain, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("n_parts", [1, 3])
def test_the_mixtures_loss_where_no_gradient_is_wanted(n_parts, monkeypatch):
    """Of a leaf that wants a gradient elsewhere: neither computed nor in the way."""
    x, l = image_and_mixture(3)
    loss = discretized_mix_logistic_loss(x, l)
    monkeypatch.setitem(likelihood.PART_BYTES, "cpu", -(-(x.nbytes + l.nbytes) // n_parts))
    for context in (torch.no_grad(), torch.inference_mode()):
        with context, bench._CountCalls() as counter:
            assert torch.allclose(discretized_mix_logistic_loss(x, l), loss, rtol=1e-6)
        assert 30 * n_parts < counter.calls < 70 * n_parts  # of forward operators


# ---- one channel -----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_grey_levels_sum_to_1_and_are_those_of_red(seed):
    """A grey pixel is a red one whose green and blue are certain."""
    K = 3
    l = _mixture(0, torch.Generator().manual_seed(seed), K)
    grey = torch.cat([l[:K], l[K:].view(3, 3, K)[0, :2].flatten()])  # logits, means, log scales
    levels = (torch.arange(256.0, dtype=torch.float64) - 127.5) / 127.5
    x = levels.view(-1, 1, 1, 1)
    nats = discretized_mix_logistic_loss(x, grey.expand(256, 1, 1, -1))  # per dimension: one
    assert (-nats).exp().sum().item() == pytest.approx(1, abs=1e-4)
    rgb = torch.cat([x, torch.full((256, 1, 1, 2), -1.0)], dim=-1)
    red = 3 * discretized_mix_logistic_loss(rgb, l.expand(256, 1, 1, -1))
    assert torch.allclose(nats, red, atol=1e-9)


def test_grey_gradients_are_the_plain_ones():
    torch.manual_seed(0)
    l = (3 * torch.randn(2, 4, 4, 15)).double().requires_grad_()
    x = (torch.randint(0, 256, (2, 4, 4, 1)).double() - 127.5) / 127.5
    x[0, 0], x[0, 1] = -1, 1
    for low_bit in (False, True):
        ours, plain = (loss(x, l, low_bit) for loss in (discretized_mix_logistic_loss,
                                                        plain_mixture_loss))  # fmt: skip
        assert torch.allclose(ours, plain)
        gradients = [torch.autograd.grad(loss.sum(), l)[0] for loss in (ours, plain)]
        assert torch.allclose(*gradients) and gradients[0].isfinite().all()
    extreme = (1e18 * torch.randn(2, 4, 4, 15)).requires_grad_()
    [gradient] = torch.autograd.grad(
        discretized_mix_logistic_loss(x.float(), extreme).sum(), extreme
    )
    assert gradient.isfinite().all()


@torch.no_grad()
def test_grey_samples_have_the_mixture_s_mean():
    torch.manual_seed(0)
    l = 0.3 * torch.randn(1, 2, 2, 9)
    l[..., 6:] = -4  # logistics of scale e^-4
    mean = mean_of_discretized_mix_logistic(l, 3)
    sampled = sample_from_discretized_mix_logistic(l.expand(20_000, -1, -1, -1), 3)
    assert sampled.shape == (20_000, 2, 2, 1) and mean.shape == (1, 2, 2, 1)
    assert torch.allclose(sampled.mean(dim=0), mean[0], atol=0.021)
    wide = l.clone()
    wide[..., 6:] = 3
    assert sample_from_discretized_mix_logistic(wide.expand(50, -1, -1, -1), 3).abs().max() == 1
