"""The fast and light ways to run the network give the figures of the plain one."""

import copy
import math

import bench
import numpy as np
import pytest
import torch
from golden import inputs, model
from reference import PlainVAE
from torch import nn
from torch.distributions import Normal, kl_divergence

import fused
import recomputing
import reports
from fused import gelu_conv, gelu_convs
from hps import get_hparams
from recomputing import segments
from vae import VAE
from vae_helpers import gaussian_analytical_kl, get_1x1

MODELS = ["tiny", "tiny_lowbit", "tiny_widths", "tiny_res2"]


def gradients(module, batch, seed=1, bf16=False):
    module.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        stats = module(*batch)
    stats["elbo"].backward()
    return stats, {k.removeprefix("vae."): p.grad for k, p in module.named_parameters()}


def check_against_the_reference(name, n):
    H, vae = model(name)
    plain, batch = PlainVAE(vae), inputs(H, n, seed=7)
    (stats, grads), (plain_stats, plain_grads) = gradients(vae, batch), gradients(plain, batch)
    for key, value in stats.items():
        assert value.item() == pytest.approx(plain_stats[key].item(), rel=1e-5)
    for key, grad in grads.items():
        assert (grad - plain_grads[key]).norm() <= 5e-4 * plain_grads[key].norm(), key
    pictures = []
    for m in (vae, plain):
        torch.manual_seed(4)
        pictures.append(m.forward_uncond_samples(n).astype(int))
    difference = np.abs(pictures[0] - pictures[1])
    assert difference.max() <= 1 and (difference > 0).sum() <= 5


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_the_reference_is_the_network(name, n):
    check_against_the_reference(name, n)


@pytest.mark.small
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(
    "lone, above, tiny",
    [
        (0, 0, fused.TINY),
        (0, 0, 0),
        (10**9, 0, fused.TINY),
        (10**9, fused.ONEDNN_ABOVE, fused.TINY),
    ],
)
@pytest.mark.parametrize("name", MODELS)
def test_a_small_network_is_the_reference_too(name, lone, above, tiny, n, monkeypatch):
    """Its convolutions as products, its blocks uncut or cut, or of one image as of none else."""
    monkeypatch.setattr(fused, "LONE", lone)
    monkeypatch.setattr(fused, "ONEDNN_ABOVE", above)
    monkeypatch.setattr(fused, "TINY", tiny)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    check_against_the_reference(name, n)


@pytest.mark.small
def test_small_networks_are_cut_into_no_more_operators():
    """Than the plain rendition by a fifth, for one image: what they cost is the start of each."""
    for name, n in (("digits", 1), ("photos32", 1)):
        vae, batch = preset(name)
        plain, batch = PlainVAE(vae), [t.expand(n, -1, -1, -1).contiguous() for t in batch]
        calls = {}
        for m in (plain, vae):
            with bench._CountCalls() as counter:
                m(*batch)["elbo"].backward()
            calls[m] = counter.calls
        assert calls[vae] < 1.2 * calls[plain], (name, n)


@pytest.mark.small
def test_a_lone_image_meets_hooks_and_what_replaces_a_convolution(monkeypatch):
    vae, batch = preset("digits")
    block, seen = vae.decoder.dec_blocks[-1].resnet, []

    def loss():
        torch.manual_seed(0)
        with torch.no_grad():
            return vae(*batch)["elbo"].item()

    expected = loss()
    block.c3.register_forward_hook(lambda *_: seen.append("c3"))
    kept = []
    block.c3.register_forward_hook(lambda module, inputs, out: kept.append((out, out.clone())))
    conv = block.c2
    del block.c2
    block.c2 = lambda t: (seen.append("c2"), conv(t))[1]  # no module
    assert loss() == pytest.approx(expected, rel=1e-6)
    assert seen == ["c2", "c3"]
    assert all(torch.equal(*outputs) for outputs in kept)  # though GELU is written over others
    monkeypatch.setattr(fused, "LONE", 0)
    assert loss() == pytest.approx(expected, rel=1e-6)


class InDouble(nn.Module):
    """A convolution that a program has put in place, which computes and returns another dtype."""

    def __init__(self, conv):
        super().__init__()
        self.conv = conv.double()

    def forward(self, t):
        return self.conv(t.double())


@pytest.mark.small
@pytest.mark.parametrize("name", ["c1", "c2", "c3"])
@torch.no_grad()
def test_a_lone_image_goes_on_in_the_dtype_of_a_replaced_convolution(name):
    vae, (x, _) = preset("digits")
    expected = vae.encoder(x)[8]
    block = vae.encoder.enc_blocks[0]
    setattr(block, name, InDouble(getattr(block, name)))
    assert torch.allclose(vae.encoder(x)[8].float(), expected, atol=1e-5)


