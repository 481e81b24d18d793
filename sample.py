# PYTHON_ARGCOMPLETE_OK
"""What trained weights make, pictures or latents, without a data set.

    python sample.py --restore_ema_path latest-model-ema.th samples --n 64 --temperature 0.8

An image's noise is a function of the seed and the image's index alone: image 7 is the same, to
rounding, in any batch size and however many others are made.
"""

import interrupts  # noqa: F401  the first: a Ctrl-C while the others are imported is one line

# isort: split
import argparse
import functools
import math
from pathlib import Path

import numpy as np
import torch

import options
from ahead import Ahead
from batches import of_channels
from embeddings import layers_to_keep, resolutions_of
from endings import run_command
from errors import UserError, one_line
from exports import write_model
from hps import HPARAMS_REGISTRY
from image_files import image_paths, read_images
from image_sets import channels_of
from label_choices import (
    default_count,
    encoded_under,
    in_words,
    known_labels,
    labels_asked,
    labels_for,
    recorded_labels,
    rows_of_labels,
)
from labels import labels_of
from latent_files import LatentFile, write_embeddings, write_latents
from noise import SAMPLING
from options import OPTIONS, OneLineParser, complete
from outputs import check_out, write_images
from pictures import labelled_grid
from presets import get_hparams
from scores import write_scores
from synthesis import (
    decode_latents,
    draw_samples,
    forming,
    latents_of,
    latents_of_two,
    steps_of_forming,
    temperature_of_layers,
)
from synthesis import interpolate as images_between
from synthesis import reconstruct as reconstructed
from utils import maybe_download
from weights import load_model

# ---- the command line ----------------------------------------------------------------------


def temperatures(text):
    """The argparse type of "0.8" or "1:1.0,4:0.9": a number, or {resolution: number}."""
    if ":" not in text:
        return options.nonnegative(text)
    pairs = [pair.split(":") for pair in text.split(",")]
    if any(len(pair) != 2 for pair in pairs):
        raise argparse.ArgumentTypeError(f"got {text!r}; it must be a number or R:t,R:t")
    return {options.count(resolution): options.nonnegative(t) for resolution, t in pairs}


def add_common_options(parser, in_command):
    """What may stand before or after the command's name: there, an absent option sets nothing."""

    def add(group, name, default, meaning, **kwargs):
        default = argparse.SUPPRESS if in_command else default
        return group.add_argument(f"--{name}", default=default, help=meaning, **kwargs)

    group = parser.add_argument_group("model")
    add(group, "restore_ema_path", None, "weights: PREFIX-model-ema.th, a path or an address",
        type=options.path)  # fmt: skip
    action = add(group, "hps", None, "preset (none: told by the run's state.json or the weights)")
    complete(action, HPARAMS_REGISTRY)
    action = add(group, "device", "auto", "auto, cpu or cuda; auto is CUDA where there is one",
                 type=options.device)  # fmt: skip
    complete(action, options.device.values)
    add(group, "seed", 0, "seed of the noise", type=options.seed)
    add(group, "n_batch", 16, "images at a time", type=options.count)
    add(group, "background", None, "laid under transparent images: a name or #rrggbb (none: as "
        "the model's run had it, else white)", type=options.colour)  # fmt: skip
    add(group, "mean", False, "pixels: the mean of the mixture, without noise, not a sample",
        action="store_true")  # fmt: skip
    group = parser.add_argument_group("output")
    add(group, "out", None, "NAME.png: labelled grid; NAME.npz: arr_0, uint8 (n, S, S, 3); other "
        "names: folder of PNGs; of interpolate, progressive also NAME.gif, NAME.webp (none: "
        "COMMAND.png; encode: latents.npz, embed: embeddings.npz, "
        "score: scores.csv, export: model.safetensors)",
        type=options.path)  # fmt: skip
    add(group, "force", False, "replace what is there", action="store_true")
    group = parser.add_argument_group("network", "with --hps, for weights that are no preset's")
    for name, kind, _, meaning in OPTIONS["network"]:
        if kind is not bool:
            group.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS, help=meaning)


def add_layer_options(parser, verb):
    keep = parser.add_mutually_exclusive_group()
    keep.add_argument("--layers", type=options.count,
                      help=f"{verb} the first LAYERS latents (none: all)")  # fmt: skip
    keep.add_argument("--resolution", type=options.count,
                      help=f"{verb} the latents up to this resolution")  # fmt: skip


