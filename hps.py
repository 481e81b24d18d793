"""Every number that defines a run: train.py's options, the presets, facts of the data sets.

A preset sets defaults; an option given on the command line wins. Needs the standard library only.
"""

import argparse
import difflib
import os
from typing import NamedTuple


class UserError(ValueError):
    """What a user got wrong: one line with the value, the rule and the remedy.

    Entry points print it and end with status 2 (`utils.run_command`).
    """


class Hyperparams(dict):
    """A dict whose items are attributes too; a missing public name reads None.

    Raises:
        AttributeError: for a missing name that starts with an underscore, which is how the copy
            and pickle protocols ask whether a method exists.
    """

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        return self.get(name)

    def __setattr__(self, name, value):
        self[name] = value

    def copy(self):
        return Hyperparams(self)


# ---- data sets -----------------------------------------------------------------------------


class ImageSet(NamedTuple):
    """What a network has to know of a data set, known without any of its files.

    mean and std are those of about 10,000 training images, in levels of 0 to 255: the network's
    input is (level - mean) / std. bits is the depth of the target; at 5 bits the lowest three of
    each level are dropped from it. notice is what every result on the data set says with it.
    """

    image_size: int | None
    mean: float | None
    std: float | None
    bits: int = 8
    notice: str | None = None


_BOX = "box-filtered ImageNet (Chrabaszcz et al. 2017): not comparable with the published {} of {}"


IMAGE_SETS = {
    "cifar10": ImageSet(32, 120.63838, 64.16736),
    "imagenet32": ImageSet(32, 116.2373, 69.37404),
    "imagenet64": ImageSet(64, 115.92961967, 69.37404),
    # The same photographs, made smaller by another filter. With the same mean and std, weights
    # trained on one can be tried on the other.
    "imagenet32_box": ImageSet(32, 116.2373, 69.37404, notice=_BOX.format(3.80, "imagenet32")),
    "imagenet64_box": ImageSet(64, 115.92961967, 69.37404, notice=_BOX.format(3.52, "imagenet64")),
    "ffhq_256": ImageSet(256, 112.8666757481, 69.84780273, bits=5),
    "ffhq_1024": ImageSet(1024, 0.4387 * 255, 0.2743 * 255),  # published for levels of 0 to 1
    # The two data sets that scikit-learn ships; measured on their training images
    # (tests/test_data.py measures them again).
    "digits": ImageSet(8, 78.04011, 95.98312),
    "photos32": ImageSet(32, 105.21026, 81.46530),
    # The user's own: --image_size gives the size, data.py measures mean and std.
    "images": ImageSet(None, None, None),
}


def set_image_size(H):
    """Sets H.image_size and H.image_channels to those of H.dataset.

    Raises:
        UserError: for an unknown data set, or another size than it has.
    """
    if H.dataset not in IMAGE_SETS:
        raise UserError(f"unknown dataset {H.dataset!r}: it is one of {', '.join(IMAGE_SETS)}")
    size = IMAGE_SETS[H.dataset].image_size
    if size and H.image_size not in (None, size):
        raise UserError(
            f"--image_size {H.image_size}: {H.dataset} has {size} pixels; leave it out, or give "
            f"your own images with --dataset images"
        )
    H.update(image_size=H.image_size or size, image_channels=3)


def target_bits(dataset):
    """Bit depth of the targets of a data set: 5 for ffhq_256, else 8 (also for None)."""
    return IMAGE_SETS[dataset].bits if dataset in IMAGE_SETS else 8


def result_notice(dataset):
    """{} for most data sets; {"notice": text} where results must not be compared with others."""
    notice = IMAGE_SETS[dataset].notice if dataset in IMAGE_SETS else None
    return {"notice": notice} if notice else {}