@pytest.mark.small
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@torch.no_grad()
def test_what_is_traced_of_one_image_serves_several():
    vae, (x, _) = preset("digits")
    vae.requires_grad_(False)
    traced = torch.jit.trace(lambda t: [*vae.encoder(t).values()][-1], x)
    five = torch.randn(5, *x.shape[1:])
    assert torch.allclose(traced(five), vae.encoder(five)[1], atol=1e-5)


# ---- memory ----------------------------------------------------------------------------------


def preset(name):
    torch.manual_seed(0)
    H = get_hparams(name)
    shape = 1, H.image_size, H.image_size, H.image_channels
    return VAE(H), (torch.randn(shape), torch.rand(shape) * 2 - 1)


def test_bytes_saved_for_the_backward_pass():
    vae, batch = preset("cifar10")
    plain = PlainVAE(vae)
    reference = bench.saved_bytes(plain, lambda: plain(*batch)["elbo"])

    def share(bf16):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return bench.saved_bytes(vae, lambda: vae(*batch)["elbo"]) / reference

    assert share(False) < 0.4 and share(True) < 0.25
    vae.checkpoint_activations()
    assert share(False) < 1 / 15 and share(True) < 1 / 20


@pytest.mark.small
def test_what_is_kept_is_not_what_autograd_would_keep_where_that_is_much():
    """Nor of few pixels, where images are many; of a lone small image its time is worth more."""
    kept = reports.activation_bytes(get_hparams("cifar10", n_batch=8))
    assert kept < 8 * 229.2e6  # docs/performance.md
    for shape, lean in {
        (8, 384, 4, 4): True,
        (2, 64, 32, 32): True,
        (1, 64, 32, 32): False,
        (1, 384, 32, 32): True,
        (32, 64, 8, 8): False,
    }.items():
        conv = get_1x1(shape[1], 8)
        kept = gelu_conv(torch.ones(shape), conv).grad_fn.name()
        assert ("_GeluConvs" in kept) == lean, shape


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True])
def test_peak_of_a_checkpointed_step(bf16):
    vae, batch = preset("cifar10")
    batch = [t.expand(8, -1, -1, -1).contiguous() for t in batch]
    plain = PlainVAE(vae)
    reference = bench.peak_bytes("cpu", lambda: gradients(plain, batch))
    vae.checkpoint_activations()
    peak = bench.peak_bytes("cpu", lambda: gradients(vae, batch, bf16=bf16))
    assert peak < reference / (10 if bf16 else 6)


def test_segments():
    alike = [(8, None)] * 7
    assert segments([*alike, (8, 2), (4, None)]) == [
        slice(0, 3), slice(3, 6), slice(6, 7), slice(7, 8), slice(8, 9)
    ]  # fmt: skip


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_checkpointed_gradients_are_equal_bit_for_bit(name, bf16, monkeypatch):
    H, vae = model(name)
    batch = inputs(H, 3, seed=7)
    stats, grads = gradients(vae, batch, bf16=bf16)
    calls = []
    checkpoint = recomputing.checkpoint
    monkeypatch.setattr(
        recomputing, "checkpoint", lambda *a, **k: calls.append(a) or checkpoint(*a, **k)
    )
    vae.checkpoint_activations()
    again, checkpointed = gradients(vae, batch, bf16=bf16)
    assert len(calls) == len(vae.encoder.segments) + len(vae.decoder.segments)
    assert again == stats
    for key, grad in grads.items():
        assert torch.equal(grad, checkpointed[key]), key
    # The noise after a step is that of a step without.
    after = torch.randn(1)
    gradients(copy.deepcopy(vae), batch, bf16=bf16)
    assert torch.equal(after, torch.randn(1))


def test_checkpointing_with_noise_of_the_images_own():
    H, vae = model("tiny")
    batch = inputs(H, 3, seed=7)

    def gradient():
        vae.zero_grad()
        generators = [torch.Generator().manual_seed(i) for i in range(3)]
        sum(vae.distortion_and_rate(*batch, generators)).sum().backward()
        return vae.decoder.dec_blocks[0].enc.c1.weight.grad.clone()

    without = gradient()
    vae.checkpoint_activations()
    assert torch.equal(without, gradient())


# ---- functions with a backward pass of their own ---------------------------------------------


