"""--compile: the figures of the eager network, one shape a network, found again by the next run."""

import copy
import shutil
import subprocess
import sys

import pytest
import torch
from golden import inputs
from runs import ROOT, environment
from torch._dynamo.utils import counters

import compiling
import vae as vae_module
from bounds import distortion_and_rates
from compiling import compile_network
from fused import upsample
from hps import get_hparams
from noise import fill_noise, image_generators, noise_of_images
from vae import VAE


def network(enc_blocks="8x1,8d8,1x1", dec_blocks="1x1,8m1,8x1"):
    H = get_hparams("digits", width=16, enc_blocks=enc_blocks, dec_blocks=dec_blocks, device="cpu")
    torch.manual_seed(0)
    vae = VAE(H)
    for block in vae.decoder.dec_blocks:  # of a prior at 0 the rate is little more than rounding
        torch.nn.init.normal_(block.prior.c4.weight, std=3)
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.normal_(module.bias, std=0.1)
    return H, vae


@pytest.fixture
def graphs(monkeypatch):
    """graphs(): how many were traced; what is traced is then run by PyTorch, uncompiled."""
    real = torch.compile
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(
        torch,
        "compile",
        lambda f, **how: real(f, **how | {"backend": "eager", "fullgraph": True}),
    )
    return lambda: counters["stats"]["unique_graphs"]


def step(vae, batch, **labels):
    """(figures, gradients, state of the generator after it) of a pass with gradients."""
    vae.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    stats = vae(*batch, **labels)
    stats["elbo"].backward()
    grads = {name: p.grad for name, p in vae.named_parameters()}
    return {k: v.item() for k, v in stats.items()}, grads, torch.get_rng_state()


def check_same(found, wanted):
    assert found[0] == pytest.approx(wanted[0], rel=1e-5)
    for name, grad in wanted[1].items():
        if grad is None or found[1][name] is None:
            assert grad is found[1][name], name
            continue
        assert (grad - found[1][name]).norm() <= 5e-4 * grad.norm(), name
    assert torch.equal(found[2], wanted[2])


@pytest.mark.parametrize("whole", [True, False])
def test_a_compiled_network_is_the_network(whole, graphs, monkeypatch):
    """Steps and evaluations of the first shape are compiled, any other is as it was."""
    monkeypatch.setattr(compiling, "WHOLE", 99 if whole else 0)
    H, vae = network()
    ema = copy.deepcopy(vae).requires_grad_(False)
    batch, short = inputs(H, 3, seed=7), inputs(H, 2, seed=8)
    wanted = [step(vae, b) for b in (batch, short)]

    def evaluate(vae, batch):
        channels = []
        with (
            torch.inference_mode(),
            noise_of_images(image_generators(range(len(batch[0])), 5)) as noise,
        ):
            found = *distortion_and_rates(vae, *batch, channels), torch.cat(channels, dim=1)
        assert noise.draws == len(vae.decoder.dec_blocks)
        return found

    wanted_of_ema = [evaluate(ema, b) for b in (batch, short)]
    for m in (vae, ema):
        compile_network(m)
    n_graphs = []
    for _ in range(2):
        for b, figures in zip((batch, short), wanted, strict=True):
            check_same(step(vae, b), figures)
            n_graphs.append(graphs())
        for b, figures in zip((batch, short), wanted_of_ema, strict=True):
            for found, of_eager in zip(evaluate(ema, b), figures, strict=True):
                assert torch.allclose(found, of_eager, rtol=1e-4, atol=1e-5)
            evaluate(vae, b)  # of the weights themselves: eager
            n_graphs.append(graphs())
    trained, _, both, *later = n_graphs
    assert trained == n_graphs[1] and set(later) == {both}
    n_blocks = len(vae.encoder.enc_blocks) + len(vae.decoder.dec_blocks)
    assert (trained, both) == (1, 2) if whole else 1 < trained < both <= 2 * n_blocks


def test_labels_in_a_compiled_network(graphs):
    H, vae = network()
    batch, labels = inputs(H, 4, seed=7), torch.tensor([3, 9, -1, 3])
    wanted = step(vae, batch, labels=labels)
    rows = wanted[1]["decoder.label_xs.0"].flatten(1).any(dim=1)
    assert rows.nonzero().flatten().tolist() == [3, 9]
    compile_network(vae)
    check_same(step(vae, batch, labels=labels), wanted)
    check_same(step(vae, batch, labels=labels.tolist()), wanted)
    for wrong in (-2, 10):
        labels[1] = wrong
        with pytest.raises(ValueError, match=f"label {wrong}: this network knows 0 to 9"):
            step(vae, batch, labels=labels)
    assert graphs() == 1


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 4)])
def test_compiled_upsampling(size, graphs):
    t = torch.randn(2, 5, *size).contiguous(memory_format=torch.channels_last)
    assert torch.equal(torch.compile(upsample)(t, 3), upsample(t, 3))
    assert graphs() == 1


