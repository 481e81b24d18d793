"""What an evaluation adds up: the costs of images, over batches and processes."""

import math

import torch

from bounds import LayerRates, nats_to_bits
from processes import allreduce


class Totals:
    """Sums over the images of an evaluation, float64.

    Args:
        widths: latent channels of each layer.
    """

    def __init__(self, widths):
        self.widths = widths
        self.sums = dict.fromkeys(
            "n_images n_batches n_finite elbo finite_elbo distortion rate iw_elbo stopped "
            "foreign_noise".split(), 0.0
        )  # fmt: skip
        self.rate_per_layer = torch.zeros(len(widths), dtype=torch.float64)
        self.kl_per_channel = torch.zeros(sum(widths), dtype=torch.float64)

    def add(self, distortion, rates, channels, foreign_noise, bound=None):
        """Adds a batch.

        Args:
            distortion, rates, channels: as of bounds.distortion_and_rates.
            foreign_noise: whether its noise was not the images' own.
            bound: importance-weighted bounds (N,).
        """
        distortion, rates = distortion.double().cpu(), rates.double().cpu()  # (N,), (layers, N)
        rate = rates.sum(dim=0)  # (N,)
        elbo = distortion + rate  # (N,)
        finite, sums = elbo[elbo.isfinite()], self.sums
        sums["n_images"] += len(elbo)
        sums["n_batches"] += 1
        sums["n_finite"] += len(finite)
        sums["foreign_noise"] += foreign_noise
        parts = {"elbo": elbo, "finite_elbo": finite, "distortion": distortion, "rate": rate}
        for name, values in (parts if bound is None else parts | {"iw_elbo": bound}).items():
            sums[name] += values.sum().item()
        self.rate_per_layer += rates.sum(dim=1)
        self.kl_per_channel += torch.cat(channels, dim=1).double().sum(dim=0).cpu()

    def over_processes(self, device):
        """Becomes the sums over all processes, which exchange them on `device`."""
        mine = [*self.sums.values(), *self.rate_per_layer, *self.kl_per_channel]
        mine = torch.tensor(mine, dtype=torch.float64, device=device)
        sizes = [len(self.sums), len(self.rate_per_layer), len(self.kl_per_channel)]
        parts = allreduce(mine, average=False).cpu().split(sizes)
        sums, self.rate_per_layer, self.kl_per_channel = parts
        self.sums = dict(zip(self.sums, sums.tolist(), strict=True))

    def figures(self):
        """n_batches, n_images, and means over images, as train.evaluate gives them."""
        sums, n = self.sums, self.sums["n_images"]
        rates = self.rate_per_layer / n, self.kl_per_channel / n
        return {
            "n_batches": int(sums["n_batches"]),
            "n_images": int(n),
            "filtered_elbo": sums["finite_elbo"] / (sums["n_finite"] or math.nan),
            **{name: sums[name] / n for name in ("elbo", "distortion", "rate")},
            "bits_per_dim": nats_to_bits(sums["elbo"] / n),
            "rate_per_layer": LayerRates(*rates, self.widths),
        }
