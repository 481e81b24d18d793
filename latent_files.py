"""Files of latents, a tensor a layer or a row an image: written, then read to be decoded.

`args` are sample.py's: images, out, force, n_batch, seed, restore_ema_path.
"""

import contextlib
import sys
import zipfile

import numpy as np
import torch
from tqdm import tqdm

from batches import preprocess
from embeddings import shapes_of_layers, unflatten, widths_of
from errors import UserError, one_line, reason_of
from file_kinds import not_regular
from files import replace, sha256
from image_files import read_image, read_readable
from label_choices import labels_for, names_for
from labels import labels_of
from outputs import NpzFile, check_free, check_room, writing
from synthesis import latents_of
from weights import weights_hash

# ---- latents, a tensor a layer -------------------------------------------------------------


def write_latents(args, model, images, to=None, of=None):
    """Writes the z and the rate of images, uint8 (n, S, S, channels), by layer, to an .npz.

    With args.gaussians also the means and log standard deviations of posterior and prior.

    to, of: the labels that the images are decoded and encoded under, as label_choices.asked_labels.
    """
    with writing(args):
        check_free(args)
    arrays = {}
    for first in tqdm(range(0, len(images), args.n_batch), unit=" batches", disable=None):
        batch = images[first : first + args.n_batch]
        indices = range(first, first + len(batch))
        labels = labels_for(of, indices)
        layers = latents_of(model, batch, indices, args.seed, args.gaussians, labels)
        for i, stats in enumerate(layers):
            kl = stats.pop("kl").sum(dim=(1, 2, 3)) / batch[0].size  # (n,)
            for name, value in {**stats, "rate": kl}.items():
                arrays.setdefault(f"{name}{i:03}", []).append(value.cpu().numpy())
    arrays = {name: np.concatenate(parts) for name, parts in arrays.items()}
    facts = {"images": np.array(args.images), "preset": model.H.hparam_sets}
    facts["weights"] = weights_hash(model)
    if labels_of(model.H):
        everything = range(len(images))
        facts["label"] = names_for(model.H, to, everything)
        facts["from_label"] = names_for(model.H, of, everything)

    def write(path):
        with open(path, "wb") as file:
            np.savez(file, **arrays, **facts)

    with writing(args):
        replace(args.out, write)
    n_layers = len(model.decoder.dec_blocks)
    print(one_line(f"{args.out}: {len(images)} images, {n_layers} layers"))


# ---- embeddings, a row an image ------------------------------------------------------------


def write_embeddings(args, model, k, background, of=None):
    """Writes the first k layers' embeddings of the images that args names, a batch at a time.

    What can't be read is skipped, and listed at the end.

    of: the labels that they are encoded under, as label_choices.asked_labels.

    Raises:
        UserError: as NpzFile; where the disk has no room; at the end, where something was skipped.
    """
    n, width, names = len(args.images), widths_of(model)[k - 1], args.images
    size, row = model.H.image_size, 4 * width  # float32
    print(one_line(f"{args.out}: {n:,} images of {width:,} numbers, {n * row / 2**20:,.1f} MiB"))
    with writing(args, NpzFile.remedy):
        sink = NpzFile(args, weights_hash(model), (width,), dtype=np.float32, name="embeddings")
        try:
            check_room(args, (2 * n - min(sink.done, n)) * row)
        except UserError:
            if not sink.done:  # nothing is lost, and other layers may be asked for
                sink.remove()
            raise
        reasons = {}
        with tqdm(total=n, initial=min(sink.done, n), unit=" images", disable=None) as bar:
            for first in range(sink.done, n, args.n_batch):
                paths = names[first : first + args.n_batch]
                images, numbers, _, unread = read_readable(paths, size, background)
                rows = np.full((len(paths), width), np.nan, np.float32)  # a NaN: to be skipped
                if numbers:
                    x, _ = preprocess(images, model.H)
                    labels = labels_for(of, [first + i for i in numbers])
                    e = model.embed(x, layers=k, labels=labels).cpu().numpy()  # (m, D)
                    e[~np.isfinite(e).all(axis=1)] = np.nan
                    rows[numbers] = e
                reasons |= {first + i: reason for i, reason in unread.items()}
                sink.write(rows)
                bar.update(len(paths))
        bad = np.isnan(sink.rows(n)[:, 0])
        kept, skipped = np.flatnonzero(~bad), np.flatnonzero(bad).tolist()
        if not len(kept):
            sink.remove()
        else:
            facts = {
                "images": np.array(names)[kept],
                "layers": np.array(shapes_of_layers(model)[:k]),
                "labels": names_for(model.H, of, kept.tolist()),
                "preset": model.H.hparam_sets,
                "weights": weights_hash(model),
            }
            sink.finish(n, kept, **facts)
    for i in skipped:
        reason = reasons.get(i) or _reason(names[i], size, background)
        print(one_line(f"skipped: {reason}"), file=sys.stderr)
    if not len(kept):
        raise UserError(f"none of the {n} images can be embedded: {args.out} is not written")
    print(one_line(f"{args.out}: {len(kept)} images, {k} layers, {width:,} numbers each"))
    if skipped:
        raise UserError(
            f"{len(skipped)} of {n} images have no row in {args.out} (listed above): repair them, "
            f"or leave them out"
        )


