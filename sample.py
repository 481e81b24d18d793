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
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import options
from ahead import Ahead
from batches import preprocess
from endings import run_command
from errors import UserError, one_line, reason_of
from file_kinds import not_regular
from files import replace, sha256
from hps import HPARAMS_REGISTRY
from image_files import image_paths, read_images
from noise import DECODING, ENCODING, SAMPLING, image_generators
from options import OPTIONS, OneLineParser, complete
from outputs import check_free, check_out, write_images, writing
from pictures import labelled_grid
from presets import get_hparams
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
        "names: folder of PNGs (none: COMMAND.png; encode: latents.npz)",
        type=options.path)  # fmt: skip
    add(group, "force", False, "replace what is there", action="store_true")
    group = parser.add_argument_group("network", "with --hps, for weights that are no preset's")
    for name, kind, _, meaning in OPTIONS["network"]:
        if kind is not bool:
            group.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS, help=meaning)


def add_keep_options(parser, temperature):
    keep = parser.add_mutually_exclusive_group()
    keep.add_argument(
        "--layers", type=options.count, help="keep the first LAYERS latents (none: all)"
    )
    keep.add_argument(
        "--resolution", type=options.count, help="keep the latents up to this resolution"
    )
    parser.add_argument("--temperature", type=temperatures, default=temperature,
                        help="of the latents that are not kept: a number, or R:t,R:t")  # fmt: skip


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
    sub.add_argument("--n", type=options.count, default=16, help="images")
    sub.add_argument("--temperature", type=temperatures, default=1.0,
                     help="factor of the prior's standard deviations: a number, or R:t,R:t for "
                     "those at resolution R (others: 1)")  # fmt: skip
    sub = command("reconstruct", reconstruct, "images, and what their latents keep of them")
    sub.add_argument("images", nargs="+", help="image files, or folders; the middle square, "
                     "resized")  # fmt: skip
    add_keep_options(sub, temperature=0.1)
    sub = command("interpolate", interpolate, "images between two, along a line of latents")
    sub.add_argument("images", nargs="+", metavar="IMAGE", help="two images; as in reconstruct")
    sub.add_argument("--steps", type=options.several, default=8, help="images, both ends included")
    add_keep_options(sub, temperature=0.1)
    sub = command("progressive", progressive, "how images form: more layers row by row")
    sub.add_argument("images", nargs="*", help="image files or folders (none: samples)")
    sub.add_argument("--n", dest="columns", metavar="N", type=options.count, default=8,
                     help="samples, where no images are given")  # fmt: skip
    sub.add_argument("--temperature", type=temperatures, default=1.0, help="of the samples' "
                     "latents: a number, or R:t,R:t")  # fmt: skip
    sub.add_argument("--rest", type=options.nonnegative, default=0.1,
                     help="temperature of the layers that are yet to come")  # fmt: skip
    sub = command("encode", encode, "image files to an .npz of their latents")
    sub.add_argument("images", nargs="+", help="image files or folders; as in reconstruct")
    sub.add_argument("--gaussians", action="store_true",
                     help="also the means and log standard deviations of q and p")  # fmt: skip
    sub = command("decode", decode, "the .npz of encode back to images")
    sub.add_argument("latents", help=".npz of encode; layers that it lacks are sampled")
    add_keep_options(sub, temperature=0.1)
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


def per_block(model, t):
    """One temperature per block from a number or {resolution: number}.

    Raises:
        UserError: for a resolution without latents.
    """
    blocks, found = model.decoder.dec_blocks, model.decoder.resolutions
    if not isinstance(t, dict):
        return [t] * len(blocks)
    for resolution in t:
        if resolution not in found:
            raise UserError(
                f"--temperature names resolution {resolution}: this model has latents at "
                f"{', '.join(map(str, found))}"
            )
    return [t.get(block.base, 1.0) for block in blocks]


def layers_to_keep(model, args):
    """How many latents --layers or --resolution keeps.

    Raises:
        UserError: for more layers than there are, or a resolution without latents.
    """
    bases = [block.base for block in model.decoder.dec_blocks]
    if args.layers and args.layers > len(bases):
        raise UserError(f"--layers {args.layers}: this model has {len(bases)} layers")
    if args.resolution and args.resolution not in bases:
        found = ", ".join(map(str, model.decoder.resolutions))
        raise UserError(f"--resolution {args.resolution}: this model has latents at {found}")
    if args.resolution:
        return max(i + 1 for i, base in enumerate(bases) if base <= args.resolution)
    return args.layers or len(bases)


# ---- commands ------------------------------------------------------------------------------


def noise(args, purpose, indices):
    return image_generators(indices, args.seed, purpose)


