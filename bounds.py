"""What an image costs under a VAE: the terms of its negative ELBO, the tighter bound.

Nats per dimension, a dimension being one of the levels of a pixel: three, of grey images one.
Everything here goes by the network's published parts (encoder, decoder, out_net), so that a fork's
own network serves too.
"""

import math

import torch

from compiling import run_network
from labels import check_labels, given, labels_of
from noise import noise_of_images
from precision import at_least_float32, without_autocast


def nats_to_bits(nats):
    """Bits per dimension from nats per dimension."""
    return nats / math.log(2)


def distortion_and_rates(vae, x, x_target, channels=None, labels=None):
    """The terms of the negative ELBO: distortion (N,), and each layer's rate (layers, N).

    Args:
        x: input (N, R, R, c), of c channels.
        x_target: target (N, R, R, c) in [-1, 1].
        labels: of the images, (N,) int64, -1 for none.
        channels: a list that gets, a layer each, the KL of its latent channels (N, Z), in nats,
            summed over their positions.
    """
    n_labels = labels_of(getattr(vae, "H", None))
    if labels is not None and n_labels:  # before a compiled pass, which doesn't look at them
        labels = check_labels(labels, len(x), n_labels)
    wanted = channels is not None
    distortion, rates, of_channels = run_network(_terms, vae, x, x_target, labels, wanted)
    if wanted:
        channels += of_channels
    return distortion, rates


def _terms(vae, x, x_target, labels, channels):
    px_z, stats = vae.decoder(vae.encoder(x), **given(labels))
    with without_autocast(px_z.device.type):  # a fork's own output layer too
        distortion = vae.decoder.out_net.nll(px_z, x_target)  # (N,)
    kls = [at_least_float32(s["kl"]) for s in stats]  # each (N, Z, R, R)
    rates = torch.stack([kl.sum(dim=(1, 2, 3)) for kl in kls]) / x.shape[1:].numel()  # (layers, N)
    return distortion, rates, [kl.sum(dim=(2, 3)) for kl in kls] if channels else None


# A latent channel is in use if it tells more than this of an image, in the mean over images: about
# a hundredth of a bit. (Burda et al. 2016, section 5.2, ask how much the posterior's mean moves.)
ACTIVE_NATS = 0.01


class LayerRates(list):
    """The rate of each layer, as floats; `active` lists how many latent channels each has in use.

    Args:
        rates: in nats per dimension.
        kl: of all layers' channels, one after another: their KL in nats, summed over their
            positions. Both in the mean over images.
        widths: the number of channels of each layer.
    """

    def __init__(self, rates, kl, widths):
        super().__init__(rates.tolist())
        self.active = [int((of_layer > ACTIVE_NATS).sum()) for of_layer in kl.split(list(widths))]


def importance_weighted_elbo(vae, x, x_target, n_samples, noise, labels=None):
    """The importance-weighted bound of K samples (Burda et al. 2016, eq. 8), negated.

    log (1/K) sum_k w_k, w_k = p(x, z_k) / q(z_k | x), to which is added the mean over k of what
    the sampled log q/p of the latents exceeds their analytical KL by. That mean is 0 in
    expectation, with it K = 1 is the ELBO of that noise, and no K is above the mean ELBO of
    its samples. A sample of infinite distortion has weight 0. Memory is that of one sample.

    Args:
        x, x_target, labels: as in distortion_and_rates.
        n_samples: K.
        noise: k from 0 to K - 1 → that sample's generators, one an image (None: the default one).

    Returns:
        (N,), nats per dimension, float64; inf where all weights are 0, or a KL is infinite.
    """
    activations, n_dims = vae.encoder(x), x.shape[1:].numel()
    log_sum, gap = -math.inf, 0
    for k in range(n_samples):
        with noise_of_images(noise(k)):
            px_z, stats = vae.decoder(activations, True, get_gaussians=True, **given(labels))
        with without_autocast(px_z.device.type):  # a fork's own output layer too
            distortion = vae.decoder.out_net.nll(px_z, x_target).double() * n_dims  # (N,)
        log_ratio, kl = 0, 0  # log p(z) - log q(z | x), and its analytical expectation, negated
        for s in stats:
            z, qm, qv, pm, pv = (s[key].double() for key in ("z", "qm", "qv", "pm", "pv"))
            q, p = (z - qm) / qv.exp(), (z - pm) / pv.exp()
            log_ratio = log_ratio + (0.5 * (q**2 - p**2) + qv - pv).sum(dim=(1, 2, 3))
            kl = kl + s["kl"].double().sum(dim=(1, 2, 3))
        log_weight = log_ratio - distortion  # (N,)
        log_sum = torch.logaddexp(torch.as_tensor(log_sum).to(log_weight), log_weight)
        # An infinite KL makes the bound infinite, whatever the weight: no inf - inf.
        gap = gap + torch.where(kl == math.inf, kl, kl + log_ratio) / n_samples
    return (gap + math.log(n_samples) - log_sum) / n_dims
