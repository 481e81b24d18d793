"""The options of a run: their table, their types, the parser of a command line."""

import argparse
import difflib
import os
import re

from errors import UserError
from image_sets import CHANNELS, IMAGE_SETS, image_channels_of, image_size_of, set_labels


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


# ---- types ---------------------------------------------------------------------------------


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


def one_of(*values):
    """An argparse type: one of these words, which the tab key completes."""
    parse = _checked(str, lambda v: v in values, f"one of {', '.join(values)}")
    parse.values = values
    return parse


def complete(action, values):
    """Lets the tab key complete an option's value to one of these (argcomplete's attribute)."""
    action.completer = lambda prefix, **_: [v for v in values if v.startswith(prefix)]


_INF = float("inf")


def path(text):
    """An argparse type: a path, whose `~` is the home folder as in a shell, or an address."""
    return os.path.expanduser(text)


count = _checked(int, lambda v: v >= 1, "a whole number of at least 1")
several = _checked(int, lambda v: v >= 2, "a whole number of at least 2")
natural = _checked(int, lambda v: v >= 0, "a whole number of at least 0")
seed = _checked(int, lambda v: 0 <= v < 2**62, "a whole number from 0 to below 2^62")
positive = _checked(float, lambda v: 0 < v < _INF, "a positive number")
nonnegative = _checked(float, lambda v: 0 <= v < _INF, "a number of at least 0")
probability = _checked(float, lambda v: 0 <= v <= 1, "a number from 0 to 1")
fraction = _checked(float, lambda v: 0 <= v < 1, "a number from 0 up to, not including, 1")
threshold = _checked(float, lambda v: v == -1 or v > 0, "a positive number, or -1 for none")
port = _checked(int, lambda v: 1 <= v <= 65535, "a port number from 1 to 65535")
device = one_of("auto", "cpu", "cuda")
channels = _checked(int, lambda v: v in CHANNELS, "1 (grey) or 3 (RGB)")


def colour(text):
    """An argparse type: a colour by its name (white, gainsboro) or as #rrggbb."""
    from PIL import ImageColor  # options serve networks too, which need no Pillow

    if text.lower() in ImageColor.colormap or re.fullmatch("#[0-9a-fA-F]{6}", text):
        return text.lower()
    raise argparse.ArgumentTypeError(f"got {text!r}; it must be a colour's name or '#rrggbb'")


# ---- the table -----------------------------------------------------------------------------