@pytest.mark.small
@pytest.mark.parametrize("small", [0, 2**14])
@pytest.mark.parametrize("kernel, size", [(1, 3), (3, 3), (1, 16)])
def test_gradients_of_gelu_convs(kernel, size, small, monkeypatch):
    monkeypatch.setattr(fused, "SMALL", small)
    monkeypatch.setattr(fused, "SMALL_BATCH", small)
    torch.manual_seed(0)
    x = torch.randn(2, 2, size, size, dtype=torch.float64)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    weights = [torch.randn(n, 2, kernel, kernel, dtype=torch.float64) for n in (3, 1)]
    biases = [torch.randn(n, dtype=torch.float64) for n in (3, 1)]
    leaves = [t.requires_grad_() for pair in zip(weights, biases, strict=True) for t in pair]
    outputs = gelu_convs(x, *leaves)
    assert ("_GeluConvs" in outputs[0].grad_fn.name()) == (small == 0)
    assert torch.autograd.gradcheck(gelu_convs, (x, *leaves), fast_mode=True)
    assert all(y.is_contiguous(memory_format=torch.channels_last) for y in outputs)


def test_gradients_of_the_kl():
    leaves = [torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    assert torch.autograd.gradcheck(gaussian_analytical_kl, leaves)
    assert torch.autograd.gradgradcheck(gaussian_analytical_kl, leaves)


# ---- layout ----------------------------------------------------------------------------------


def check_strides(name, n, bf16):
    H, vae = model(name)
    _, grads = gradients(vae, inputs(H, n, seed=7), bf16=bf16)
    for key, p in vae.named_parameters():
        assert grads[key].stride() == p.stride(), key


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_have_the_strides_of_their_weights(name, n, bf16):
    """Else DistributedDataParallel warns in every process, and copies."""
    check_strides(name, n, bf16)


@pytest.mark.small
@pytest.mark.parametrize("tiny", [fused.TINY, 0])
@pytest.mark.parametrize("n", [1, 3])
def test_gradients_of_a_small_network_have_them_too(n, tiny, monkeypatch):
    monkeypatch.setattr(fused, "ONEDNN_ABOVE", 0)
    monkeypatch.setattr(fused, "TINY", tiny)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    check_strides("tiny", n, False)


# ---- precision -------------------------------------------------------------------------------


def test_a_network_of_float64():
    H, vae = model("tiny")
    batch = inputs(H, 3, seed=7)
    stats, _ = gradients(vae.double(), [t.double() for t in batch])
    plain_stats, _ = gradients(PlainVAE(vae), [t.double() for t in batch])
    for key, value in stats.items():
        assert value.dtype == torch.float64
        assert value.item() == pytest.approx(plain_stats[key].item(), rel=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_bf16_is_for_the_convolutions_alone(name):
    H, vae = model(name)
    batch = inputs(H, 3, seed=7)
    stats, grads = gradients(vae, batch)
    bf16_stats, bf16_grads = gradients(vae, batch, bf16=True)
    for key, value in bf16_stats.items():
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(stats[key].item(), rel=2e-2), key
    assert bf16_stats != stats
    assert {g.dtype for g in bf16_grads.values()} == {torch.float32}
    total, error = (
        math.hypot(*(t.norm().item() for t in tensors))
        for tensors in (grads.values(), [bf16_grads[k] - g for k, g in grads.items()])
    )
    assert error < 0.1 * total
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        activations = vae.encoder(batch[0])
        px_z, latents = vae.decoder(activations, get_latents=True, get_gaussians=True)
        assert px_z.dtype == torch.float32
        assert {t.dtype for s in latents for t in s.values()} == {torch.float32}
        assert vae.decoder.out_net(px_z).dtype == torch.float32
    for layer in latents:
        assert not torch.equal(layer["qm"], layer["qm"].bfloat16().float())
        qm, qv, pm, pv = (layer[key].double() for key in ("qm", "qv", "pm", "pv"))
        kl = kl_divergence(Normal(qm, qv.exp()), Normal(pm, pv.exp()))
        assert torch.allclose(layer["kl"].double(), kl, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bf16", [False, True])
def test_weights_changed_in_place_take_effect(bf16):
    H, vae = model("tiny")
    batch = inputs(H, 3, seed=7)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16), torch.no_grad():
        before = vae(*batch)["elbo"].item()
        for block in (vae.encoder.enc_blocks[0].c2, vae.decoder.dec_blocks[-1].resnet.c1):
            block.weight.mul_(1.5)
            torch.manual_seed(1)
            after = vae(*batch)["elbo"].item()
            assert after != before
            before = after
