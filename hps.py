"""The presets: every number that defines a run and its network.

A preset sets the defaults of train.py's options (`options.OPTIONS`); an option given on the command
line wins.
"""

import difflib

from errors import UserError
from options import PUBLISHED, Hyperparams, add_options, hparams_of

# The five published ones (arXiv 2011.10650, section 4 and its released code), each on the one
# before it, then two that train on a laptop's CPU, then four for own images (--data_root FOLDER)
# on one ordinary GPU.

HPARAMS_REGISTRY = {}

cifar10 = Hyperparams(
    dataset="cifar10",
    width=384,
    zdim=16,
    lr=2e-4,
    wd=0.01,
    warmup_iters=100,
    n_batch=16,
    ema_rate=0.9999,
    enc_blocks="32x11,32d2,16x6,16d2,8x6,8d2,4x3,4d4,1x3",
    dec_blocks="1x1,4m1,4x2,8m4,8x5,16m8,16x10,32m16,32x21",
)
HPARAMS_REGISTRY["cifar10"] = cifar10

i32 = Hyperparams(
    cifar10,
    dataset="imagenet32",
    width=512,
    lr=1.5e-4,
    n_batch=8,
    ema_rate=0.999,
    grad_clip=200.0,
    skip_threshold=300.0,
    epochs_per_eval=1,
    epochs_per_eval_save=1,
    enc_blocks="32x15,32d2,16x9,16d2,8x8,8d2,4x6,4d4,1x6",
    dec_blocks="1x2,4m1,4x4,8m4,8x9,16m8,16x19,32m16,32x40",
)
HPARAMS_REGISTRY["imagenet32"] = i32

i64 = Hyperparams(
    i32,
    dataset="imagenet64",
    n_batch=4,
    grad_clip=220.0,
    skip_threshold=380.0,
    enc_blocks="64x11,64d2,32x20,32d2,16x9,16d2,8x8,8d2,4x7,4d4,1x5",
    dec_blocks="1x2,4m1,4x3,8m4,8x7,16m8,16x15,32m16,32x31,64m32,64x12",
)
HPARAMS_REGISTRY["imagenet64"] = i64

ffhq_256 = Hyperparams(
    i64,
    dataset="ffhq_256",
    n_batch=1,
    lr=1.5e-4,
    no_bias_above=64,
    grad_clip=130.0,
    skip_threshold=180.0,
    num_images_visualize=2,
    num_variables_visualize=3,
    num_temperatures_visualize=1,
    enc_blocks="256x3,256d2,128x8,128d2,64x12,64d2,32x17,32d2,16x7,16d2,8x5,8d2,4x5,4d4,1x4",
    dec_blocks="1x2,4m1,4x3,8m4,8x4,16m8,16x9,32m16,32x21,64m32,64x13,128m64,128x7,256m128",
)
HPARAMS_REGISTRY["ffhq256"] = ffhq_256

ffhq1024 = Hyperparams(
    ffhq_256,
    dataset="ffhq_1024",
    data_root="./ffhq_images1024x1024",
    width=16,
    custom_width_str="512:32,256:64,128:512,64:512,32:512,16:512,8:512,4:512,1:512",
    num_mixtures=2,
    lr=7e-5,
    grad_clip=360.0,
    skip_threshold=500.0,
    iters_per_images=25000,
    num_images_visualize=1,
    num_variables_visualize=0,
    num_temperatures_visualize=4,
    enc_blocks="1024x1,1024d2,512x3,512d2,256x5,256d2,128x7,128d2,64x10,64d2,32x14,32d2,"
    "16x7,16d2,8x5,8d2,4x5,4d4,1x4",
    dec_blocks="1x2,4m1,4x3,8m4,8x4,16m8,16x9,32m16,32x20,64m32,64x14,128m64,128x7,"
    "256m128,256x2,512m256,1024m512",
)
HPARAMS_REGISTRY["ffhq1024"] = ffhq1024

digits = Hyperparams(
    dataset="digits",
    width=64,
    zdim=8,
    num_mixtures=5,
    lr=2e-3,
    wd=0.01,
    warmup_iters=100,
    n_batch=32,
    ema_rate=0.995,
    enc_blocks="8x2,8d2,4x2,4d4,1x1",
    dec_blocks="1x1,4m1,4x2,8m4,8x2",
    num_epochs=48,
    epochs_per_eval=10,
    iters_per_print=200,
    iters_per_save=1000,
    iters_per_images=1000,
)
HPARAMS_REGISTRY["digits"] = digits

