"""The importance-weighted bound, against an integral and the textbook."""

import math

import pytest
import torch
from golden import generators, weight

from hps import Hyperparams
from noise import noise_of_images
from vae import VAE


@pytest.fixture(scope="module")
def by_hand():
    """Images of one pixel and two layers of one latent: (H, model, batch, exact log p, nats)."""
    H = Hyperparams(
        dataset=None, image_size=1, image_channels=3, width=8, zdim=1, custom_width_str="",
        bottleneck_multiple=0.5, no_bias_above=64, num_mixtures=2, enc_blocks="1x1",
        dec_blocks="1x2",
    )  # fmt: skip
    net = VAE(H)
    net.load_state_dict({k: 1.4 * weight(k, v.shape) for k, v in net.state_dict().items()})
    target = torch.tensor([[-0.4, 0.1, 0.3], [0.2, 0.0, -0.1]]).view(2, 1, 1, 3)
    grid = torch.linspace(-7, 7, 141)  # standard deviations, on which the trapezoid rule is exact
    exact = []
    with torch.no_grad():
        for t in target:
            # z1 over a grid of its prior, and for each z1, z2 over a grid of its own.
            xs = net.decoder._start(1)
            pm, pv = net.decoder.dec_blocks[0].prior(xs[1])[:, :2].unbind(dim=1)  # (1, 1, 1)
            z1 = (pm + pv.exp() * grid.view(-1, 1, 1)).unsqueeze(1)  # (G, 1, 1, 1)
            xs = net.decoder._start(len(grid))
            xs = net.decoder.dec_blocks[0].forward_uncond(xs, lvs=z1)
            pm, pv = net.decoder.dec_blocks[1].prior(xs[1])[:, :2].unbind(dim=1)  # (G, 1, 1)
            z2 = pm + pv.exp() * grid.view(1, -1, 1)  # (G, G, 1), a grid a row
            pair = (z1.expand(-1, len(grid), -1, -1).reshape(-1, 1, 1, 1), z2.reshape(-1, 1, 1, 1))
            px_z = net.decoder.forward_manual_latents(len(grid) ** 2, pair)
            nll = net.decoder.out_net.nll(px_z, t.expand(len(grid) ** 2, 1, 1, 3)) * 3
            normal = -0.5 * grid**2 - 0.5 * math.log(2 * math.pi) + math.log(grid[1] - grid[0])
            log_p = (normal[:, None] + normal[None]).reshape(-1) - nll
            exact.append(log_p.double().logsumexp(0).item())
    return H, net, (target, target), exact


@torch.no_grad()
def test_the_bound_tightens_to_the_integral(by_hand):
    """K = 1 is the ELBO; more are tighter on average, up to log p(x), integrated on a grid."""
    H, net, batch, exact = by_hand
    many = [t.repeat_interleave(400, dim=0) for t in batch]  # 400 repetitions of two images

    def bound(n_samples):
        values = net.importance_weighted_elbo(*many, n_samples, lambda k: generators(800, 7, k))
        return -3 * values.view(2, 400).mean(dim=1)  # nats

    elbo = net(*many, per_image=True, generators=generators(800, 7, 0))["elbo"].double()
    bounds = [bound(k) for k in (1, 4, 16, 64)]
    assert torch.allclose(bounds[0], -3 * elbo.view(2, 400).mean(dim=1), rtol=1e-6)
    for i in range(2):
        values = [b[i].item() for b in bounds]
        assert values == sorted(values) and values[0] < exact[i] - 0.2
        assert values[3] == pytest.approx(exact[i], abs=0.02)


@torch.no_grad()
def test_the_bound_is_the_textbook_one_on_average(by_hand):
    """Without the control variate: log mean exp of log p(x, z) - log q(z | x), many times."""
    H, net, batch, _ = by_hand
    n, k_samples = 4000, 4
    x, target = (t[:1].expand(n, -1, -1, -1) for t in batch)
    log_weights = []
    for k in range(k_samples):
        with noise_of_images(generators(n, 5, k)):
            px_z, stats = net.decoder(net.encoder(x), True, get_gaussians=True)
        log_weight = -3 * net.decoder.out_net.nll(px_z, target)
        for s in stats:
            p = torch.distributions.Normal(s["pm"], s["pv"].exp())
            q = torch.distributions.Normal(s["qm"], s["qv"].exp())
            log_weight = log_weight + (p.log_prob(s["z"]) - q.log_prob(s["z"])).sum((1, 2, 3))
        log_weights.append(log_weight)
    textbook = torch.stack(log_weights).logsumexp(0) - math.log(k_samples)
    ours = -3 * net.importance_weighted_elbo(x, target, k_samples, lambda k: generators(n, 5, k))
    error = (textbook - ours).std().item() / math.sqrt(n)
    assert textbook.mean().item() == pytest.approx(ours.mean().item(), abs=4 * error)


@torch.no_grad()
def test_infinite_terms_of_the_bound(by_hand, monkeypatch):
    """A sample of infinite distortion has weight 0 among others; where all have, it is inf."""
    H, net, batch, _ = by_hand
    nll, calls, infinite = net.decoder.out_net.nll, [], set()

    def some_infinite(px_z, x):
        calls.append(len(calls))
        value = nll(px_z, x)
        value[0] += math.inf if calls[-1] in infinite else 0
        return value

    monkeypatch.setattr(net.decoder.out_net, "nll", some_infinite)

    def bound(n_samples, *at):
        calls.clear(), infinite.clear(), infinite.update(at)
        noise = lambda k: generators(2, 7, k)  # noqa: E731
        return net.importance_weighted_elbo(*batch, n_samples, noise)

    whole, one, both = bound(2), bound(2, 1), bound(2, 0, 1)
    assert bound(1, 0)[0] == both[0] == math.inf
    # Beside the other's weight its own is nothing: one less in the sum.
    assert whole[0] < one[0] < math.inf
    assert whole[1] == one[1] == both[1]
    forward = net.decoder.forward

    def far(*args, **kwargs):  # a prior so narrow that its KL is infinite, and z has density 0
        px_z, stats = forward(*args, **kwargs)
        return px_z, [s | {"kl": s["kl"] + math.inf, "pv": s["pv"] - 1000} for s in stats]

    monkeypatch.setattr(net.decoder, "forward", far)
    assert bound(2).tolist() == [math.inf] * 2