def test_what_is_changed_after_a_compiled_pass_counts(graphs):
    """Weights that learn from then on, or no longer; other weights; a module for a convolution."""
    H, vae = network()
    block = vae.decoder.dec_blocks[1]
    young, old = block.enc.c2.weight.requires_grad_(False), block.prior.c2.bias
    batch, calls = inputs(H, 3, seed=7), []
    compile_network(vae)
    compiled = compiling._networks[vae]
    real = compiled.function
    compiled.function = lambda *args: calls.append(args) or real(*args)

    def check(is_compiled):
        calls.clear()
        check_same(step(vae, batch), step(copy.deepcopy(vae), batch))
        assert len(calls) == is_compiled

    check(True)
    assert young.grad is None and old.grad is not None
    young.requires_grad_(True)
    check(False)
    young.requires_grad_(False)
    old.requires_grad_(False)
    check(False)
    assert old.grad is None
    old.requires_grad_(True)
    conv = block.resnet.c2
    conv.weight = torch.nn.Parameter(conv.weight.detach() + 1)
    check(True)
    of_mirrors = torch.nn.Conv2d(4, 4, 3, 1, 1, padding_mode="reflect")
    of_mirrors.load_state_dict(conv.state_dict())
    for module in (torch.nn.Sequential(torch.nn.Tanh(), conv), of_mirrors):
        block.resnet.c2 = module
        check(False)
    block.resnet.c2 = conv
    vae.to(memory_format=torch.channels_last)
    check(False)
    vae.to(memory_format=torch.contiguous_format).double()
    check(False)
    vae.float()
    check(True)
    assert graphs() == 1


def test_blocks_of_a_shape_are_compiled_once(graphs, monkeypatch):
    monkeypatch.setattr(compiling, "WHOLE", 0)
    H = get_hparams("digits", width=8, enc_blocks="8x4,8d8,1x3", dec_blocks="1x3,8m1,8x5")
    vae, batch = VAE(H), inputs(H, 3, seed=7)
    compile_network(vae)
    step(vae, batch)
    # Encoder: 8, 8 that pools, 1. Decoder: 1, 8; the first of each is laid out otherwise.
    assert graphs() <= 7 < 16


def test_copies_and_samples_of_a_compiled_network_are_eager(graphs):
    H, vae = network()
    compile_network(vae)
    again = copy.deepcopy(vae)
    assert set(again.state_dict()) == set(vae.state_dict())
    step(again, inputs(H, 3, seed=7))
    vae.forward_uncond_samples(2)
    vae.forward_get_latents(inputs(H, 3, seed=7)[0])
    assert graphs() == 0


def test_a_checkpointed_network_is_compiled_in_blocks(graphs):
    H, vae = network()
    batch = inputs(H, 3, seed=7)
    wanted = step(vae, batch)
    vae.checkpoint_activations()
    compile_network(vae)
    check_same(step(vae, batch), wanted)
    assert graphs() > 1


@pytest.mark.parametrize("draws", [1, 2])
@pytest.mark.parametrize("blocks", [compiling.WHOLE, 0])
def test_an_own_sampler_stays_as_it_is(blocks, draws, graphs, monkeypatch):
    """Compiled whole or in blocks; one that draws by its own means, or as we do, but twice."""
    monkeypatch.setattr(compiling, "WHOLE", blocks)

    def twice(m, v):
        noise = [fill_noise(m.shape, m, torch.Tensor.normal_) for _ in range(2)]
        return m + v.exp() * sum(noise)

    own = [lambda m, v: m + v.exp() * torch.rand_like(m), twice][draws - 1]
    monkeypatch.setattr(vae_module, "draw_gaussian_diag_samples", own)
    H, vae = network()
    batch = inputs(H, 3, seed=7)
    wanted = step(vae, batch)
    compile_network(vae)
    check_same(step(vae, batch), wanted)
    assert graphs() == 0


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="no C++ compiler")
@pytest.mark.parametrize("whole", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_compiled_code_agrees(whole, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiling, "WHOLE", 99 if whole else 0)
    H, vae = network("8d8", "1x1,8m1")
    batch, labels = inputs(H, 3, seed=7), torch.tensor([3, -1, 3])
    wanted = step(vae, batch, labels=labels)
    compile_network(vae)
    check_same(step(vae, batch, labels=labels), wanted)
    assert any(tmp_path.rglob("*.so"))


# ---- where compiled code is kept -------------------------------------------------------------

SAY = "import os, compiling; compiling.keep_compiled(); print(os.environ.get({!r}))"


def cache_of(tmp_path, **variables):
    """TORCHINDUCTOR_CACHE_DIR after keep_compiled, in a process with these variables."""
    env = environment() | {"HOME": str(tmp_path)} | variables
    for name in ("TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME"):
        if name not in variables:
            env.pop(name, None)
    code = SAY.format("TORCHINDUCTOR_CACHE_DIR")
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_compiled_code_is_kept(tmp_path):
    (tmp_path / "file").write_text("")
    assert cache_of(tmp_path) == f"{tmp_path}/.cache/vdvae/compiled"
    assert cache_of(tmp_path, TORCHINDUCTOR_CACHE_DIR="/named") == "/named"
    assert cache_of(tmp_path, HOME="~", XDG_CACHE_HOME="") == "None"
    assert cache_of(tmp_path, HOME=f"{tmp_path}/file") == "None"