def add_keep_options(parser, temperature):
    add_layer_options(parser, "keep")
    parser.add_argument("--temperature", type=temperatures, default=temperature,
                        help="of the latents that are not kept: a number, or R:t,R:t")  # fmt: skip


def add_label_options(parser, encodes=True, decodes=True):
    """--label and --from_label of a network that knows labels: names, to the images in turn."""
    if decodes:
        parser.add_argument("--label", metavar="NAME[,NAME]", help="what is decoded under (none: "
                            "without a label)")  # fmt: skip
    if encodes:
        parser.add_argument("--from_label", metavar="NAME[,NAME]", help="what images are encoded "
                            "under (none: without a label)")  # fmt: skip


def make_parser():
    parser = OneLineParser(prog="sample.py", description=__doc__.split("\n")[0])
    add_common_options(parser, in_command=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, function, meaning):
        sub = commands.add_parser(
            name, help=meaning, description=f"{meaning[0].upper()}{meaning[1:]}.",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )  # fmt: skip
        add_common_options(sub, in_command=True)
        sub.set_defaults(function=function)
        return sub

    sub = command("samples", samples, "images from the prior; a long run resumes where it stopped")
    sub.add_argument("--n", type=options.count, help="images (none: 16; of several labels 8 each)")
    sub.add_argument("--label", metavar="NAME[,NAME]", help="labels, to the images in turn; all; "
                     "random: by the training set's frequencies; none (none: without)")  # fmt: skip
    sub.add_argument("--temperature", type=temperatures, default=1.0,
                     help="factor of the prior's standard deviations: a number, or R:t,R:t for "
                     "those at resolution R (others: 1)")  # fmt: skip
    sub = command("reconstruct", reconstruct, "images, and what their latents keep of them")
    sub.add_argument("images", nargs="+", help="image files, or folders; the middle square, "
                     "resized")  # fmt: skip
    add_keep_options(sub, temperature=0.1)
    add_label_options(sub)
    sub = command("interpolate", interpolate, "images between two, along a line of latents")
    sub.add_argument("images", nargs="+", metavar="IMAGE", help="two images; as in reconstruct")
    sub.add_argument("--steps", type=options.several, default=8, help="images, both ends included")
    add_keep_options(sub, temperature=0.1)
    add_label_options(sub)
    sub = command("progressive", progressive, "how images form: more layers row by row")
    sub.add_argument("images", nargs="*", help="image files or folders (none: samples)")
    sub.add_argument("--n", dest="columns", metavar="N", type=options.count, default=8,
                     help="samples, where no images are given")  # fmt: skip
    sub.add_argument("--temperature", type=temperatures, default=1.0, help="of the samples' "
                     "latents: a number, or R:t,R:t")  # fmt: skip
    sub.add_argument("--rest", type=options.nonnegative, default=0.1,
                     help="temperature of the layers that are yet to come")  # fmt: skip
    add_label_options(sub)
    sub = command("encode", encode, "image files to an .npz of their latents")
    sub.add_argument("images", nargs="+", help="image files or folders; as in reconstruct")
    sub.add_argument("--gaussians", action="store_true",
                     help="also the means and log standard deviations of q and p")  # fmt: skip
    add_label_options(sub)
    sub = command("embed", embed, "images as vectors: the posterior means, a row an image")
    sub.add_argument("images", nargs="+", help="image files or folders; as in reconstruct")
    add_layer_options(sub, "take")
    add_label_options(sub, decodes=False)
    sub = command("decode", decode, "the .npz of encode or embed back to images")
    sub.add_argument("latents", type=options.path,
                     help=".npz of encode or embed; layers that it lacks are sampled")  # fmt: skip
    add_keep_options(sub, temperature=0.1)
    add_label_options(sub, encodes=False)
    sub = command("score", score, "what images cost, in bits: a table, a row an image")
    sub.add_argument("images", nargs="+", help="image files or folders; as in reconstruct")
    sub.add_argument("--iw_samples", type=options.count,
                     help="also the importance-weighted bound of so many samples")  # fmt: skip
    add_label_options(sub, decodes=False)
    sub = command("export", export, "the model as one file to share, with all that it needs")
    sub.add_argument("--with_names", action="store_true",
                     help="also the names of its own images' files")  # fmt: skip
    return parser


