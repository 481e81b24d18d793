"""Stand-in for the original's `hps`: its options and its five presets, nothing else.

A fork that keeps its own `hps.py` for a preset has a parser that knows none of this project's
options.
"""

import argparse


class Hyperparams(dict):
    """A dict whose items are attributes; whatever is missing reads None. `copy` is dict's own."""

    def __getattr__(self, name):
        return self.get(name)

    def __setattr__(self, name, value):
        self[name] = value


cifar10 = Hyperparams(
    width=384,
    lr=2e-4,
    zdim=16,
    wd=0.01,
    warmup_iters=100,
    dataset="cifar10",
    n_batch=16,
    ema_rate=0.9999,
    dec_blocks="1x1,4m1,4x2,8m4,8x5,16m8,16x10,32m16,32x21",
    enc_blocks="32x11,32d2,16x6,16d2,8x6,8d2,4x3,4d4,1x3",
)

i32 = Hyperparams(
    cifar10,
    dataset="imagenet32",
    ema_rate=0.999,
    width=512,
    n_batch=8,
    lr=1.5e-4,
    grad_clip=200.0,
    skip_threshold=300.0,
    epochs_per_eval=1,
    epochs_per_eval_save=1,
    dec_blocks="1x2,4m1,4x4,8m4,8x9,16m8,16x19,32m16,32x40",
    enc_blocks="32x15,32d2,16x9,16d2,8x8,8d2,4x6,4d4,1x6",
)

i64 = Hyperparams(
    i32,
    dataset="imagenet64",
    n_batch=4,
    grad_clip=220.0,
    skip_threshold=380.0,
    dec_blocks="1x2,4m1,4x3,8m4,8x7,16m8,16x15,32m16,32x31,64m32,64x12",
    enc_blocks="64x11,64d2,32x20,32d2,16x9,16d2,8x8,8d2,4x7,4d4,1x5",
)

ffhq_256 = Hyperparams(
    i64,
    n_batch=1,
    lr=1.5e-4,
    dataset="ffhq_256",
    num_images_visualize=2,
    num_variables_visualize=3,
    num_temperatures_visualize=1,
    no_bias_above=64,
    grad_clip=130.0,
    skip_threshold=180.0,
    dec_blocks="1x2,4m1,4x3,8m4,8x4,16m8,16x9,32m16,32x21,64m32,64x13,128m64,128x7,256m128",
    enc_blocks="256x3,256d2,128x8,128d2,64x12,64d2,32x17,32d2,16x7,16d2,8x5,8d2,4x5,4d4,1x4",
)

ffhq1024 = Hyperparams(
    ffhq_256,
    dataset="ffhq_1024",
    data_root="./ffhq_images1024x1024",
    num_images_visualize=1,
    iters_per_images=25000,
    num_variables_visualize=0,
    num_temperatures_visualize=4,
    grad_clip=360.0,
    skip_threshold=500.0,
    num_mixtures=2,
    width=16,
    lr=7e-5,
    dec_blocks="1x2,4m1,4x3,8m4,8x4,16m8,16x9,32m16,32x20,64m32,64x14,128m64,128x7,256m128,"
    "256x2,512m256,1024m512",
    enc_blocks="1024x1,1024d2,512x3,512d2,256x5,256d2,128x7,128d2,64x10,64d2,32x14,32d2,16x7,16d2,"
    "8x5,8d2,4x5,4d4,1x4",
    custom_width_str="512:32,256:64,128:512,64:512,32:512,16:512,8:512,4:512,1:512",
)

HPARAMS_REGISTRY = {
    "cifar10": cifar10,
    "imagenet32": i32,
    "imagenet64": i64,
    "ffhq256": ffhq_256,
    "ffhq1024": ffhq1024,
}

_FLAGS = "scale_encblock", "test_eval"
_OPTIONS = {
    int: dict(
        seed=0, port=29500, zdim=16, width=512, no_bias_above=64, num_mixtures=10,
        num_epochs=10000, n_batch=32, iters_per_ckpt=25000, iters_per_print=1000,
        iters_per_save=10000, iters_per_images=10000, epochs_per_eval=10, epochs_per_probe=None,
        epochs_per_eval_save=20, num_images_visualize=8, num_variables_visualize=6,
        num_temperatures_visualize=3,
    ),
    float: dict(
        ema_rate=0.999, bottleneck_multiple=0.25, warmup_iters=0.0, grad_clip=200.0,
        skip_threshold=400.0, lr=0.00015, lr_prior=0.00015, wd=0.0, wd_prior=0.0, adam_beta1=0.9,
        adam_beta2=0.9, temperature=1.0,
    ),
    str: dict(
        save_dir="./saved_models", data_root="./", desc="test", restore_path=None,
        restore_ema_path=None, restore_log_path=None, restore_optimizer_path=None,
        dataset="cifar10", enc_blocks=None, dec_blocks=None, custom_width_str="",
    ),
}  # fmt: skip


def add_vae_arguments(parser):
    """Adds the published options to any parser of argparse, and returns it."""
    assert isinstance(parser, argparse.ArgumentParser)
    parser.add_argument("--hps", "--hparam_sets", dest="hparam_sets", type=str)
    for kind, defaults in _OPTIONS.items():
        for name, default in defaults.items():
            parser.add_argument(f"--{name}", type=kind, default=default)
    for name in _FLAGS:
        parser.add_argument(f"--{name}", action="store_true")
    return parser


def parse_args_and_update_hparams(H, parser, s=None):
    """Fills H from arguments; the values of the presets they name become the parser's defaults."""
    for name in parser.parse_args(s).hparam_sets.split(","):
        parser.set_defaults(**HPARAMS_REGISTRY[name])
    H.update(vars(parser.parse_args(s)))