def _reason(path, size, background):
    """Why an image has no row, where an earlier run has skipped it."""
    try:
        read_image(path, size, background)
    except UserError as error:
        return str(error)
    return f"{path} gave no finite numbers, or could not be read before"


# ---- read to be decoded --------------------------------------------------------------------


class _Rows:
    """The rows of an array in an .npz, read in their order in the memory of those asked for.

    Raises:
        ValueError, and what a damaged file raises besides.
    """

    def __init__(self, path, name):
        self.name = name
        self.file = zipfile.ZipFile(path).open(f"{name}.npy")
        version = np.lib.format.read_magic(self.file)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        self.shape, self.fortran, self.dtype = read[version](self.file)
        if self.dtype.hasobject or self.dtype.kind != "f" or len(self.shape) != 2:
            raise ValueError(f"{name} is {self.dtype} {self.shape}, not floats (n, D)")
        self.row = 0
        if self.fortran:  # column by column: there are no rows to read
            with np.load(path, allow_pickle=False) as arrays:
                self.array = arrays[name]

    def read(self, start, stop):
        """Rows start to stop - 1, (stop - start, D)."""
        if self.fortran:
            return self.array[start:stop]
        size = self.shape[1] * self.dtype.itemsize
        self.file.seek((start - self.row) * size, 1)
        data = self.file.read((stop - start) * size)
        self.row = stop
        if len(data) != (stop - start) * size:
            raise ValueError(f"{self.name} ends before its row {stop}")
        return np.frombuffer(data, self.dtype).reshape(-1, self.shape[1])


class LatentFile:
    """A file of latents, encode's or embed's, of which images are decoded.

    Other weights than those that it was made with may decode it too: a line says so.

    Attributes:
        n: images. n_layers: the first layers, those of which it has, or lacks, each latent.
        labels: the names of the images' labels, "" for none; None where the file tells none.

    Raises:
        UserError: for a file that can't be read or fits another model.
    """

    def __init__(self, path, args, model):
        self.path, self.model = path, model
        if special := not_regular(path):
            raise UserError(f"{path} is {special}: name an .npz that sample.py encode has made")
        with self._reading(), np.load(path, allow_pickle=False) as arrays:
            made_with = str(arrays["weights"]) if "weights" in arrays else None
            names = next((key for key in ("label", "labels") if key in arrays.files), None)
            self.labels = names and [str(name) for name in np.atleast_1d(arrays[names])]
            if "embeddings" in arrays.files:
                self._open_embeddings(arrays)
            else:
                self._open_tensors(arrays)
            if self.labels is not None and len(self.labels) != self.n:
                raise ValueError(f"it has {len(self.labels)} labels for {self.n} images")
        # The file's own sha256 is what stood there before.
        if made_with not in (None, weights_hash(model)) and made_with != sha256(
            args.restore_ema_path
        ):
            print(one_line(f"WARNING: {path} was encoded with other weights"), file=sys.stderr)

    @contextlib.contextmanager
    def _reading(self):
        """In the body, whatever a damaged file raises is a UserError that names it."""
        try:
            yield
        except FileNotFoundError:
            raise UserError(f"{self.path} does not exist: make it with sample.py encode") from None
        except Exception as error:
            raise UserError(
                f"{self.path} holds no latents of this model ({reason_of(error)}): encode anew"
            ) from None

    def _open_embeddings(self, arrays):
        rows = _Rows(self.path, "embeddings")
        widths = widths_of(self.model)
        if rows.shape[1] not in widths:
            raise ValueError(
                f"{rows.shape[1]} numbers an image, where the first 1, 2, ... layers make "
                f"{', '.join(map(str, widths))}"
            )
        self.n, self.n_layers = rows.shape[0], widths.index(rows.shape[1]) + 1
        shapes = shapes_of_layers(self.model)[: self.n_layers]
        if "layers" in arrays.files and arrays["layers"].tolist() != [list(s) for s in shapes]:
            raise ValueError("its layers are of other shapes")
        if not self.n:
            raise ValueError("it has no row")
        self._rows = rows

    def _open_tensors(self, arrays):
        self._rows, self._latents, n = None, [], None
        for i, (zdim, base, _) in enumerate(shapes_of_layers(self.model)):
            z = arrays[f"z{i:03}"] if f"z{i:03}" in arrays else None
            if z is not None:
                n = n or len(z)
                if z.shape != (n, zdim, base, base):
                    raise ValueError(
                        f"z{i:03} is {z.shape}, layer {i} of the model {(n, zdim, base, base)}"
                    )
                if not np.isfinite(z).all():
                    raise ValueError(f"z{i:03} has numbers that are not finite")
                z = torch.from_numpy(z).float().to(self.model.H.device)
            self._latents.append(z)
        if not n:
            raise ValueError("it has no z000")
        self.n, self.n_layers = n, len(self._latents)

    def latents(self, indices):
        """z (n, Z, R, R) by layer of these images, a range; None where the file has none."""
        if self._rows is None:
            return [z if z is None else z[indices.start : indices.stop] for z in self._latents]
        with self._reading():
            rows = self._rows.read(indices.start, indices.stop)
            if not np.isfinite(rows).all():
                raise ValueError("embeddings has numbers that are not finite")
        return unflatten(self.model, rows.astype(np.float32))
