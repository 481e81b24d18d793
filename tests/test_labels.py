"""Labels in the network: tables, passes with and without, training, evaluation, resuming."""

import itertools
import os
import signal

import numpy as np
import pytest
import torch
from fakes import noise, run_H
from golden import generators
from reference import PlainVAE
from runs import SMALL, Run, check_latest, figures, hashes

from batches import EpochBatches, Images, Varied, training_batches
from data import set_up_data
from noise import DROPPING, chosen
from presets import get_hparams, preset_of, shapes_of
from vae import VAE

NETWORK = dict(width=8, zdim=2, num_mixtures=2, enc_blocks="8x1,8d2,4x1,4d4,1x1")


def labelled(seed=0, n_labels=10, spread=0.3, **more):
    """A labelled network whose tables are no zeros."""
    H = get_hparams("digits", dec_blocks="1x1,4m1,8m4", **NETWORK, **more)
    H.n_labels = n_labels
    torch.manual_seed(seed)
    vae = VAE(H)
    with torch.no_grad():
        for table in getattr(vae.decoder, "label_xs", ()):
            table.normal_(std=spread)
        for block in vae.decoder.dec_blocks:
            block.prior.c4.weight.normal_(std=0.05)  # zeros: the prior would hear of nothing
    return vae


def batch(n=4, channels=1):
    torch.manual_seed(9)
    return torch.randn(n, 8, 8, channels), torch.randint(0, 256, (n, 8, 8, channels)) / 127.5 - 1


# ---- the network -----------------------------------------------------------------------------


def test_without_labels_nothing_has_changed():
    class Plain:
        def __init__(self, H):
            self.__dict__.update({k: v for k, v in H.items() if k != "n_labels"})

    class Raises(Plain):
        def __getattr__(self, name):
            raise KeyError(name)

    H = get_hparams("photos32")
    names = list(VAE(H).state_dict())
    for other in (Plain(H), Raises(H)):
        assert list(VAE(other).state_dict()) == names
    assert names[-2:] == ["decoder.out_net.out_conv.weight", "decoder.out_net.out_conv.bias"]


def test_tables_are_behind_all_others_and_start_at_zero():
    torch.manual_seed(0)
    vae = VAE(get_hparams("digits"))
    torch.manual_seed(0)
    without = VAE(get_hparams("digits", n_labels=0))
    names = [name for name, _ in vae.named_parameters()]
    tables = [f"decoder.label_xs.{i}" for i in range(3)]
    assert names == [name for name, _ in without.named_parameters()] + tables
    for r, table in zip((1, 4, 8), vae.decoder.label_xs, strict=True):
        assert table.shape == (10, 64, r, r) and not table.any()
    for name, t in without.state_dict().items():
        assert torch.equal(vae.state_dict()[name], t)
    x, target = batch()
    torch.manual_seed(1)
    ours = vae(x, target, labels=torch.arange(4))
    torch.manual_seed(1)
    assert without(x, target)["elbo"].item() == ours["elbo"].item()


def test_tables_go_up_to_8x8():
    H = get_hparams("cifar10", labels="own")
    with torch.device("meta"):
        vae = VAE(H)
    assert [tuple(t.shape) for t in vae.decoder.label_xs] == [(10, 384, r, r) for r in (1, 4, 8)]
    assert H.label_names[3] == "cat" and H.n_labels == 10
    known = preset_of(shapes_of(vae.state_dict()))
    assert (known.hparam_sets, known.n_labels, known.image_channels) == ("cifar10", 10, 3)


def test_posterior_and_prior_see_the_label():
    vae, (x, target) = labelled(), batch()
    mine, other = torch.tensor([1, 2, 3, 4]), torch.tensor([5, 2, 3, 4])
    args = dict(per_image=True, generators=None)
    stats = []
    for labels in (mine, other, torch.tensor([-1, 2, 3, 4])):
        gens = generators(4, 0, 1)
        stats.append(vae(x, target, **args | {"generators": gens, "labels": labels}))
    for key in ("distortion", "rate"):
        a, b, c = (s[key] for s in stats)
        assert torch.equal(a[1:], b[1:]) and torch.equal(a[1:], c[1:])
        assert len({a[0].item(), b[0].item(), c[0].item()}) == 3
    latents = [vae.forward_get_latents(x, generators(4, 0, 1), True, labels=labels)
               for labels in (mine, other)]  # fmt: skip
    for key in ("qm", "pm"):
        a, b = (layers[0][key] for layers in latents)
        assert not torch.equal(a[0], b[0]) and torch.equal(a[1:], b[1:])