# group -> rows of (option, type, default, meaning with its unit). A type of bool is a flag.
OPTIONS = {
    "run": [
        ("seed", seed, 0, "seed of the weights, the noise and the order of the images"),
        ("desc", str, "test", "name of the run; its files go to save_dir/desc"),
        ("save_dir", path, "./saved_models", "folder of all runs"),
        ("device", device, "auto", "auto is CUDA where there is one"),
        ("port", port, 29500, "rendezvous port of several processes; a free one if it is taken"),
        ("timeout", positive, 600.0, "seconds without a step after which a process is given up"),
        ("test_eval", bool, False, "evaluate the restored EMA weights on the test set, then end"),
        ("label", one_of("given", "none"), "given", "evaluate given the images' labels, or none"),
        ("dry_run", bool, False, "end after the summary of the run"),
    ],
    "data": [
        ("dataset", str, "cifar10", f"one of {', '.join(IMAGE_SETS)}"),
        ("data_root", path, "./", "folder of the data set's files; images: also one .npy file"),
        ("image_size", count, None, "images: pixels of a side after resizing (an .npy: its own)"),
        ("image_channels", channels, None, "images: 3 for RGB, 1 for grey (none: the data set's)"),
        ("labels", path, None, "images: folders, or FILE.json (docs/data.md); cifar10: own"),
        ("label_dropout", probability, 0.1, "share of the labels that a step of training ignores"),
        ("bad_images", one_of("refuse", "skip"), "refuse", "images: unreadable or too small ones"),
        ("background", colour, "white", "images: a colour that transparency is laid on"),
        ("grow", bool, False, "images: --data_root has new ones, which are split by themselves"),
        ("xflip", bool, False, "mirror each training image with probability 1/2 in each epoch"),
        ("num_workers", natural, None, "processes that load images (none: chosen, docs/data.md)"),
    ],
    "restore": [
        (
            "resume",
            bool,
            False,
            "go on from the run's newest checkpoint, or start if it has none",
        ),
        ("overwrite", bool, False, "start anew in the folder of a run, whose files are removed"),
        ("init_from", path, None, "start a new training from weights: a file, or a run's folder"),
        ("restore_path", path, None, "weights: PREFIX-model.th"),
        ("restore_ema_path", path, None, "EMA weights: PREFIX-model-ema.th"),
        ("restore_log_path", path, None, "log that names the step and epoch: PREFIX-log.jsonl"),
        ("restore_optimizer_path", path, None, "optimizer state, Apex or AdamW: PREFIX-opt.th"),
    ],
    "network": [
        ("enc_blocks", str, None, "encoder: RxK is K blocks at resolution R; RdK pools by K after"),
        ("dec_blocks", str, None, "decoder: RxK likewise; RmS first adds the state of S upsampled"),
        ("zdim", count, 16, "latent channels of a stochastic layer"),
        ("width", count, 512, "channels of the residual stream"),
        ("custom_width_str", str, "", "other widths at some resolutions: R:width,R:width"),
        ("bottleneck_multiple", positive, 0.25, "width of a block's bottleneck over its width"),
        ("no_bias_above", natural, 64, "largest resolution with a learned constant, in pixels"),
        ("num_mixtures", count, 10, "logistics in the mixture of a pixel"),
        ("scale_encblock", bool, False, "without effect"),
    ],
    "optimization": [
        ("n_batch", count, 32, "images per process and step, or part of it (--grad_accum)"),
        ("num_epochs", count, 10000, "passes over the training images"),
        ("lr", positive, 0.00015, "learning rate of AdamW after the warm-up"),
        ("warmup_iters", nonnegative, 0.0, "steps of linear warm-up of the learning rate"),
        ("wd", nonnegative, 0.0, "decoupled weight decay"),
        ("adam_beta1", fraction, 0.9, "decay of AdamW's first moment per step"),
        ("adam_beta2", fraction, 0.9, "decay of AdamW's second moment per step"),
        ("grad_clip", positive, 200.0, "largest gradient norm; a larger one is scaled down to it"),
        ("skip_threshold", threshold, 400.0, "no update at or above this gradient norm; -1: off"),
        ("skip_streak", count, 100, "skipped updates in a row that are reported"),
        ("max_skips", count, None, "skipped updates in a row that end the run (none: never)"),
        ("ema_rate", fraction, 0.999, "decay of the moving average of the weights per update"),
        ("ema_warmup", bool, False, "decay at most (1 + n) / (10 + n) after n updates"),
        ("kl_warmup_iters", natural, 0, "steps in which the rate's weight in the loss grows to 1"),
        ("lr_prior", positive, 0.00015, "without effect"),
        ("wd_prior", nonnegative, 0.0, "without effect"),
        ("temperature", nonnegative, 1.0, "without effect"),
    ],
    "speed and memory": [
        ("precision", one_of("fp32", "tf32", "bf16"), "fp32", "of the convolutions"),
        ("checkpoint_activations", bool, False, "a third more time, a fraction of the memory"),
        ("grad_accum", count, 1, "batches of n_batch per step and process"),
        ("compile", bool, False, "torch.compile, for the shape of a step"),
        ("cuda_graphs", bool, False, "CUDA: a step as one graph (never run on a GPU)"),
        ("cudnn_benchmark", bool, False, "CUDA: convolutions chosen by trial (never run on a GPU)"),
    ],
    "logging": [
        ("iters_per_print", count, 1000, "steps between log lines, which average over them"),
        ("iters_per_save", count, 10000, "steps between saves of latest-*"),
        ("iters_per_ckpt", count, 25000, "steps between saves of iter-N-*"),
        ("keep_ckpts", count, None, "newest iter-N-* that are kept (none: all)"),
        ("iters_per_images", count, 10000, "steps between pictures"),
        ("epochs_per_eval", count, 10, "epochs between evaluations on the validation set"),
        ("patience", count, None, "evaluations without a new best that end the run (none: never)"),
        (
            "iw_samples",
            count,
            None,
            "samples an image of the importance-weighted bound (none: no)",
        ),
        ("tensorboard", bool, False, "write the figures of losses for TensorBoard too"),
        ("epochs_per_probe", count, None, "without effect"),
        ("epochs_per_eval_save", count, 20, "without effect"),
        ("num_images_visualize", count, 8, "validation images in a picture, one a column"),
        ("num_variables_visualize", natural, 6, "rows decoded from the first k latents alone"),
        ("num_temperatures_visualize", natural, 3, "rows of samples: t = 1.0, 0.9, 0.8, 0.7"),
    ],
}

