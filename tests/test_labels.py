"""Labels in the network: tables, passes with and without, training, evaluation, resuming."""

import functools
import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import assert_refused, noise, run_H, write_cifar10
from golden import generators
from reference import PlainVAE
from runs import SMALL, Run, Signal, check_latest, check_resumes, events, hashes, start

from batches import EpochBatches, Images, Varied, training_batches
from data import cifar10, set_up_data
from errors import UserError
from label_choices import asked_labels
from labels import taking
from likelihood import discretized_mix_logistic_loss, sample_from_discretized_mix_logistic
from noise import DROPPING, chosen
from presets import get_hparams, preset_of, shapes_of
from train_helpers import load_vaes
from vae import VAE
from weights import load_model

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


@torch.no_grad()
def test_no_labels_are_those_of_minus_1_where_no_gradient_is_wanted():
    vae, (x, target) = labelled(), batch()
    found = []
    for labels in (None, [-1] * 4):
        torch.manual_seed(1)
        rates = vae(x, target, per_image=True, labels=labels)["rate"]
        found.append((rates, torch.from_numpy(vae.forward_uncond_samples(4, labels=labels))))
    assert all(map(torch.equal, *found))


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
            assert ours[key].item() == pytest.approx(theirs[key].item(), rel=1e-5, abs=1e-7)
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


