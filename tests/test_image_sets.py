"""Facts of the data sets, and what every result on the box-filtered ImageNet says."""

import sys

import pytest
from fakes import noise, sparse_npy, tiny_network
from runs import ROOT, environment, run_until

from batches import Images, make_preprocess
from errors import UserError
from hps import HPARAMS_REGISTRY, get_hparams
from image_sets import IMAGE_SETS, channels_of, result_notice, target_bits
from options import Hyperparams
from train import evaluate
from vae import VAE


def test_image_sets():
    """Size and preprocessing of every preset are known without a file."""
    for preset in HPARAMS_REGISTRY.values():
        assert preset.dataset in IMAGE_SETS
    assert [target_bits(name) for name in (*IMAGE_SETS, None)].count(5) == 1
    assert target_bits("ffhq_256") == 5


def test_results_on_the_box_filtered_imagenet_say_so():
    assert "not comparable with the published 3.8 of imagenet32" in str(
        result_notice("imagenet32_box")
    )
    assert "not comparable with the published 3.52 of" in str(result_notice("imagenet64_box"))
    for dataset in ("imagenet32", "digits", "images", None):
        assert result_notice(dataset) == {}


def test_a_run_on_the_box_filtered_imagenet_says_so(tmp_path):
    sparse_npy(tmp_path / "imagenet32_box-train.npy", (1281167, 32, 32, 3))
    sparse_npy(tmp_path / "imagenet32_box-valid.npy", (50000, 32, 32, 3))
    argv = [sys.executable, ROOT / "train.py", "--hps", "imagenet32", "--device", "cpu"]
    argv += ["--dataset", "imagenet32_box", "--save_dir", tmp_path, *tiny_network(32)]
    lines = run_until(list(map(str, argv)), environment(), tmp_path, "type: train_loss")
    assert "notice: box-filtered ImageNet" in lines[-1] and "not comparable" in lines[-1]

    H = get_hparams("imagenet32", dataset="imagenet32_box", device="cpu", width=4)
    H.update(enc_blocks="32d32,1x1", dec_blocks="1x1,32m1", image_size=32)
    data = Images(noise(6, 32))
    figures = evaluate(H, VAE(H), data, make_preprocess(H.dataset, "cpu"))
    assert figures["n_images"] == 6 and "not comparable" in figures["notice"]


@pytest.mark.parametrize("channels", [0, 2, 4, "3", -1])
def test_images_are_grey_or_rgb(channels):
    H = Hyperparams(get_hparams("photos32"), image_channels=channels)
    with pytest.raises(UserError, match=r"it must be 1 \(grey\) or 3 \(RGB\)"):
        VAE(H)
    assert channels_of(Hyperparams()) == 3 == channels_of(object())
