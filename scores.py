"""What each picture costs under a model, in nats or bits: as arrays, or as rows of a table.

The noise of a picture is that of an evaluation, a function of the seed and of its position: over a
test set in its order the mean is the figure of --test_eval.
"""

import csv

import torch
from tqdm import tqdm

from batches import preprocess
from bounds import distortion_and_rates, importance_weighted_elbo, nats_to_bits
from embeddings import resolutions_of
from errors import UserError, one_line
from files import replace
from image_files import read_readable
from label_choices import labels_for, names_for
from labels import given
from noise import EVALUATION, bound_key, image_generators, noise_of_images
from outputs import check_free, writing


@torch.no_grad()
def scores_of(model, images, indices, seed=0, iw_samples=None, labels=None):
    """The figures of images, uint8 (n, S, S, channels), whose positions are `indices`.

    Returns:
        {bits_per_dim, distortion, rate: (n,) each; rates: (layers, n); with iw_samples also
        iw_bits_per_dim: (n,)}, float64 on the CPU; nats per dimension but for the bits.
    """
    x, target = preprocess(images, model.H)
    with noise_of_images(image_generators(indices, seed, EVALUATION)):
        distortion, rates = distortion_and_rates(model, x, target, **given(labels))
    distortion, rates = distortion.double().cpu(), rates.double().cpu()  # (n,), (layers, n)
    rate = rates.sum(dim=0)  # (n,)
    figures = {"bits_per_dim": nats_to_bits(distortion + rate), "distortion": distortion}
    figures |= {"rate": rate, "rates": rates}
    if iw_samples:
        bound = importance_weighted_elbo(
            model,
            x,
            target,
            iw_samples,
            lambda k: image_generators(indices, *bound_key(seed, k)),
            **given(labels),
        )
        figures["iw_bits_per_dim"] = nats_to_bits(bound.cpu())
    return figures


def rates_by_resolution(model, rates):
    """{resolution: the sum of its layers' rates (n,)} of rates (layers, n)."""
    bases = torch.tensor(resolutions_of(model))
    return {r: rates[bases == r].sum(dim=0) for r in sorted({*bases.tolist()})}


# ---- the table -----------------------------------------------------------------------------


def columns_of(model, iw_samples=None, labelled=False):
    """The names of the table's columns."""
    names = ["name", "bits_per_dim", "distortion", "rate"]
    names += [f"rate_{r}" for r in sorted({*resolutions_of(model)})]
    names += ["iw_bits_per_dim"] * bool(iw_samples) + ["label"] * labelled
    return [*names, "width", "height", "resized", "error"]


def write_scores(args, model, background, of=None):
    """Writes a row a picture that args names to a .csv, in their order, a batch at a time.

    of: the labels of the pictures, as label_choices.asked_labels.

    Raises:
        UserError: if args.out exists or can't be written; at the end, if a picture can't be read,
            whose row has the reason in the column `error`.
    """
    names, size, failed = args.images, model.H.image_size, []

    def write(path):
        # Names of files need be no UTF-8.
        with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            columns = columns_of(model, args.iw_samples, of is not None)
            table = csv.DictWriter(file, columns, restval="", lineterminator="\n")
            table.writeheader()
            with tqdm(total=len(names), unit=" images", disable=None) as bar:
                for first in range(0, len(names), args.n_batch):
                    paths = names[first : first + args.n_batch]
                    rows = rows_of(args, model, paths, first, background, of)
                    failed.extend(row["error"] for row in rows if "error" in row)
                    table.writerows(rows)
                    file.flush()
                    bar.update(len(paths))

    with writing(args):
        check_free(args)
        replace(args.out, write)
    print(one_line(f"{args.out}: {len(names)} images of {size} pixels"))
    if failed:
        raise UserError(
            f"{len(failed)} of {len(names)} images have no figures in {args.out}, see its column "
            f"error (first: {failed[0]})"
        )


def rows_of(args, model, paths, first, background, of=None):
    """The table's rows of pictures, the first of which has the position `first`."""
    size = model.H.image_size
    images, numbers, sizes, reasons = read_readable(paths, size, background)
    rows = [{"name": path} for path in paths]
    for i, reason in reasons.items():
        rows[i]["error"] = reason
    if not numbers:
        return rows
    positions = [first + i for i in numbers]
    labels = labels_for(of, positions)
    figures = scores_of(model, images, positions, args.seed, args.iw_samples, labels)
    of_images = names_for(model.H, of, positions)
    rates = rates_by_resolution(model, figures.pop("rates"))
    figures |= {f"rate_{r}": rate for r, rate in rates.items()}
    for j, (i, (width, height)) in enumerate(zip(numbers, sizes, strict=True)):
        rows[i] |= {name: values[j].item() for name, values in figures.items()}
        resized = int((width, height) != (size, size))
        rows[i] |= {"width": width, "height": height, "resized": resized}
        rows[i] |= {} if of is None else {"label": of_images[j]}
    return rows