photos32 = Hyperparams(
    digits,
    dataset="photos32",
    n_batch=16,
    num_mixtures=10,
    enc_blocks="32x1,32d2,16x2,16d2,8x2,8d2,4x1,4d4,1x1",
    dec_blocks="1x1,4m1,8m4,8x2,16m8,16x3,32m16,32x1",
    num_epochs=10,
)
HPARAMS_REGISTRY["photos32"] = photos32

# n_batch fits 8 GB: kept for the backward pass are 113, 208, 357 and 549 MiB an image (float32).
images32 = Hyperparams(  # 15.0 million parameters
    cifar10,
    dataset="images",
    image_size=32,
    width=256,
    ema_rate=0.999,
    ema_warmup=True,
    enc_blocks="32x8,32d2,16x6,16d2,8x6,8d2,4x3,4d4,1x3",
    dec_blocks="1x1,4m1,4x2,8m4,8x5,16m8,16x10,32m16,32x14",
)
HPARAMS_REGISTRY["images32"] = images32

images64 = Hyperparams(  # 16.2 million
    images32,
    image_size=64,
    width=128,
    custom_width_str="32:256,16:256,8:256,4:256,1:256",
    n_batch=8,
    enc_blocks="64x6,64d2,32x8,32d2,16x6,16d2,8x6,8d2,4x3,4d4,1x3",
    dec_blocks="1x1,4m1,4x2,8m4,8x5,16m8,16x10,32m16,32x14,64m32,64x5",
)
HPARAMS_REGISTRY["images64"] = images64

images128 = Hyperparams(  # 27.3 million
    images64,
    image_size=128,
    width=64,
    custom_width_str="64:128,32:256,16:384,8:384,4:384,1:384",
    n_batch=6,
    num_images_visualize=4,
    enc_blocks="128x3,128d2,64x6,64d2,32x8,32d2,16x6,16d2,8x6,8d2,4x3,4d4,1x3",
    dec_blocks="1x1,4m1,4x2,8m4,8x5,16m8,16x10,32m16,32x14,64m32,64x7,128m64,128x2",
)
HPARAMS_REGISTRY["images128"] = images128

images256 = Hyperparams(  # 42.5 million
    images128,
    image_size=256,
    width=32,
    custom_width_str="128:64,64:128,32:256,16:512,8:512,4:512,1:512",
    n_batch=4,
    enc_blocks="256x2,256d2,128x3,128d2,64x6,64d2,32x8,32d2,16x6,16d2,8x6,8d2,4x3,4d4,1x3",
    dec_blocks="1x1,4m1,4x2,8m4,8x5,16m8,16x10,32m16,32x14,64m32,64x7,128m64,128x3,256m128",
)
HPARAMS_REGISTRY["images256"] = images256


# ---- the command line ----------------------------------------------------------------------


def add_vae_arguments(parser):
    """Adds the original's options to any parser of argparse, in groups, and returns the parser."""
    add_options(parser, PUBLISHED, HPARAMS_REGISTRY)
    return parser


def parse_args_and_update_hparams(H, parser, s=None):
    """Fills H from the arguments s (default: the command line's).

    The presets' values become the parser's defaults, and stay so, as in the original.

    Raises:
        UserError: for a missing or unknown preset (an option's own error is the parser's).
    """
    presets = f"--hps names a preset, one of {', '.join(HPARAMS_REGISTRY)}"
    names = [name for name in (parser.parse_args(s).hparam_sets or "").split(",") if name]
    if not names:
        raise UserError(f"no preset given: {presets}")
    for name in names:
        if name not in HPARAMS_REGISTRY:
            near = difflib.get_close_matches(name, HPARAMS_REGISTRY, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise UserError(f"unknown preset {name!r}{hint}: {presets}")
    for name in names:
        parser.set_defaults(**HPARAMS_REGISTRY[name])
    H.update(vars(parser.parse_args(s)))


def get_hparams(preset, **overrides):
    """A run's hyperparameters without a command line: get_hparams("imagenet64", zdim=8).

    Returns:
        Hyperparams with every option, and image_size and image_channels of its data set.

    Raises:
        UserError: for an unknown preset or override, an unknown data set or a size that it lacks.
    """
    return hparams_of(preset, overrides, add_vae_arguments, parse_args_and_update_hparams)