@pytest.mark.parametrize("form", [list, np.array, torch.tensor, lambda v: torch.tensor(v).int()])
def test_labels_in_any_form(form):
    vae = labelled()
    a, b = (vae.forward_uncond_samples(3, generators=generators(3, 0, 1), labels=labels)
            for labels in (form([1, -1, 3]), torch.tensor([1, -1, 3])))  # fmt: skip
    assert (a == b).all() and a.shape == (3, 8, 8, 1) and a.dtype == np.uint8
    none = vae.forward_uncond_samples(3, generators=generators(3, 0, 1))
    assert (none[1] == a[1]).all() and (none[0] != a[0]).any()


def test_every_method_takes_them():
    vae, (x, target) = labelled(), batch(3)
    labels = torch.tensor([0, 9, -1])
    z = [s["z"] for s in vae.forward_get_latents(x, generators(3, 0, 1), labels=labels)]
    one = vae.forward_samples_set_latents(1, z, generators=generators(3, 0, 2), labels=labels)
    three = vae.forward_samples_set_latents(3, z, generators=generators(3, 0, 2), labels=labels)
    bare = vae.forward_samples_set_latents(3, z, generators=generators(3, 0, 2))
    assert (one == three).all() and (bare[:2] != three[:2]).any() and (bare[2] == three[2]).all()
    distortion, rates = vae.distortion_and_rate(x, target, generators(3, 0, 1), True, labels=labels)
    stats = vae(x, target, True, generators(3, 0, 1), labels=labels)
    assert torch.equal(distortion, stats["distortion"])
    assert torch.allclose(rates.sum(0), stats["rate"])
    bound = vae.importance_weighted_elbo(x, target, 1, lambda k: generators(3, 0, 1), labels=labels)
    assert torch.allclose(bound, stats["elbo"].double(), rtol=1e-4)
    decoder = vae.decoder
    torch.manual_seed(0)
    a = decoder.forward_uncond(3, 0.5, labels=labels)
    torch.manual_seed(0)
    assert torch.equal(a, decoder.forward_manual_latents(3, [], 0.5, labels=labels))
    torch.manual_seed(0)
    b = decoder.forward_uncond(3, 0.5, y=labels)  # y is not used
    torch.manual_seed(0)
    assert torch.equal(b, decoder.forward_uncond(3, 0.5))


@pytest.mark.parametrize(
    "labels, words",
    [
        ([1, 10, 0], "label 10: this network knows 0 to 9"),
        ([1, -2, 0], "label -2"),
        ([0.0, 1.0, 2.0], "float64: they must be int64"),
        ([[1], [2], [3]], r"\(3, 1\): 3 images need \(3,\)"),
        ([1, 2], r"\(2,\): 3 images"),
    ],
)
def test_wrong_labels(labels, words):
    with pytest.raises(ValueError, match=words):
        labelled().forward_uncond_samples(3, labels=labels)


def test_a_network_that_knows_none():
    vae = labelled(n_labels=0)
    assert not hasattr(vae.decoder, "label_xs")
    vae.forward_uncond_samples(2, labels=[-1, -1])
    with pytest.raises(ValueError, match="label 0: this network knows none"):
        vae.forward_uncond_samples(2, labels=[0, -1])


@pytest.mark.parametrize("labels", [None, [-1, -1, -1, -1], [1, 1, -1, 3]])
def test_every_pass_gives_every_table_a_gradient(labels):
    vae, (x, target) = labelled(), batch()
    vae(x, target, labels=labels)["elbo"].backward()
    for table in vae.decoder.label_xs:
        told = sorted({t for t in labels or () if t >= 0})
        assert table.grad.flatten(1).any(dim=1).nonzero().flatten().tolist() == told


def test_the_plain_rendition_agrees():
    for channels in (1, 3):
        vae = labelled(image_channels=channels) if channels == 1 else None
        if vae is None:
            H = get_hparams("digits", dec_blocks="1x1,4m1,8m4", **NETWORK)
            H.image_channels = 3
            vae = VAE(H)
        plain, labels = PlainVAE(vae), torch.tensor([1, -1, 3, 3])
        results = []
        for module in (vae, plain):
            torch.manual_seed(3)
            stats = module(*batch(channels=channels), labels=labels)
            stats["elbo"].backward()
            results.append((stats, {k.removeprefix("vae."): p.grad
                                    for k, p in module.named_parameters()}))  # fmt: skip
        (ours, grads), (theirs, plain_grads) = results
        for key in ours:
            assert ours[key].item() == pytest.approx(theirs[key].item(), rel=1e-5)
        for key, grad in grads.items():
            assert (grad - plain_grads[key]).norm() <= 5e-4 * plain_grads[key].norm() + 1e-9, key