def open_model(args):
    """The model that the options name.

    Raises:
        UserError: as load_model; and for no weights, or options of a network without a preset.
    """
    if not args.restore_ema_path:
        raise UserError("no weights given: name a PREFIX-model-ema.th with --restore_ema_path")
    given = {name: getattr(args, name) for name, *_ in OPTIONS["network"] if hasattr(args, name)}
    if given and not args.hps:
        raise UserError(f"--{next(iter(given))} changes a preset's network: name it with --hps")
    H = get_hparams(args.hps, **given) if args.hps else None
    args.restore_ema_path = maybe_download(args.restore_ema_path)
    return load_model(args.restore_ema_path, H, args.device)


# ---- commands ------------------------------------------------------------------------------


def how(args):
    """What decides, beside weights and latents, the images of a command."""
    return {"seed": args.seed, "mean": args.mean}


def words_of(temperature):
    if isinstance(temperature, dict):
        return ", ".join(f"t({r}) = {t:g}" for r, t in temperature.items())
    return f"t = {temperature:g}"


def name_of(model, args):
    return model.H.hparam_sets + (", mean of the mixture" if args.mean else "")


def samples(args, model):
    t = temperature_of_layers(model, args.temperature)
    asked, _ = labels_asked(args, model.H)
    args.n = args.n or default_count(model.H, args.label)

    ahead = Ahead(
        next(model.parameters()).device,
        lambda batch, key: (range(args.n)[batch[-1] + 1 :][: args.n_batch], key),
    )

    def make(indices):
        labels, generators = labels_for(asked, indices), ahead(indices, args.seed, SAMPLING)
        return draw_samples(model, indices, t, **how(args), labels=labels, generators=generators)

    def draw(images):
        title = f"{name_of(model, args)}: samples, {words_of(args.temperature)}, seed {args.seed}"
        if rows := rows_of_labels(model.H, args.label, args.n):
            names, slices = zip(*rows, strict=True)
            return labelled_grid([images[row] for row in slices], names, title=title)
        title += in_words(model.H, args.label)
        columns = min(args.n, max(8, math.ceil(math.sqrt(args.n))))
        starts = range(0, args.n, columns)
        return labelled_grid(
            [images[i : i + columns] for i in starts],
            [f"{i}" for i in starts],
            [f"+{i}" for i in range(columns)],
            title,
        )

    write_images(args, model, args.n, make, draw, asked)
    if args.label is None and labels_of(model.H):
        names = ", ".join(known_labels(model.H)[:20])
        print(one_line(f"without labels; --label takes names of {names}, all or random"))


def background_of(args, model):
    """The colour that transparency of pictures is laid on."""
    return args.background or options.setting(model.H, "background")


def originals_of(args, model):
    """The images that the command line names, uint8 (n, S, S, c)."""
    images = read_images(args.images, model.H.image_size, background_of(args, model))
    return of_channels(images, channels_of(model.H))


def kept_of(args, model):
    """(how many layers are kept, the temperature of each layer)."""
    k = layers_to_keep(model, args.layers, args.resolution, "--")
    return k, temperature_of_layers(model, args.temperature)


def kept(model, k, temperature):
    n = len(model.decoder.dec_blocks)
    return f"all {n} layers" if k == n else f"{k} of {n} layers, rest {words_of(temperature)}"


def reconstruct(args, model):
    k, t = kept_of(args, model)
    to, of = labels_asked(args, model.H)
    originals = originals_of(args, model)

    def make(indices):
        images, labels = originals[indices.start : indices.stop], labels_for(to, indices)
        more = {"labels": labels, "from_labels": labels_for(of, indices)}
        return reconstructed(model, images, indices, k, t, **how(args), **more)

    def draw(images):
        rows, labels = [], []
        for first in range(0, len(images), 12):
            rows += [originals[first : first + 12], images[first : first + 12]]
            labels += ["original", "reconstruction"]
        names = [Path(path).stem for path in args.images] if len(images) <= 12 else ()
        return labelled_grid(
            rows,
            labels,
            names,
            f"{name_of(model, args)}: {kept(model, k, args.temperature)}"
            f"{in_words(model.H, args.label)}",
        )

    write_images(args, model, len(originals), make, draw)