# The original's, which its `add_vae_arguments` adds; the others are ours.
PUBLISHED = frozenset(
    "seed port save_dir data_root desc restore_path restore_ema_path restore_log_path "
    "restore_optimizer_path dataset ema_rate enc_blocks dec_blocks zdim width custom_width_str "
    "bottleneck_multiple no_bias_above scale_encblock test_eval warmup_iters num_mixtures "
    "grad_clip skip_threshold lr lr_prior wd wd_prior num_epochs n_batch adam_beta1 adam_beta2 "
    "temperature iters_per_ckpt iters_per_print iters_per_save iters_per_images epochs_per_eval "
    "epochs_per_probe epochs_per_eval_save num_images_visualize num_variables_visualize "
    "num_temperatures_visualize".split()
)
# Without effect, as in the original: accepted, and not shown.
IDLE = frozenset(
    "scale_encblock lr_prior wd_prior temperature epochs_per_probe epochs_per_eval_save".split()
)
# What other programs call an option.
SYNONYMS = {
    "lr": "learning_rate learningrate lr_rate base_lr alpha step_size",
    "n_batch": "batch_size batch batchsize bs train_batch_size mini_batch_size",
    "num_epochs": "epochs n_epochs max_epochs num_train_epochs train_epochs",
    "wd": "weight_decay l2",
    "warmup_iters": "warmup warmup_steps lr_warmup num_warmup_steps warmup_iterations",
    "kl_warmup_iters": "kl_warmup kl_anneal kl_annealing beta_warmup kl_warmup_steps",
    "grad_clip": "clip clip_grad max_grad_norm gradient_clip gradient_clip_val clip_grad_norm",
    "grad_accum": "gradient_accumulation_steps accumulate_grad_batches accum_iter accumulation",
    "ema_rate": "ema ema_decay ema_beta",
    "adam_beta1": "beta1 betas",
    "adam_beta2": "beta2",
    "data_root": "data data_dir data_path dataset_path train_dir root dataroot image_dir images",
    "save_dir": "output output_dir out_dir outdir out log_dir logdir save_path results_dir",
    "desc": "name run_name exp_name experiment experiment_name tag",
    "num_workers": "workers n_workers num_loader_workers",
    "hps": "preset config model arch",
    "image_size": "resolution size img_size imsize res",
    "iters_per_save": "save_every save_steps save_interval",
    "iters_per_ckpt": "checkpoint_every ckpt_interval",
    "iters_per_print": "log_every log_interval print_freq logging_steps",
    "epochs_per_eval": "eval_every eval_interval",
    "labels": "label_file classes class_labels cond class_cond",
    "label": "class y",
    "image_channels": "channels n_channels in_channels num_channels grayscale grey",
    "patience": "early_stopping early_stopping_patience",
    "init_from": "pretrained finetune finetune_from init_weights",
    "restore_path": "checkpoint ckpt load weights load_from",
    "resume": "continue continue_training restart auto_resume",
    "overwrite": "force overwrite_output_dir",
    "precision": "dtype amp bf16 fp16 mixed_precision",
    "checkpoint_activations": "gradient_checkpointing checkpointing grad_checkpointing",
    "device": "gpu gpus cuda accelerator",
    "test_eval": "eval evaluate test eval_only",
    "seed": "random_seed manual_seed",
    "temperature": "temp t",
    "n": "num_samples n_samples num_images",
}
_MEANT = {word: option for option, words in SYNONYMS.items() for word in words.split()}

DEFAULTS = {
    name: False if kind is bool else default
    for rows in OPTIONS.values()
    for name, kind, default, _ in rows
}