def words_of(temperature):
    if isinstance(temperature, dict):
        return ", ".join(f"t({r}) = {t:g}" for r, t in temperature.items())
    return f"t = {temperature:g}"


def name_of(model, args):
    return model.H.hparam_sets + (", mean of the mixture" if args.mean else "")


def samples(args, model):
    t = per_block(model, args.temperature)

    generators = Ahead(
        next(model.parameters()).device,
        (args.seed, SAMPLING),
        lambda batch: range(batch[-1] + 1, min(batch[-1] + 1 + args.n_batch, args.n)),
    )

    def make(indices):
        return model.forward_uncond_samples(len(indices), t, generators(indices), args.mean)

    def draw(images):
        columns = min(args.n, max(8, math.ceil(math.sqrt(args.n))))
        starts = range(0, args.n, columns)
        title = f"{name_of(model, args)}: samples, {words_of(args.temperature)}, seed {args.seed}"
        return labelled_grid(
            [images[i : i + columns] for i in starts],
            [f"{i}" for i in starts],
            [f"+{i}" for i in range(columns)],
            title,
        )

    write_images(args, model, args.n, make, draw)


def originals_of(args, model):
    """The images that the command line names, uint8 (n, S, S, 3)."""
    background = args.background or options.setting(model.H, "background")
    return read_images(args.images, model.H.image_size, background)


def latents_of(args, model, images, indices, get_gaussians=False):
    """Per block {z, kl, ...} of uint8 images (n, S, S, 3), whose noise is that of `indices`."""
    x, _ = preprocess(images, model.H)
    return model.forward_get_latents(x, noise(args, ENCODING, indices), get_gaussians)


def decoded(args, model, latents, t, indices, purpose=DECODING):
    """uint8 images of latents, one (n, Z, R, R) a block; `indices` own the rest's noise."""
    generators = noise(args, purpose, indices)
    return model.forward_samples_set_latents(len(indices), latents, t, generators, args.mean)


def kept(model, k, temperature):
    n = len(model.decoder.dec_blocks)
    return f"all {n} layers" if k == n else f"{k} of {n} layers, rest {words_of(temperature)}"


def reconstruct(args, model):
    k, t = layers_to_keep(model, args), per_block(model, args.temperature)
    originals = originals_of(args, model)

    def make(indices):
        stats = latents_of(args, model, originals[indices.start : indices.stop], indices)
        return decoded(args, model, [s["z"] for s in stats[:k]], t, indices)

    def draw(images):
        rows, labels = [], []
        for first in range(0, len(images), 12):
            rows += [originals[first : first + 12], images[first : first + 12]]
            labels += ["original", "reconstruction"]
        names = [Path(path).stem for path in args.images] if len(images) <= 12 else ()
        return labelled_grid(
            rows, labels, names, f"{name_of(model, args)}: {kept(model, k, args.temperature)}"
        )

    write_images(args, model, len(originals), make, draw)


def interpolate(args, model):
    k, t = layers_to_keep(model, args), per_block(model, args.temperature)
    originals = originals_of(args, model)
    # Both ends and all steps share the noise of image 0: only the latents' content changes.
    stats = latents_of(args, model, originals, (0, 0))
    weights = torch.linspace(0, 1, args.steps, device=model.H.device)

    def make(indices):
        w = weights[indices.start : indices.stop].view(-1, 1, 1, 1)
        latents = [torch.lerp(s["z"][:1], s["z"][1:], w) for s in stats[:k]]  # (n, Z, R, R)
        return decoded(args, model, latents, t, [0] * len(indices))

    def draw(images):
        a, b = (Path(path).stem for path in args.images)
        row = np.concatenate([originals[:1], images, originals[1:]])
        columns = [a, *(f"{w:.2f}" for w in weights.tolist()), b]
        title = f"{name_of(model, args)}: {kept(model, k, args.temperature)}"
        return labelled_grid([row], [""], columns, title)

    write_images(args, model, args.steps, make, draw)