def test_a_resumed_run_is_the_unbroken_one(tmp_path):
    check_resumes(["--label_dropout", "0.3"], tmp_path)
    other = Run([*SMALL, "--save_dir", tmp_path / "other", "--num_epochs", "2",
                 "--label_dropout", "0"], tmp_path / "out")  # fmt: skip
    assert other.wait()[0] == 0
    assert hashes(tmp_path / "other" / "test") != hashes(tmp_path / "whole" / "test")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run that has learnt something of the labels."""
    folder = tmp_path_factory.mktemp("trained")
    more = "--num_epochs 20 --lr 0.01 --ema_rate 0.9 --epochs_per_eval 20 --resume".split()
    status, text = Run([*SMALL, *more, "--save_dir", folder], folder / "out").wait()
    assert status == 0, text
    return folder / "test"


def test_swapped_labels_cost_bits(trained):
    model = load_model(trained / "latest-model-ema.th", device="cpu")
    H, _, valid, preprocess = set_up_data(run_H(".", "digits", device="cpu"))
    x, target = preprocess([torch.stack([valid[i][0] for i in range(200)])])
    labels = torch.stack([valid[i][1] for i in range(200)])
    told = {"given": labels, "swapped": (labels + 3) % 10, "none": None}
    bits = {
        name: model(x, target, generators=generators(200, 0, 1), labels=l)["elbo"].item()
        for name, l in told.items()
    }
    assert bits["given"] + 0.01 < bits["none"] and bits["given"] + 0.1 < bits["swapped"], bits


def evaluated(trained, tmp_path, *more):
    tmp_path.mkdir(exist_ok=True)
    argv = [*SMALL, "--save_dir", tmp_path, "--test_eval", "--restore_ema_path",
            trained / "latest-model-ema.th", *more]  # fmt: skip
    status, text = Run(argv, tmp_path / "out").wait()
    assert status == 0, text
    [line] = [e for e in events(tmp_path / "test") if e.get("type") == "test_loss"]
    return line


def test_an_evaluation_says_whether_labels_are_given(trained, tmp_path):
    given = evaluated(trained, tmp_path / "a")
    none = evaluated(trained, tmp_path / "b", "--label", "none", "--n_batch", "7")
    small = evaluated(trained, tmp_path / "c", "--n_batch", "7", "--iw_samples", "1")
    assert (given["labels"], none["labels"]) == ("given", "none")
    assert none["elbo"] > given["elbo"] + 0.01
    assert small["elbo"] == pytest.approx(given["elbo"], abs=1e-5)
    assert small["iw_elbo"] == pytest.approx(given["elbo"], abs=1e-5)


def test_several_processes(trained, tmp_path):
    """The same figure; and every table has a gradient on every rank, all labels dropped or not."""
    argv = [*SMALL, "--num_epochs", "1", "--n_batch", "25", "--grad_accum", "2"]
    for dropout in ("0.5", "1"):
        runs = start(2, [*argv, "--label_dropout", dropout, "--desc", dropout], tmp_path)
        for run in runs:
            status, text = run.wait()
            assert status == 0, text
    test = [*SMALL, "--test_eval", "--restore_ema_path", trained / "latest-model-ema.th"]
    for run in start(2, test, tmp_path):
        status, text = run.wait()
        assert status == 0, text
    [line] = [e for e in events(tmp_path / "test") if e.get("type") == "test_loss"]
    alone = evaluated(trained, tmp_path / "alone")
    assert line["elbo"] == pytest.approx(alone["elbo"], abs=1e-5)
    assert line["n_images"] == 200


def test_never_without_a_label(tmp_path):
    argv = [*SMALL, "--num_epochs", "1", "--label_dropout", "0", "--save_dir", tmp_path]
    assert Run(argv, tmp_path / "out").wait()[0] == 0
    weights = tmp_path / "test" / "latest-model-ema.th"
    more = ["--test_eval", "--restore_ema_path", weights]
    status, text = Run([*SMALL, *more, "--label", "none", "--desc", "t", "--save_dir", tmp_path],
                       tmp_path / "out").wait()  # fmt: skip
    assert status == 2 and "--label_dropout 0" in text.splitlines()[-1]
    assert (
        Run([*SMALL, *more, "--desc", "t", "--save_dir", tmp_path], tmp_path / "out").wait()[0] == 0
    )
    model = load_model(weights, device="cpu")
    assert_refused(lambda: asked_labels(model.H, "none"), "--label none", "name a label")
    assert_refused(lambda: asked_labels(model.H, None), "no --label", "name a label")
    assert asked_labels(model.H, "3,4")(range(3)).tolist() == [3, 4, 3]


@pytest.mark.parametrize("hps", ["photos32", "cifar10"])
@pytest.mark.parametrize("option", ["--label none", "--label_dropout 0.5", "--labels folders",
                                    "--image_channels 1"])  # fmt: skip
def test_options_without_labels_are_refused(hps, option, tmp_path):
    write_cifar10(tmp_path)
    argv = ["--hps", hps, *option.split(), "--data_root", tmp_path, "--save_dir", tmp_path / "r"]
    status, text = Run(argv, tmp_path / "out").wait()
    assert status == 2 and len(text.splitlines()) == 1 and option.split()[0] in text
    assert not (tmp_path / "r").exists()


def test_cifar10_with_its_own_labels(tmp_path):
    write_cifar10(tmp_path)
    H = run_H(tmp_path, "cifar10", labels="own", device="cpu")
    H, train, valid, _ = set_up_data(H)
    assert H.label_names[0] == "airplane" and H.n_labels == 10 and H.image_channels == 3
    (_, Y), (_, V), _ = cifar10(tmp_path, one_hot=False)
    assert [int(train[i][1]) for i in range(9)] == Y[:9, 0].tolist()
    assert [int(valid[i][1]) for i in range(9)] == V[:9, 0].tolist()
    H, train, _, _ = set_up_data(run_H(tmp_path, "cifar10", device="cpu"))
    assert H.n_labels == 0 and len(train[0]) == 1


# ---- weights of other networks ---------------------------------------------------------------


def test_init_from_weights_without_tables(trained, tmp_path):
    """They start at zero; those of other labels are left out."""
    ema = torch.load(trained / "latest-model-ema.th", weights_only=True)
    bare = {name: t for name, t in ema.items() if "label_xs" not in name}
    torch.save(bare, tmp_path / "bare.th")
    shutil.copy(trained / "latest-model-ema.th", tmp_path / "other-model-ema.th")
    state = json.loads((trained / "latest-state.json").read_text())
    state["hparams"]["label_names"] = list("abcdefghij")
    (tmp_path / "other-state.json").write_text(json.dumps(state))
    said = []
    for name, kept in (("bare.th", False), ("other-model-ema.th", False),
                       (trained / "latest-model-ema.th", True)):  # fmt: skip
        H = run_H(".", "digits", init_from=tmp_path / name)
        network = dict(zip(SMALL[4:14:2], SMALL[5:15:2], strict=True))
        H.update({k[2:]: type(H[k[2:]])(v) for k, v in network.items() if k[2:] in H})
        H.update(given_options=["init_from"], mpi_size=1, local_rank=0)
        H = set_up_data(H)[0]
        said.clear()
        vae, _ = load_vaes(H, lambda *words: said.append(" ".join(map(str, words))))
        for i, table in enumerate(vae.module.decoder.label_xs):
            assert torch.equal(table, ema[f"decoder.label_xs.{i}"]) if kept else not table.any()
        assert torch.equal(vae.module.decoder.gain, ema["decoder.gain"])
        assert any("tables are left out" in line for line in said) == ("other" in str(name))


def test_a_run_of_an_earlier_version_goes_on_with_its_own_network(tmp_path):
    """Digits were RGB, without labels, of another network: at 7763ab1 this one was begun."""
    run = tmp_path / "runs" / "digits"
    shutil.copytree(Path(__file__).parent / "data" / "rgb_digits", run)
    argv = ("--hps digits --desc digits --device cpu --n_batch 100 --warmup_iters 20 "
            "--epochs_per_eval 1 --iters_per_print 5 --num_images_visualize 1").split()  # fmt: skip
    argv += ["--save_dir", tmp_path / "runs"]
    status, text = Run([*argv, "--num_epochs", "2", "--resume"], tmp_path / "out").wait()
    assert status == 0, text
    assert "width 4" in text and "8x8, RGB" in text
    for shown in (text, (run / "log.txt").read_text()):
        assert shown.count("not today's preset: ") == 1
    assert check_latest(run) == 26
    assert len([e for e in events(run) if e.get("type") == "train_loss"]) >= 3
    state = json.loads((run / "latest-state.json").read_text())["hparams"]
    assert (state["width"], state["image_channels"], state["n_labels"]) == (4, 3, 0)
    weights = run / "latest-model-ema.th"
    status, text = Run([*argv, "--test_eval", "--restore_ema_path", weights], tmp_path / "o").wait()
    assert status == 0 and "n_images: 200" in text.splitlines()[-1]
    assert load_model(weights, device="cpu").forward_uncond_samples(2).shape == (2, 8, 8, 3)
    # Named on the command line, today's network does not fit; nor do files without a record.
    status, text = Run([*argv, "--width", "64", "--resume"], tmp_path / "o").wait()
    assert status == 2 and "width is 64 now" in text.splitlines()[-1]
    shutil.copy(weights, tmp_path / "alone.th")
    status, text = Run([*argv, "--desc", "x", "--restore_ema_path", tmp_path / "alone.th"],
                       tmp_path / "o").wait()  # fmt: skip
    assert status == 2 and "none of the presets" in text.splitlines()[-1]


# ---- what programs do ------------------------------------------------------------------------


def test_functions_in_place_get_labels_as_they_take_them():
    def published(a, b):
        return {}

    def own(a, b, scaler=None):
        return {}

    def labelled_one(a, b, labels=None):
        return {}

    @functools.wraps(labelled_one)
    def around(*args):
        return {}

    found = [taking(f, 7) for f in (published, own, labelled_one, around, lambda *a, **k: 0)]
    assert found == [((), {}), ((), {}), ((), {"labels": 7}), ((7,), {}), ((), {"labels": 7})]
    assert taking(labelled_one, None) == ((), {})


@pytest.mark.parametrize("error", [AttributeError, KeyError, RuntimeError, ValueError])
def test_hyperparameters_that_raise(error):
    H = get_hparams("photos32")

    class Raises:
        def __getattr__(self, name):
            if name in ("n_labels", "image_channels"):
                raise error(name)
            return getattr(H, name)

    assert list(VAE(Raises()).state_dict()) == list(VAE(H).state_dict())


def test_shapes_that_do_not_fit_are_errors():
    grey, (x, target) = labelled(), batch()
    rgb = torch.rand(4, 8, 8, 3)
    with pytest.raises(ValueError, match="targets have 3 channels; image_channels is 1"):
        grey(x, rgb)
    for t, l in ((rgb, torch.zeros(4, 8, 8, 12)), (rgb[..., :2], torch.zeros(4, 8, 8, 30))):
        with pytest.raises(ValueError, match="3K for one"):
            discretized_mix_logistic_loss(t, l)
    with pytest.raises(ValueError, match="none of 5 logistics"):
        sample_from_discretized_mix_logistic(torch.zeros(1, 8, 8, 100), 5)
    with pytest.raises(ValueError, match=r"\(2,\): 1 images"):
        grey(x[:1], target[:1], labels=[1, 2])
    with pytest.raises(UserError, match="no learned constant up to 8x8"):
        labelled(no_bias_above=0)
    empty = grey.forward_uncond_samples(0, labels=[])
    assert empty.shape == (0, 8, 8, 1)
    a, b = (grey.forward_uncond_samples(3, generators=generators(3, 0, 1), labels=labels)
            for labels in (np.arange(3)[::-1], np.array([2, 1, 0], np.uint16)))  # fmt: skip
    assert (a == b).all()


def test_a_row_of_another_label_does_no_harm():
    vae, (x, target) = labelled(), batch()
    with torch.no_grad():
        vae.decoder.label_xs[0][3] = torch.nan
    assert vae(x, target, labels=[1, 2, -1, 4])["elbo"].isfinite()


def test_the_same_command_again(tmp_path):
    """--labels own stands on the command line of the first start, of a resume, of an evaluation."""
    write_cifar10(tmp_path)
    argv = ("--hps cifar10 --labels own --width 8 --zdim 2 --num_mixtures 2 --num_epochs 1 "
            "--enc_blocks 32x1,32d32,1x1 --dec_blocks 1x1,32m1 --n_batch 1000 --iters_per_save 2 "
            "--num_images_visualize 1 --iters_per_print 1").split()  # fmt: skip
    argv += ["--data_root", tmp_path, "--save_dir", tmp_path / "r", "--resume"]
    assert Run(argv, tmp_path / "o", Signal(signal.SIGTERM, "step", 3)).wait()[0] == 143
    status, text = Run(argv, tmp_path / "o", Signal(signal.SIGTERM, "step", 3)).wait()
    assert status == 143 and "resuming from" in text, text
    weights = tmp_path / "r" / "test" / "latest-model-ema.th"
    status, text = Run([*argv[:-1], "--dry_run", "--test_eval", "--restore_ema_path", weights],
                       tmp_path / "o").wait()  # fmt: skip
    assert status == 0 and "labels    10 (airplane" in text, text
    assert Run([*argv, "--labels", "folders"], tmp_path / "o").wait()[0] == 2


def test_labelled_weights_on_images_without_labels(trained, tmp_path):
    """What is evaluated is said to be without labels, and so it is."""
    np.save(tmp_path / "a.npy", np.random.RandomState(0).randint(0, 255, (60, 8, 8), np.uint8))
    argv = [*SMALL, "--dataset", "images", "--data_root", tmp_path / "a.npy",
            "--save_dir", tmp_path, "--test_eval",
            "--restore_ema_path", trained / "latest-model-ema.th"]  # fmt: skip
    status, text = Run(argv, tmp_path / "o").wait()
    assert status == 0 and "labels: none" in text.splitlines()[-1], text
    assert "not given in the evaluation" in text