def interpolate(args, model):
    k, t = kept_of(args, model)
    to, of = labels_asked(args, model.H)
    originals = originals_of(args, model)
    ends = latents_of_two(model, originals, args.seed, labels_for(of, range(2)))
    weights = torch.linspace(0, 1, args.steps, device=model.H.device)

    def make(indices):
        w = weights[indices.start : indices.stop]
        return images_between(model, ends, w, k, t, **how(args), labels=labels_for(to, indices))

    def draw(images):
        a, b = (Path(path).stem for path in args.images)
        row = np.concatenate([originals[:1], images, originals[1:]])
        columns = [a, *(f"{w:.2f}" for w in weights.tolist()), b]
        title = f"{name_of(model, args)}: {kept(model, k, args.temperature)}"
        title += in_words(model.H, args.label)
        return labelled_grid([row], [""], columns, title)

    write_images(args, model, args.steps, make, draw)


def progressive(args, model):
    bases, ends = resolutions_of(model), steps_of_forming(model)
    labels = [f"to {bases[k - 1]}x{bases[k - 1]}: {k} of {len(bases)} layers" for k in ends]
    t, n = temperature_of_layers(model, args.temperature), len(args.images) or args.columns
    to, of = labels_asked(args, model.H)
    originals = originals_of(args, model) if args.images else None

    @functools.cache
    def encoded():
        """The z of all images, (n, Z, R, R) by block: a row has the first of them."""
        batches = [range(i, min(i + args.n_batch, n)) for i in range(0, n, args.n_batch)]
        stats = [
            latents_of(model, originals[b.start : b.stop], b, args.seed, labels=labels_for(of, b))
            for b in batches
        ]
        return [torch.cat([s["z"] for s in block]) for block in zip(*stats, strict=True)]

    def make(indices):
        """Images of the grid, row by row: in row i the first ends[i] layers are decided."""
        parts = []
        for row in range(indices.start // n, -(-indices.stop // n)):
            k = ends[row]
            columns = range(max(indices.start - row * n, 0), min(indices.stop - row * n, n))
            latents = args.images and [z[columns.start : columns.stop] for z in encoded()[:k]]
            part = forming(model, k, columns, t, args.rest, latents or None, **how(args),
                           labels=labels_for(to, columns))  # fmt: skip
            parts.append(part)
        return np.concatenate(parts)

    def draw(images):
        rows, names = [*images.reshape(len(ends), n, *images.shape[1:])], [*labels]
        if args.images:
            rows.append(originals)
            names.append("original")
        columns = [Path(path).stem for path in args.images] or [str(i) for i in range(n)]
        what = "" if args.images else f"samples, {words_of(args.temperature)}, seed {args.seed}, "
        title = f"{name_of(model, args)}: {what}layers to come at t = {args.rest:g}"
        title += in_words(model.H, args.label)
        return labelled_grid(rows, names, columns, title)

    write_images(args, model, len(ends) * n, make, draw, n_frame=n)


def encode(args, model):
    to, of = labels_asked(args, model.H)
    write_latents(args, model, originals_of(args, model), to, of)


def embed(args, model):
    k = layers_to_keep(model, args.layers, args.resolution, "--")
    write_embeddings(args, model, k, background_of(args, model), encoded_under(args, model.H))


def score(args, model):
    write_scores(args, model, background_of(args, model), encoded_under(args, model.H))


def export(args, model):
    write_model(args, model)


def decode(args, model):
    k, t = kept_of(args, model)
    found = LatentFile(args.latents, args, model)
    k, n = min(k, found.n_layers), found.n
    told = recorded_labels(model.H, found.labels) if args.label is None else None
    asked = told or labels_asked(args, model.H)[0]

    def make(indices):
        latents, labels = found.latents(indices)[:k], labels_for(asked, indices)
        return decode_latents(model, latents, indices, t, **how(args), labels=labels)

    def draw(images):
        starts = range(0, n, 12)
        title = f"{name_of(model, args)}: {kept(model, k, args.temperature)}"
        title += in_words(model.H, args.label)
        return labelled_grid(
            [images[i : i + 12] for i in starts],
            [f"{i}" for i in starts],
            [f"+{i}" for i in range(min(n, 12))],
            title,
        )

    write_images(args, model, n, make, draw)


@torch.inference_mode()
def main():
    args = make_parser().parse_args()
    check_out(args)
    if getattr(args, "images", None):
        args.images = image_paths(args.images)
        if args.command == "interpolate" and len(args.images) != 2:
            raise UserError(f"interpolate goes from one image to another, not {len(args.images)}")
    args.function(args, open_model(args))


if __name__ == "__main__":
    run_command(main)