# ---- presets -------------------------------------------------------------------------------
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
    width=48,
    zdim=8,
    num_mixtures=5,
    lr=2e-3,
    wd=0.01,
    warmup_iters=100,
    n_batch=32,
    ema_rate=0.995,
    enc_blocks="8x3,8d2,4x3,4d4,1x2",
    dec_blocks="1x2,4m1,4x3,8m4,8x4",
    num_epochs=50,
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
    enc_blocks="32x2,32d2,16x2,16d2,8x2,8d2,4x2,4d4,1x1",
    dec_blocks="1x1,4m1,4x2,8m4,8x2,16m8,16x3,32m16,32x3",
    num_epochs=10,
)
HPARAMS_REGISTRY["photos32"] = photos32

# n_batch fits 8 GB: kept for the backward pass are 113, 208, 359 and 549 MiB an image (float32).
images32 = Hyperparams(  # 15.0 million parameters
    cifar10,
    dataset="images",
    image_size=32,
    width=256,
    ema_rate=0.999,
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


# ---- options -------------------------------------------------------------------------------


def _checked(cast, test, rule):
    """An argparse type: cast the text, then hold it against the rule. NaN fails every test."""

    def parse(text):
        try:
            value = cast(text)
        except (ValueError, OverflowError):
            value = None
        if value is None or not test(value):
            raise argparse.ArgumentTypeError(f"got {text!r}; it must be {rule}")
        return value

    return parse


def _one_of(*values):
    parse = _checked(str, lambda v: v in values, f"one of {', '.join(values)}")
    parse.values = values
    return parse


def complete(action, values):
    """Lets the tab key complete an option's value to one of these (argcomplete's attribute)."""
    action.completer = lambda prefix, **_: [v for v in values if v.startswith(prefix)]


_INF = float("inf")
_count = _checked(int, lambda v: v >= 1, "a whole number of at least 1")
_natural = _checked(int, lambda v: v >= 0, "a whole number of at least 0")
_seed = _checked(int, lambda v: 0 <= v < 2**62, "a whole number from 0 to below 2^62")
_positive = _checked(float, lambda v: 0 < v < _INF, "a positive number")
_nonnegative = _checked(float, lambda v: 0 <= v < _INF, "a number of at least 0")
_fraction = _checked(float, lambda v: 0 <= v < 1, "a number from 0 up to, not including, 1")
_threshold = _checked(float, lambda v: v == -1 or v > 0, "a positive number, or -1 for none")
_port = _checked(int, lambda v: 1 <= v <= 65535, "a port number from 1 to 65535")

# group -> rows of (option, type, default, meaning with its unit). A type of bool is a flag.
OPTIONS = {
    "run": [
        ("seed", _seed, 0, "seed of the weights, the noise and the order of the images"),
        ("desc", str, "test", "name of the run; its files go to save_dir/desc"),
        ("save_dir", str, "./saved_models", "folder of all runs"),
        ("device", _one_of("auto", "cpu", "cuda"), "auto", "auto is CUDA where there is one"),
        ("port", _port, 29500, "rendezvous port of several processes; a free one if it is taken"),
        ("timeout", _positive, 600.0, "seconds without a step after which a process is given up"),
        ("test_eval", bool, False, "evaluate the restored EMA weights on the test set, then end"),
        ("dry_run", bool, False, "end after the summary of the run"),
    ],
    "data": [
        ("dataset", _one_of(*IMAGE_SETS), "cifar10", f"one of {', '.join(IMAGE_SETS)}"),
        ("data_root", str, "./", "folder of the data set's files; images: also one .npy file"),
        ("image_size", _count, None, "images: pixels of a side after resizing (an .npy: its own)"),
        ("bad_images", _one_of("refuse", "skip"), "refuse", "images: unreadable or too small ones"),
        ("num_workers", _natural, None, "processes that load images (none: chosen, see README)"),
    ],
    "restore": [
        (
            "resume",
            bool,
            False,
            "go on from the run's newest set of files, or start if it has none",
        ),
        ("restore_path", str, None, "weights: PREFIX-model.th"),
        ("restore_ema_path", str, None, "EMA weights: PREFIX-model-ema.th"),
        ("restore_log_path", str, None, "log that names the step and epoch: PREFIX-log.jsonl"),
        ("restore_optimizer_path", str, None, "optimizer state, Apex or AdamW: PREFIX-opt.th"),
    ],
    "network": [
        ("enc_blocks", str, None, "encoder: RxK is K blocks at resolution R; RdK pools by K after"),
        ("dec_blocks", str, None, "decoder: RxK likewise; RmS first adds the state of S upsampled"),
        ("zdim", _count, 16, "latent channels of a stochastic layer"),
        ("width", _count, 512, "channels of the residual stream"),
        ("custom_width_str", str, "", "other widths at some resolutions: R:width,R:width"),
        ("bottleneck_multiple", _positive, 0.25, "width of a block's bottleneck over its width"),
        ("no_bias_above", _natural, 64, "largest resolution with a learned constant, in pixels"),
        ("num_mixtures", _count, 10, "logistics in the mixture of a pixel"),
        ("scale_encblock", bool, False, "without effect, as in the original"),
    ],
    "optimization": [
        ("n_batch", _count, 32, "images per process and step, or part of it (--grad_accum)"),
        ("num_epochs", _count, 10000, "passes over the training images"),
        ("lr", _positive, 0.00015, "learning rate of AdamW after the warm-up"),
        ("warmup_iters", _nonnegative, 0.0, "steps of linear warm-up of the learning rate"),
        ("wd", _nonnegative, 0.0, "decoupled weight decay"),
        ("adam_beta1", _fraction, 0.9, "decay of AdamW's first moment per step"),
        ("adam_beta2", _fraction, 0.9, "decay of AdamW's second moment per step"),
        ("grad_clip", _positive, 200.0, "largest gradient norm; a larger one is scaled down to it"),
        ("skip_threshold", _threshold, 400.0, "no update at or above this gradient norm; -1: off"),
        ("skip_streak", _count, 100, "skipped updates in a row that are reported"),
        ("max_skips", _count, None, "skipped updates in a row that end the run (none: never)"),
        ("ema_rate", _fraction, 0.999, "decay of the moving average of the weights per update"),
        ("lr_prior", _positive, 0.00015, "without effect, as in the original"),
        ("wd_prior", _nonnegative, 0.0, "without effect, as in the original"),
        ("temperature", _nonnegative, 1.0, "without effect, as in the original"),
    ],
    "speed and memory": [
        ("precision", _one_of("fp32", "tf32", "bf16"), "fp32", "of the convolutions"),
        ("checkpoint_activations", bool, False, "a third more time, a fraction of the memory"),
        ("grad_accum", _count, 1, "batches of n_batch per step and process"),
        ("compile", bool, False, "torch.compile the residual blocks"),
        ("cuda_graphs", bool, False, "the same, on CUDA as graphs (mode reduce-overhead)"),
        ("cudnn_benchmark", bool, False, "CUDA: the fastest convolutions, by trial at the start"),
    ],
    "logging": [
        ("iters_per_print", _count, 1000, "steps between log lines, which average over them"),
        ("iters_per_save", _count, 10000, "steps between saves of latest-*"),
        ("iters_per_ckpt", _count, 25000, "steps between saves of iter-N-*"),
        ("keep_ckpts", _count, None, "newest sets of iter-N-* that are kept (none: all)"),
        ("iters_per_images", _count, 10000, "steps between pictures"),
        ("epochs_per_eval", _count, 10, "epochs between evaluations on the validation set"),
        (
            "iw_samples",
            _count,
            None,
            "samples an image of the importance-weighted bound (none: no)",
        ),
        ("tensorboard", bool, False, "write the figures of losses for TensorBoard too"),
        ("epochs_per_probe", _count, None, "without effect, as in the original"),
        ("epochs_per_eval_save", _count, 20, "without effect, as in the original"),
        ("num_images_visualize", _count, 8, "validation images in a picture, one a column"),
        ("num_variables_visualize", _natural, 6, "rows decoded from the first k latents alone"),
        ("num_temperatures_visualize", _natural, 3, "rows of samples: t = 1.0, 0.9, 0.8, 0.7"),
    ],
}


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that raises UserError, naming the nearest option for a mistyped one."""

    def __init__(self, **kwargs):
        kwargs.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)

    def parse_args(self, args=None, namespace=None):
        if "_ARGCOMPLETE" in os.environ:  # a shell asks how the line could go on
            import argcomplete

            argcomplete.autocomplete(self)
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            raise UserError(f"unknown option {unknown[0]!r}: {self._hint(unknown[0], parsed)}")
        return parsed

    def _hint(self, unknown, parsed):
        """What an unknown option may have been meant to be: one of another command's, or near."""
        takers = {option: [] for action in self._actions for option in action.option_strings}
        own = set(takers)  # and those of the command that was given
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                for command, parser in action.choices.items():
                    options = [o for a in parser._actions for o in a.option_strings]
                    if command == getattr(parsed, action.dest):
                        own.update(options)
                    for option in options:
                        takers.setdefault(option, []).append(command)
        name = unknown.split("=")[0]
        if name in takers:
            return f"it is an option of {', '.join(takers[name])}"
        near = difflib.get_close_matches(name, takers, n=3)
        words = [o if o in own else f"{o} (of {', '.join(takers[o])})" for o in near]
        return f"did you mean {' or '.join(words)}?" if near else "see --help"

    def error(self, message):
        raise UserError(message)


def add_vae_arguments(parser):
    """Adds every option of train.py to the parser, in groups, and returns the parser."""
    for group_name, rows in OPTIONS.items():
        group = parser.add_argument_group(group_name)
        if group_name == "run":
            action = group.add_argument(
                "--hps",
                "--hparam_sets",
                dest="hparam_sets",
                help=f"preset, or several with commas, later over earlier: "
                f"{', '.join(HPARAMS_REGISTRY)}",
            )
            complete(action, HPARAMS_REGISTRY)
        for name, kind, default, meaning in rows:
            if kind is bool:
                group.add_argument(f"--{name}", action="store_true", help=meaning)
            else:
                action = group.add_argument(f"--{name}", type=kind, default=default, help=meaning)
                if hasattr(kind, "values"):
                    complete(action, kind.values)
    return parser


def parse_args_and_update_hparams(H, parser, s=None):
    """Fills H from the arguments s (default: the command line's); presets set the defaults.

    Raises:
        UserError: for a missing or unknown preset (an option's own error is the parser's).
    """
    presets = f"--hps names a preset, one of {', '.join(HPARAMS_REGISTRY)}"
    names = [name for name in (parser.parse_args(s).hparam_sets or "").split(",") if name]
    if not names:
        raise UserError(f"no preset given: {presets}")
    preset = argparse.Namespace()
    for name in names:
        if name not in HPARAMS_REGISTRY:
            near = difflib.get_close_matches(name, HPARAMS_REGISTRY, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise UserError(f"unknown preset {name!r}{hint}: {presets}")
        vars(preset).update(HPARAMS_REGISTRY[name])
    # What stands in the namespace already takes the place of an option's default.
    H.update(vars(parser.parse_args(s, preset)))


def get_hparams(preset, **overrides):
    """A run's hyperparameters without a command line: get_hparams("imagenet64", zdim=8).

    Returns:
        Hyperparams with every option, and image_size and image_channels of its data set.

    Raises:
        UserError: for an unknown preset or override, or what set_image_size refuses.
    """
    H = Hyperparams()
    parse_args_and_update_hparams(H, add_vae_arguments(OneLineParser()), ["--hps", preset])
    for name in overrides:
        if name not in H:
            near = difflib.get_close_matches(name, H, n=1)
            hint = f"did you mean {near[0]}?" if near else "train.py --help lists them"
            raise UserError(f"unknown hyperparameter {name!r}: {hint}")
    H.update(overrides)
    set_image_size(H)
    return H