# ---- dropped labels --------------------------------------------------------------------------


def dropped_of(seed, epochs, workers=0, rank=0, size=1, start=0, xflip=False):
    """{(epoch, index in the whole set): the label that a step sees} of what one rank takes."""
    array, labels, indices = noise(40, 4), np.arange(40) % 10, np.arange(5, 37)
    batches = EpochBatches(len(indices), 4, rank, size, seed)
    H = run_H(".", "digits", n_batch=4, seed=seed, device="cpu")
    H.update(num_workers=workers, n_labels=10, label_dropout=0.3, xflip=xflip)
    _, loader = training_batches(H, Images(array, indices, labels))
    images = Varied(Images(array, indices, labels), batches, 0.5 * xflip, 0.3)
    loader = type(loader)(images, batch_sampler=batches, num_workers=workers)
    found = {}
    for epoch in epochs:
        batches.set_epoch(epoch, start)
        for pictures, told in loader:
            assert told.dtype == torch.int64
            for image, label in zip(pictures.numpy(), told.tolist(), strict=True):
                [index] = [i for i in indices if (array[i] == image).all() or
                           (array[i][:, ::-1] == image).all()]  # fmt: skip
                found[epoch, index] = label
    return found


def test_what_is_dropped_belongs_to_seed_epoch_and_image():
    whole = dropped_of(0, range(3))
    for (epoch, i), label in whole.items():
        assert label == (-1 if chosen(0.3, [i], 0, DROPPING, epoch)[0] else i % 10)
    assert 15 < sum(label < 0 for label in whole.values()) < 45
    assert dropped_of(0, [2], workers=2).items() <= whole.items()
    assert dropped_of(0, [1], start=8).items() <= whole.items()
    assert dropped_of(0, range(3), xflip=True) == whole
    parts = [dropped_of(0, range(3), rank=rank, size=2) for rank in range(2)]
    assert parts[0] | parts[1] == whole
    assert dropped_of(1, range(3)) != whole


def test_evaluations_drop_nothing():
    H = run_H(".", "digits", device="cpu")
    H, train, valid, _ = set_up_data(H)
    assert H.n_labels == 10 and H.label_names == list("0123456789") and H.image_channels == 1
    assert sum(H.label_counts) == len(train) == 1397 and H.label_counts[-1] == 0
    image, label = valid[0]
    assert image.shape == (8, 8, 1) and label.dtype == torch.int64 and isinstance(valid, Images)


# ---- runs --------------------------------------------------------------------------------------


class KillAfter:
    """Kills the process in its n-th step, as a lost power would."""

    def __init__(self, n):
        self.n = n

    def __call__(self):
        import train

        step, calls = train.training_step, itertools.count(1)

        def wrapped(*args):
            if next(calls) == self.n:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(*args)

        train.training_step = wrapped


def test_a_resumed_run_is_the_unbroken_one(tmp_path):
    short = [*SMALL, "--label_dropout", "0.3", "--num_epochs", "2"]

    def train(*argv, **options):
        return Run([*short, *argv], tmp_path / "out", **options).wait()

    assert train("--save_dir", tmp_path / "whole")[0] == 0
    parts = "--save_dir", tmp_path / "parts", "--iters_per_save", "17"
    assert train(*parts, wrap=KillAfter(20))[0] != 0
    assert check_latest(tmp_path / "parts" / "test") == 17
    status, text = train(*parts, "--resume", "--num_workers", "1")
    assert status == 0, text
    assert hashes(tmp_path / "parts" / "test") == hashes(tmp_path / "whole" / "test")
    assert figures(tmp_path / "parts" / "test") == figures(tmp_path / "whole" / "test")
    other = Run([*SMALL, "--save_dir", tmp_path / "other", "--num_epochs", "2",
                 "--label_dropout", "0"], tmp_path / "out")  # fmt: skip
    assert other.wait()[0] == 0
    assert hashes(tmp_path / "other" / "test") != hashes(tmp_path / "whole" / "test")