def setting(H, name):
    """H's value of an option, or the option's default where H has none.

    H has none where a program made it, or its parser knows the original's options alone; or where
    the parser has an option of that name with a meaning of its own (`add_own_options`).
    """
    taken = getattr(H, "taken_options", None) or ()
    value = None if name in taken else getattr(H, name, None)
    return DEFAULTS[name] if value is None else value


# ---- the parser ----------------------------------------------------------------------------


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
        meant = f"--{_MEANT.get(name.strip('-').lower().replace('-', '_'))}"
        near = [meant] if meant in takers else difflib.get_close_matches(name, takers, n=3)
        words = [o if o in own else f"{o} (of {', '.join(takers[o])})" for o in near]
        return f"did you mean {' or '.join(words)}?" if near else "see --help"

    def error(self, message):
        raise UserError(message)


def add_options(parser, names, hps=None):
    """Adds those options of the table to a parser, in groups; `hps`: presets that --hps takes.

    Returns:
        the names left out, for the parser has an option of that string already.
    """
    taken, groups = [], {group.title: group for group in parser._action_groups}
    for title, rows in OPTIONS.items():
        group = groups.get(title) or parser.add_argument_group(title)
        if title == "run" and hps:
            meaning = f"preset, or several with commas, later over earlier: {', '.join(hps)}"
            action = group.add_argument("--hps", "--hparam_sets", dest="hparam_sets", help=meaning)
            complete(action, hps)
        for name, kind, default, meaning in rows:
            if name not in names:
                continue
            if f"--{name}" in parser._option_string_actions:
                taken.append(name)
                continue
            help = argparse.SUPPRESS if name in IDLE else meaning
            if kind is bool:
                group.add_argument(f"--{name}", action="store_true", help=help)
                if name not in PUBLISHED:  # a preset may set it, and a command line take it back
                    group.add_argument(
                        f"--no_{name}",
                        dest=name,
                        action="store_false",
                        default=argparse.SUPPRESS,
                        help=argparse.SUPPRESS,
                    )
            else:
                action = group.add_argument(f"--{name}", type=kind, default=default, help=help)
                if values := getattr(kind, "values", IMAGE_SETS if name == "dataset" else ()):
                    complete(action, values)
    return taken


def add_own_options(parser):
    """Adds the options that the original lacks, where the parser has none of that name.

    Returns:
        the names that it has, whose default then holds (H.taken_options, see `setting`).
    """
    return add_options(parser, DEFAULTS.keys() - PUBLISHED)


def given_options(parser, args=None):
    """Names of a parser's options that the arguments (default: the command line's) name."""
    absent = object()
    names = {action.dest for action in parser._actions}
    parsed = parser.parse_args(args, argparse.Namespace(**dict.fromkeys(names, absent)))
    return {name for name, value in vars(parsed).items() if value is not absent}


def hparams_of(preset, overrides, add_vae_arguments, parse_args_and_update_hparams):
    """A preset's hyperparameters with every option, by the parser functions of `hps`.

    Returns:
        Hyperparams, with image_size, image_channels and, if it has any, n_labels and label_names
        of its data set.

    Raises:
        UserError: for an unknown preset or override, or what image_size_of refuses.
    """
    H, parser = Hyperparams(), OneLineParser()
    add_vae_arguments(parser)
    taken = add_own_options(parser)
    parse_args_and_update_hparams(H, parser, ["--hps", preset])
    if taken:
        H.taken_options = taken
    for name in overrides:
        if name not in {*H, "n_labels", "label_names"}:
            near = difflib.get_close_matches(name, H, n=1)
            hint = f"did you mean {near[0]}?" if near else "train.py --help lists them"
            raise UserError(f"unknown hyperparameter {name!r}: {hint}")
    H.update(overrides)
    if H.dataset in IMAGE_SETS or not H.image_size:  # else a fork's own, which tells its size
        H.image_size = image_size_of(H.dataset, setting(H, "image_size"))
    known = H.dataset in IMAGE_SETS
    asked = setting(H, "image_channels")
    H.image_channels = image_channels_of(H.dataset, asked) if known else asked or 3
    names = set_labels(H.dataset, setting(H, "labels")) if known and H.n_labels is None else []
    if names:
        H.update(n_labels=len(names), label_names=names)
    return H