def progressive(args, model):
    bases = [block.base for block in model.decoder.dec_blocks]
    ends = [i + 1 for i, base in enumerate(bases) if bases[i + 1 : i + 2] != [base]]
    labels = [f"to {bases[k - 1]}x{bases[k - 1]}: {k} of {len(bases)} layers" for k in ends]
    t, n = per_block(model, args.temperature), len(args.images) or args.columns
    originals = originals_of(args, model) if args.images else None

    @functools.cache
    def encoded():
        """The z of all images, (n, Z, R, R) by block: a row has the first of them."""
        batches = [range(i, min(i + args.n_batch, n)) for i in range(0, n, args.n_batch)]
        stats = [latents_of(args, model, originals[b.start : b.stop], b) for b in batches]
        return [torch.cat([s["z"] for s in block]) for block in zip(*stats, strict=True)]

    def make(indices):
        """Images of the grid, row by row: in row i the first ends[i] layers are decided."""
        parts = []
        for row in range(indices.start // n, -(-indices.stop // n)):
            k = ends[row]
            columns = range(max(indices.start - row * n, 0), min(indices.stop - row * n, n))
            if args.images:
                latents = [z[columns.start : columns.stop] for z in encoded()[:k]]
                parts.append(decoded(args, model, latents, args.rest, columns))
            else:  # the same generators: the first k layers are those of the other rows
                ts = t[:k] + [args.rest] * (len(t) - k)
                parts.append(decoded(args, model, (), ts, columns, SAMPLING))
        return np.concatenate(parts)

    def draw(images):
        rows, names = [*images.reshape(len(ends), n, *images.shape[1:])], [*labels]
        if args.images:
            rows.append(originals)
            names.append("original")
        columns = [Path(path).stem for path in args.images] or [str(i) for i in range(n)]
        what = "" if args.images else f"samples, {words_of(args.temperature)}, seed {args.seed}, "
        title = f"{name_of(model, args)}: {what}layers to come at t = {args.rest:g}"
        return labelled_grid(rows, names, columns, title)

    write_images(args, model, len(ends) * n, make, draw)


def encode(args, model):
    with writing(args):
        check_free(args)
    originals = originals_of(args, model)
    arrays = {}
    for first in tqdm(range(0, len(originals), args.n_batch), unit=" batches", disable=None):
        images = originals[first : first + args.n_batch]
        indices = range(first, first + len(images))
        for i, stats in enumerate(latents_of(args, model, images, indices, args.gaussians)):
            kl = stats.pop("kl").sum(dim=(1, 2, 3)) / images[0].size  # (n,)
            for name, value in {**stats, "rate": kl}.items():
                arrays.setdefault(f"{name}{i:03}", []).append(value.cpu().numpy())
    arrays = {name: np.concatenate(parts) for name, parts in arrays.items()}
    with_names = arrays | {"images": np.array(args.images), "preset": model.H.hparam_sets}
    with_names["weights"] = sha256(args.restore_ema_path)

    def write(path):
        with open(path, "wb") as file:
            np.savez(file, **with_names)

    with writing(args):
        replace(args.out, write)
    n_layers = len(model.decoder.dec_blocks)
    print(one_line(f"{args.out}: {len(originals)} images, {n_layers} layers"))


def read_latents(path, model, weights):
    """The z of encode's .npz, (n, Z, R, R) by block; a block it lacks is None.

    Other weights than those of this sha256 may decode them too: a line says so.

    Raises:
        UserError: for a file that can't be read or fits another model.
    """
    latents, n = [], None
    if special := not_regular(path):
        raise UserError(f"{path} is {special}: name an .npz that sample.py encode has made")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if str(arrays.get("weights", weights)) != weights:
                print(one_line(f"WARNING: {path} was encoded with other weights"), file=sys.stderr)
            for i, block in enumerate(model.decoder.dec_blocks):
                z = arrays[f"z{i:03}"] if f"z{i:03}" in arrays else None
                if z is not None:
                    n = n or len(z)
                    if z.shape != (n, block.zdim, block.base, block.base):
                        raise ValueError(f"z{i:03} is {z.shape}, layer {i} of the model "
                                         f"{(n, block.zdim, block.base, block.base)}")  # fmt: skip
                    z = torch.from_numpy(z).float().to(model.H.device)
                    if not z.isfinite().all():
                        raise ValueError(f"z{i:03} has numbers that are not finite")
                latents.append(z)
        if not n:
            raise ValueError("it has no z000")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: make it with sample.py encode") from None
    except Exception as error:  # a damaged file raises nearly anything
        raise UserError(
            f"{path} holds no latents of this model ({reason_of(error)}): encode anew"
        ) from None
    return latents, n


def decode(args, model):
    k, t = layers_to_keep(model, args), per_block(model, args.temperature)
    latents, n = read_latents(args.latents, model, sha256(args.restore_ema_path))

    def make(indices):
        part = [z if z is None else z[indices.start : indices.stop] for z in latents[:k]]
        return decoded(args, model, part, t, indices)

    def draw(images):
        starts = range(0, n, 12)
        title = f"{name_of(model, args)}: {kept(model, k, args.temperature)}"
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
    args.out = args.out or ("latents.npz" if args.command == "encode" else f"{args.command}.png")
    check_out(args)
    if getattr(args, "images", None):
        args.images = image_paths(args.images)
        if args.command == "interpolate" and len(args.images) != 2:
            raise UserError(f"interpolate goes from one image to another, not {len(args.images)}")
    args.function(args, open_model(args))


if __name__ == "__main__":
    run_command(main)
