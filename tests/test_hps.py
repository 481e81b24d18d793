"""Presets, the options that define them, precedence; as published."""

import pytest
from fakes import parsed

from errors import UserError
from hps import Hyperparams, add_vae_arguments, get_hparams, parse_args_and_update_hparams
from options import OneLineParser

DEFAULTS = dict(
    seed=0, port=29500, save_dir="./saved_models", data_root="./", desc="test",
    restore_path=None, restore_ema_path=None, restore_log_path=None,
    restore_optimizer_path=None, dataset="cifar10", ema_rate=0.999, enc_blocks=None,
    dec_blocks=None, zdim=16, width=512, custom_width_str="", bottleneck_multiple=0.25,
    no_bias_above=64, scale_encblock=False, test_eval=False, warmup_iters=0.0, num_mixtures=10,
    grad_clip=200.0, skip_threshold=400.0, lr=1.5e-4, lr_prior=1.5e-4, wd=0.0, wd_prior=0.0,
    num_epochs=10000, n_batch=32, adam_beta1=0.9, adam_beta2=0.9, temperature=1.0,
    iters_per_ckpt=25000, iters_per_print=1000, iters_per_save=10000, iters_per_images=10000,
    epochs_per_eval=10, epochs_per_probe=None, epochs_per_eval_save=20, num_images_visualize=8,
    num_variables_visualize=6, num_temperatures_visualize=3,
)  # fmt: skip


CIFAR10 = dict(
    width=384, lr=2e-4, zdim=16, wd=0.01, warmup_iters=100, dataset="cifar10", n_batch=16,
    ema_rate=0.9999, dec_blocks="1x1,4m1,4x2,8m4,8x5,16m8,16x10,32m16,32x21",
    enc_blocks="32x11,32d2,16x6,16d2,8x6,8d2,4x3,4d4,1x3",
)  # fmt: skip


IMAGENET32 = CIFAR10 | dict(
    dataset="imagenet32", ema_rate=0.999, width=512, n_batch=8, lr=1.5e-4, grad_clip=200.0,
    skip_threshold=300.0, epochs_per_eval=1, epochs_per_eval_save=1,
    dec_blocks="1x2,4m1,4x4,8m4,8x9,16m8,16x19,32m16,32x40",
    enc_blocks="32x15,32d2,16x9,16d2,8x8,8d2,4x6,4d4,1x6",
)  # fmt: skip


IMAGENET64 = IMAGENET32 | dict(
    dataset="imagenet64", n_batch=4, grad_clip=220.0, skip_threshold=380.0,
    dec_blocks="1x2,4m1,4x3,8m4,8x7,16m8,16x15,32m16,32x31,64m32,64x12",
    enc_blocks="64x11,64d2,32x20,32d2,16x9,16d2,8x8,8d2,4x7,4d4,1x5",
)  # fmt: skip


FFHQ256 = IMAGENET64 | dict(
    n_batch=1, lr=1.5e-4, dataset="ffhq_256", num_images_visualize=2, num_variables_visualize=3,
    num_temperatures_visualize=1, no_bias_above=64, grad_clip=130.0, skip_threshold=180.0,
    dec_blocks="1x2,4m1,4x3,8m4,8x4,16m8,16x9,32m16,32x21,64m32,64x13,128m64,128x7,256m128",
    enc_blocks="256x3,256d2,128x8,128d2,64x12,64d2,32x17,32d2,16x7,16d2,8x5,8d2,4x5,4d4,1x4",
)  # fmt: skip


FFHQ1024 = FFHQ256 | dict(
    dataset="ffhq_1024", data_root="./ffhq_images1024x1024", num_images_visualize=1,
    iters_per_images=25000, num_variables_visualize=0, num_temperatures_visualize=4,
    grad_clip=360.0, skip_threshold=500.0, num_mixtures=2, width=16, lr=7e-5,
    dec_blocks="1x2,4m1,4x3,8m4,8x4,16m8,16x9,32m16,32x20,64m32,64x14,128m64,128x7,256m128,"
    "256x2,512m256,1024m512",
    enc_blocks="1024x1,1024d2,512x3,512d2,256x5,256d2,128x7,128d2,64x10,64d2,32x14,32d2,16x7,"
    "16d2,8x5,8d2,4x5,4d4,1x4",
    custom_width_str="512:32,256:64,128:512,64:512,32:512,16:512,8:512,4:512,1:512",
)  # fmt: skip


PRESETS = {"cifar10": CIFAR10, "imagenet32": IMAGENET32, "imagenet64": IMAGENET64,
           "ffhq256": FFHQ256, "ffhq1024": FFHQ1024}  # fmt: skip


@pytest.mark.parametrize("preset", PRESETS)
def test_every_published_option_and_preset(preset):
    H = parsed("--hps", preset)
    want = DEFAULTS | PRESETS[preset]
    assert {name: H[name] for name in want} == want
    assert {name: type(H[name]) for name in want} == {name: type(want[name]) for name in want} | {
        "warmup_iters": type(H.warmup_iters)
    }


def test_the_command_line_wins_and_later_presets_over_earlier():
    assert parsed("--hparam_sets", "cifar10", "--lr", "0.5", "--width=8").lr == 0.5
    assert parsed("--width", "8", "--hps", "imagenet64").width == 8  # in any order
    both = parsed("--hps", "imagenet64,cifar10")
    assert (both.width, both.epochs_per_eval) == (384, 1)
    # An option given with its own default is given all the same.
    assert parsed("--hps", "cifar10", "--width", "512").width == 512
    flags = parsed("--hps", "digits", "--test_eval", "--scale_encblock")
    assert flags.test_eval is True and flags.scale_encblock is True


def test_a_presets_values_stay_as_the_parsers_defaults():
    """As in the original: programs ask the parser for them."""
    parser = add_vae_arguments(OneLineParser())
    first, second = Hyperparams(), Hyperparams()
    parse_args_and_update_hparams(first, parser, ["--hps", "ffhq1024"])
    assert first.num_mixtures == parser.get_default("num_mixtures") == 2
    parse_args_and_update_hparams(second, parser, ["--hps", "cifar10"])
    assert second.num_mixtures == 2 and second.width == parser.get_default("width") == 384


@pytest.mark.parametrize(
    "args, words",
    [
        ([], ["--hps", "imagenet64", "digits"]),
        (["--hps", "imagnet64"], ["'imagnet64'", "did you mean imagenet64?", "ffhq1024"]),
        (["--hps", "cifar10,nonsense"], ["'nonsense'"]),
    ],
)
def test_a_missing_or_unknown_preset_is_named_in_one_line(args, words):
    with pytest.raises(UserError) as error:
        parsed(*args)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_hyperparameters_without_a_command_line():
    H = get_hparams("imagenet64", zdim=8)
    assert (H.zdim, H.width, H.image_size, H.image_channels) == (8, 512, 64, 3)
    assert H == parsed("--hps", "imagenet64", "--zdim", "8") | {
        "image_size": 64,
        "image_channels": 3,
    }
    assert get_hparams("digits").image_size == 8
    with pytest.raises(UserError, match="'zdmi': did you mean zdim"):
        get_hparams("imagenet64", zdmi=8)
    with pytest.raises(UserError, match="unknown dataset 'imagenet': it is one of .*imagenet64"):
        get_hparams("imagenet64", dataset="imagenet")
    with pytest.raises(UserError, match="imagenet64 has 64 pixels"):
        get_hparams("imagenet64", image_size=32)
    assert get_hparams("images64", image_size=32).image_size == 32
