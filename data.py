"""Data sets: files → uint8 images, and uint8 images → the network's input and target.

A data set yields tuples of one uint8 tensor (S, S, 3); a batch of them is [uint8 (N, S, S, 3)].
"""

import atexit
import codecs
import contextlib
import fcntl
import hashlib
import io
import json
import math
import os
import pickle
import shutil
import signal
import weakref
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from hps import IMAGE_SETS, UserError, set_image_size
from utils import mpi_rank, resolve_device, world


def mkdir_p(path):
    """Makes a folder and its parents where they do not exist."""
    os.makedirs(path, exist_ok=True)


# ---- arrays, data sets, batches ------------------------------------------------------------


class NpyImages:
    """A .npy file of uint8 images (n, S, S, 3) on the disk: an index reads the images it names.

    It reads where a memory map would fault: one request an image instead of one a page, without
    the 128 KiB that a fault reads around it, and what was read stays out of this process's memory
    (the system may keep it). A pickled one, as loader workers may get it, holds the path alone.
    """

    def __init__(self, path):
        self.path = path
        array = np.lib.format.open_memmap(path, mode="r")  # which checks the header and the size
        self.shape, self.offset = array.shape, array.offset
        self.kind = f"{array.dtype} {array.shape}{'' if array.flags.c_contiguous else ' (Fortran)'}"
        self.file = open(path, "rb", buffering=0)
        if extra := os.path.getsize(path) - self.offset - array.nbytes:
            raise ValueError(f"{extra:,} bytes follow the array")

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, numbers):
        images = np.empty((len(numbers), *self.shape[1:]), np.uint8)  # (N, S, S, 3)
        for image, number in zip(images, numbers, strict=True):
            start = self.offset + int(number) * image.nbytes
            if os.preadv(self.file.fileno(), [image], start) != image.nbytes:
                raise UserError(f"{self.path} ends before its image {number}: it was cut off")
        return images

    def __reduce__(self):
        return NpyImages, (self.path,)


class Images(Dataset):
    """Some of an array of images, uint8 (n, S, S, 3), in memory or in files.

    Item i is a tuple of one uint8 tensor (S, S, 3), a copy.
    """

    def __init__(self, array, indices=None):
        self.array = array
        self.indices = np.arange(len(array)) if indices is None else indices

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, i):
        return self.__getitems__([i])[0]

    def __getitems__(self, numbers):
        """The items of these numbers, with one index into the array."""
        images = torch.from_numpy(self.array[self.indices[numbers]])  # (N, S, S, 3)
        return [(image,) for image in images]


def split_last(n, n_valid, seed):
    """Shuffles 0..n-1 with RandomState(seed): (all but the last n_valid, the last n_valid).

    The published splits of ImageNet (seed 42, 5,000) and FFHQ-256 (seed 5, 7,000).
    """
    order = np.random.RandomState(seed).permutation(n)
    return order[:-n_valid], order[-n_valid:]


class EpochBatches(Sampler):
    """The batches of image numbers that one process takes in an epoch, for DataLoader.

    The order of an epoch is torch's DistributedSampler's: a function of (seed, epoch) alone, the
    same for any number of loader workers. Image k of it, counted over all processes, is in a step
    that takes n_batch * size images; the images that fill no whole step are left out. (With an
    uneven number of images per process, the first ones of the order fill up, as in
    DistributedSampler.)

    Args:
        n_images: images of the data set.
        n_batch: images of a batch, per process.
        rank, size: which of how many processes this is.
        seed: of the run.
    """

    def __init__(self, n_images, n_batch, rank, size, seed):
        self.n_images, self.n_batch = n_images, n_batch
        self.rank, self.size, self.seed = rank, size, seed
        self.set_epoch(0)

    def set_epoch(self, epoch, start_image=0):
        """Chooses the epoch, to begin after the first start_image images of its order.

        start_image counts the images that all processes together have taken in this epoch.
        """
        self.epoch, self.start_image = epoch, start_image

    def __len__(self):
        """Batches from start_image to the end of the epoch."""
        return math.ceil((self.n_images - self.start_image) / self.size) // self.n_batch

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.n_images, generator=generator).numpy()
        # np.resize repeats the order from its start.
        order = np.resize(order, self.start_image + len(self) * self.n_batch * self.size)
        mine = order[self.start_image + self.rank :: self.size]  # (len(self) * n_batch,)
        for batch in mine.reshape(-1, self.n_batch):
            yield batch.tolist()


# Iterators over batches whose workers are alive.
_iterators = weakref.WeakSet()


@atexit.register
def _end_workers():
    """Before multiprocessing does: it asks by SIGTERM, to which they are deaf, and waits."""
    for iterator in list(_iterators):
        iterator._shutdown_workers()


class _Loader(DataLoader):
    """A DataLoader whose workers' UserErrors stay the one line they are."""

    def __iter__(self):
        iterator = super().__iter__()
        if self.num_workers:
            _iterators.add(iterator)
        try:
            yield from iterator
        except UserError as error:
            # A worker's error arrives with the traceback put before it.
            raise UserError(str(error).rpartition("UserError: ")[2].strip()) from None


def _cores():
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _leave_signals_to_the_parent(_):
    """In a loader worker: a signal to the whole process group is a request to the run, not to it.

    The worker ends when the run does.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def make_loader(H, images, **batching):
    """A DataLoader of batches [uint8 (N, S, S, 3)], in H.num_workers processes, pinned for CUDA.

    By default, arrays are read in the training process on the CPU, where that costs less than
    handing batches over; by one worker beside a GPU; PNG files are decoded in up to four.

    Args:
        batching: batch_sampler, or batch_size for the images in their order.
    """
    cuda = resolve_device(H.device) != "cpu"
    workers = H.num_workers
    if workers is None:
        cores = max(1, _cores() // world().local_size)
        workers = min(4, cores) if H.dataset == "ffhq_1024" else int(cuda)
    # A generator of its own: by default it would draw from the one that makes the noise.
    return _Loader(
        images,
        num_workers=workers,
        pin_memory=cuda,
        worker_init_fn=_leave_signals_to_the_parent,
        generator=torch.Generator(),
        **batching,
    )


# ---- files of images -----------------------------------------------------------------------

# PIL modes that become RGB as one expects: grey is repeated in the three channels, palette entries
# are looked up, alpha is dropped. Others, such as 16-bit grey, would silently be clipped.
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def decode(data):
    """The image that a file holds, a PIL image of mode RGB, turned upright as its EXIF data say.

    Raises:
        ValueError: with the reason, for bytes that don't decode, or a mode that does not fit RGB.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP"))
        if image.mode in MODES:
            return ImageOps.exif_transpose(image).convert("RGB")
    except UnidentifiedImageError:  # whose message names an object in memory
        raise ValueError("cannot be decoded (no PNG, JPEG or WebP)") from None
    except Exception as error:  # damaged bytes make PIL's decoders raise nearly anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"cannot be decoded ({reason})") from None
    raise ValueError(f"has mode {image.mode}, which is not 8-bit RGB, grey or palette")


def list_images(folder):
    """(names, left_out) of the files below a folder, sorted paths relative to it.

    names end in one of SUFFIXES; left_out are other files and links to folders. Names that begin
    with a dot, such as the `._*.png` of some systems, are passed over.
    """
    names, left_out = [], []
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        links = [name for name in folders if os.path.islink(os.path.join(root, name))]
        for name in files + links:
            if not name.startswith("."):
                path = Path(root, name).relative_to(folder).as_posix()
                (names if path.lower().endswith(SUFFIXES) else left_out).append(path)
    return sorted(names), left_out


def write_npy(path, chunks):
    """Writes uint8 arrays (k, H, W, 3), one after another, as one .npy file; returns its shape.

    The file appears when it is whole: until then the data is in path + ".part", deleted on an
    error and overwritten by the next call.

    Raises:
        UserError: if it can't be written.
    """
    part, shape = Path(f"{path}.part"), (0,)
    try:
        # Written in sequence, not through a memory map, whose pages would count as our memory.
        with open(part, "wb", buffering=1 << 20) as file:
            for chunk in chunks:
                shape = (shape[0] + len(chunk), *chunk.shape[1:])
                if file.tell() == 0:
                    _write_header(file, shape)
                file.write(np.ascontiguousarray(chunk))
            file.seek(0)
            _write_header(file, shape)  # numpy leaves room for the count to grow
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave the final name on missing data
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; check folder and space") from None
    finally:
        part.unlink(missing_ok=True)
    return shape


def _write_header(file, shape):
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


# ---- loaders: H → (train, valid, test) ------------------------------------------------------


class _BatchUnpickler(pickle.Unpickler):
    """Unpickles what a CIFAR-10 batch holds, dicts and arrays, and calls nothing else."""

    def find_class(self, module, name):
        numpy_core = ("numpy.core.multiarray", "numpy._core.multiarray")
        if module in numpy_core and name == "_reconstruct":
            return np._core.multiarray._reconstruct
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            # The files say align=0, copy=1, which today's NumPy takes as booleans only.
            return lambda kind, align=0, copy=0: np.dtype(kind, bool(align), bool(copy))
        if (module, name) == ("_codecs", "encode"):  # bytes, as Python 3 writes them in protocol 2
            return codecs.encode
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_cifar10_batch(path):
    """The images of a CIFAR-10 batch file (python pickle): uint8 (10000, 32, 32, 3).

    Raises:
        UserError: for a file that is missing, damaged or none of CIFAR-10's.
    """
    remedy = "run ./setup_cifar10.sh in the folder that --data_root names"
    try:
        with open(path, "rb") as file:
            batch = _BatchUnpickler(file, encoding="bytes").load()
        planes = batch[b"data"]
        if planes.dtype != np.uint8 or planes.shape != (10000, 3 * 32 * 32):
            raise ValueError(f"its data is {planes.dtype} {planes.shape}, not uint8 (10000, 3072)")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: {remedy}") from None
    except Exception as error:  # a damaged pickle raises nearly anything
        reason = str(error) or type(error).__name__
        raise UserError(f"{path} is no CIFAR-10 batch ({reason}): {remedy}") from None
    return planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)  # (n, 32, 32, 3)


def load_cifar10(H):
    """45,000 train, 5,000 valid and 10,000 test images."""
    from sklearn.model_selection import train_test_split  # slow to import

    folder = Path(H.data_root, "cifar-10-batches-py")
    train = np.concatenate([read_cifar10_batch(folder / f"data_batch_{i}") for i in range(1, 6)])
    indices = train_test_split(np.arange(50000), test_size=5000, random_state=11172018)
    test = read_cifar10_batch(folder / "test_batch")
    return Images(train, indices[0]), Images(train, indices[1]), Images(test)


def open_npy(path, shape, remedy):
    """Opens a .npy file of uint8 images of the given shape (n, S, S, 3).

    Raises:
        UserError: for a file that is missing, damaged, or of another type or shape.
    """
    expected = f"uint8 {shape}"
    try:
        array = NpyImages(path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: {remedy}") from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is no complete .npy file of {expected} ({error}; it has "
            f"{os.path.getsize(path):,} bytes, expected are {math.prod(shape) + 128:,}): {remedy}"
        ) from None
    if array.kind != expected:
        raise UserError(f"{path} holds {array.kind}, not {expected}: {remedy}")
    return array


def load_imagenet(H):
    """All training images but 5,000, those 5,000 to validate, and the valid file as the test set.

    The ImageNet of van den Oord et al. 2016 has 1,281,149 and 49,999 images, the box-filtered one
    of Chrabaszcz et al. 2017 has 1,281,167 and 50,000.
    """
    size, remedy = IMAGE_SETS[H.dataset].image_size, f"run ./setup_imagenet.sh {H.dataset}"
    n_train, n_test = (1281167, 50000) if H.dataset.endswith("_box") else (1281149, 49999)
    root = Path(H.data_root)
    train = open_npy(root / f"{H.dataset}-train.npy", (n_train, size, size, 3), remedy)
    test = open_npy(root / f"{H.dataset}-valid.npy", (n_test, size, size, 3), remedy)
    indices = split_last(len(train), 5000, seed=42)
    return Images(train, indices[0]), Images(train, indices[1]), Images(test)


def load_ffhq256(H):
    """63,000 train images and 7,000 that are both valid and test."""
    path = Path(H.data_root, "ffhq-256.npy")
    array = open_npy(path, (70000, 256, 256, 3), "run ./setup_ffhq256.sh")
    indices = split_last(len(array), 7000, seed=5)
    valid = Images(array, indices[1])
    return Images(array, indices[0]), valid, valid


class FfhqFiles:
    """The 70,000 PNG files of FFHQ as if they were an array of images, decoded on access."""

    shape = (70000, 1024, 1024, 3)

    def __init__(self, root):
        self.root = Path(root)
        # The official layout has folders of 1,000: 69000/69999.png.
        self.official = (self.root / "00000").is_dir()

    def __len__(self):
        return self.shape[0]

    def name(self, i):
        """Path of file number i, relative to the root."""
        return f"{i // 1000 * 1000:05}/{i:05}.png" if self.official else f"{i:05}.png"

    def missing(self):
        """Names of the files that are not there."""
        folders = [f"{i:05}" for i in range(0, 70000, 1000)] if self.official else [""]
        found = set()
        for folder in folders:
            with contextlib.suppress(OSError):
                entries = os.scandir(self.root / folder)
                found |= {os.path.join(folder, entry.name) for entry in entries if entry.is_file()}
        return [name for name in map(self.name, range(len(self))) if name not in found]

    def __getitem__(self, numbers):
        return np.stack([self._read(i) for i in numbers])

    def _read(self, i):
        path = self.root / self.name(i)
        try:
            image = decode(path.read_bytes())
        except OSError as error:
            raise UserError(f"{path} can't be read ({error.strerror}): fetch it anew") from None
        except ValueError as error:
            raise UserError(f"{path} {error}: fetch it anew") from None
        if image.size != (1024, 1024):
            raise UserError(
                f"{path} is {image.width} x {image.height} pixels, not 1024 x 1024: fetch it anew"
            )
        return np.asarray(image)


def load_ffhq1024(H):
    """65,000 train images (00000 to 64999) and 5,000 that are both valid and test, by number."""
    array = FfhqFiles(H.data_root)
    if missing := array.missing():
        raise UserError(
            f"{H.data_root} lacks {len(missing):,} of the 70,000 PNG files, first {missing[0]}: "
            f"run ./setup_ffhq1024.sh FOLDER with the folder of FFHQ's images1024x1024"
        )
    valid = Images(array, np.arange(65000, 70000))
    return Images(array, np.arange(65000)), valid, valid


def load_digits(H):
    """The 1,797 handwritten digits that scikit-learn ships: 1,397 train, 200 valid, 200 test."""
    from sklearn import datasets  # slow to import

    levels = np.rint(datasets.load_digits().images * (255 / 16)).astype(np.uint8)  # (n, 8, 8)
    array = np.repeat(levels[..., None], 3, axis=-1)  # (n, 8, 8, 3)
    order = np.random.RandomState(0).permutation(len(array))
    return Images(array, order[400:]), Images(array, order[:200]), Images(array, order[200:400])


def load_photos32(H):
    """Patches of scikit-learn's two sample photographs: 5,300 train, 250 valid, 250 test.

    The photographs, 427 x 640, are cut at columns 448 and 544, so no patch of one split shows
    a pixel of another.
    """
    from sklearn import datasets  # slow to import

    photos = np.stack(datasets.load_sample_images().images)  # (2, 427, 640, 3)

    def patches(left, right, stride):
        windows = np.lib.stride_tricks.sliding_window_view(
            photos[:, :, left:right], (32, 32), axis=(1, 2)
        )[:, ::stride, ::stride]  # (2, rows, columns, 3, 32, 32)
        return Images(windows.transpose(0, 1, 2, 4, 5, 3).reshape(-1, 32, 32, 3))

    return patches(0, 448, stride=8), patches(448, 544, stride=16), patches(544, 640, stride=16)


# ---- own images: any folder of pictures, or one .npy ----------------------------------------


def fit(image, size):
    """A PIL image as uint8 (size, size, 3): short side to `size` (Lanczos), the middle cut out.

    Raises:
        ValueError: for an image with a side shorter than `size`.
    """
    short = min(image.size)
    if short < size:
        raise ValueError(f"is {image.width} x {image.height} pixels, smaller than {size}")
    width, height = (round(side * size / short) for side in image.size)
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


class _ToPack(Dataset):
    """Item i: (image i of a folder, uint8 (S, S, 3), or None; None, or why it can't be used)."""

    def __init__(self, root, names, size):
        self.root, self.names, self.size = root, names, size

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        try:
            return fit(decode((self.root / self.names[i]).read_bytes()), self.size), None
        except OSError as error:
            return None, f"can't be read ({error.strerror})"
        except ValueError as error:
            return None, str(error)


def pack_images(root, names, size, out):
    """Writes the images of a folder, fitted to `size`, as one .npy; returns {name: why not}.

    Raises:
        UserError: if there is no room for them, or not one can be used.
    """
    needed, free = len(names) * size * size * 3, shutil.disk_usage(out.parent).free
    if needed > free:
        raise UserError(
            f"{len(names):,} images of {size} x {size} need {needed:,} bytes, {out.parent} has "
            f"{free:,} free: make room"
        )
    bad = {}

    def chunks():
        loader = DataLoader(
            _ToPack(root, names, size),
            batch_size=16,
            num_workers=_cores() if len(names) > 100 else 0,
            collate_fn=list,
            generator=torch.Generator(),
        )
        numbers = iter(names)
        with tqdm(desc=f"packing {root}", total=len(names), unit=" images", disable=None) as bar:
            for batch in loader:
                for image, reason in batch:
                    name = next(numbers)
                    if reason:
                        bad[name] = reason
                    else:
                        yield image[None]
                bar.update(len(batch))
        if len(bad) == len(names):
            name, reason = next(iter(bad.items()))
            raise UserError(f"{root}: none of {len(names)} images can be used; {name} {reason}")

    write_npy(out, chunks())
    return bad


def split_own(n):
    """Indices (valid, test) of n own images, shuffled with a seed of their own; the rest train.

    A twentieth each, at least 1 and at most 5,000.
    """
    k = min(max(n // 20, 1), 5000)
    order = np.random.RandomState(0).permutation(n)
    return order[:k], order[k : 2 * k]


def train_indices(n, valid, test):
    """Those of 0..n-1 that are in neither of two splits, in ascending order."""
    return np.setdiff1d(np.arange(n), np.concatenate([valid, test]))


def measure(array):
    """{mean, std, sha256} of training images of an array, in levels of 0 to 255.

    At most 10,000, evenly spaced: the first ones would all be of a tree's first folders. sha256 is
    over the shape and these images: it tells one set of images from another.
    """
    numbers = train_indices(len(array), *split_own(len(array)))
    numbers = numbers[:: math.ceil(len(numbers) / 10000) or 1]
    digest, counts = hashlib.sha256(str(array.shape).encode()), np.zeros(256, np.int64)
    step = max(1, 2**22 // math.prod(array.shape[1:]))  # 4 MiB at a time; bincount takes 8 times it
    for first in range(0, len(numbers), step):
        images = array[numbers[first : first + step]]
        digest.update(images)
        counts += np.bincount(images.ravel(), minlength=256)
    levels, n = np.arange(256), max(counts.sum(), 1)
    mean = (counts * levels).sum() / n
    std = math.sqrt((counts * (levels - mean) ** 2).sum() / n)
    return {"mean": float(mean), "std": std, "sha256": digest.hexdigest()}


def cache_folders(root):
    """Where packed images of a folder may lie: in it, or where it is read-only in the user's cache.

    The latter is ${XDG_CACHE_HOME:-~/.cache}/vdvae.
    """
    root = Path(root).resolve()
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return [root / ".vdvae", home / "vdvae" / hashlib.sha256(str(root).encode()).hexdigest()[:16]]


def read_json(path):
    """What a JSON file holds, or None where there is none.

    Raises:
        UserError: for a file that is no JSON object.
    """
    try:
        content = json.loads(Path(path).read_bytes())
        if not isinstance(content, dict):
            raise ValueError("no JSON object")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read ({error}): delete it to have it made anew") from None
    return content


def write_json(path, content):
    """Writes a JSON file that appears when it is whole."""
    partial = Path(f"{path}.partial")
    partial.write_text(json.dumps(content, indent=1))
    os.replace(partial, path)


def cached(root, name, source, make):
    """make(folder)'s manifest, made once: (one of cache_folders(root), manifest).

    The manifest is kept in it as NAME.json with `source`, which says what it was made from: while
    that is the same, it is not made again. Of all processes of a host one makes it, the others
    wait.

    Raises:
        UserError: if there is no place to write.
    """

    def fresh(folder):
        manifest = read_json(folder / f"{name}.json") or {}
        return manifest if manifest.get("source") == source else None

    folders = cache_folders(root)
    for folder in folders:
        if manifest := fresh(folder):
            return folder, manifest
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = open(folder / f"{name}.lock", "w")
            break
        except OSError as error:
            reason = error.strerror
    else:
        raise UserError(
            f"what is made of {root} can be written neither to {folders[0]} nor to {folders[1]} "
            f"({reason}): set XDG_CACHE_HOME to a folder with room"
        )
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
        manifest = fresh(folder)  # where another process was first
        if not manifest:
            (folder / f"{name}.json").unlink(missing_ok=True)
            manifest = {"source": source, **make(folder)}
            write_json(folder / f"{name}.json", manifest)
    return folder, manifest


def state_of(root, names):
    """A hash over files' names, sizes, times of change and permissions."""
    listing = []
    for name in names:
        try:
            stat = os.stat(root / name)
            listing.append((name, stat.st_size, stat.st_mtime_ns, stat.st_mode))
        except OSError:  # such as a link to nothing, which is packed as unreadable
            listing.append((name,))
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def packed_images(root, size):
    """The images below a folder at `size`: (NpyImages, manifest), packed where none is cached.

    The manifest holds measure's facts, the names of the `files` in the array's order, and `bad`,
    a dict of those that can't be used, each with its reason.

    Raises:
        UserError: for a folder without images, or no place to write.
    """
    names, left_out = list_images(root)
    if not names:
        raise UserError(f"{root} holds no image: --data_root needs {', '.join(SUFFIXES)} files")

    def pack(folder):
        if left_out:
            print(f"leaving out {len(left_out)} other files below {root}, first {left_out[0]}")
        out = folder / f"{size}.npy"
        bad = pack_images(root, names, size, out)
        files = [name for name in names if name not in bad]
        print(f"packed {len(files):,} images of {root} in {out}", flush=True)
        return {**measure(NpyImages(out)), "bad": bad, "files": files}

    folder, manifest = cached(root, str(size), state_of(root, names), pack)
    shape = (len(manifest["files"]), size, size, 3)
    return open_npy(folder / f"{size}.npy", shape, f"delete {folder} to pack anew"), manifest


def open_own(H):
    """(NpyImages, facts as of measure) of --data_root, a folder of images or one .npy.

    Raises:
        UserError: as packed_images and open_npy; for images that can't be used, unless --bad_images
            is skip; and for a missing or wrong --image_size.
    """
    root = Path(H.data_root)
    if root.suffix == ".npy" and not root.is_dir():
        try:
            found = NpyImages(root).shape
        except (OSError, ValueError) as error:
            raise UserError(f"--data_root {root} is no complete .npy file ({error})") from None
        n, size = (found + (0, 0))[:2]
        size = H.image_size or size
        array = open_npy(root, (n, size, size, 3), "convert it, or name another --image_size")
        state = state_of(root.parent, [root.name])
        return array, cached(root.parent, root.name, state, lambda _: measure(array))[1]
    if not root.is_dir():
        raise UserError(f"--data_root {root} is no folder: name one of images, or an .npy file")
    if not H.image_size:
        raise UserError("--dataset images needs --image_size: the pixels of a side to resize to")
    array, facts = packed_images(root, H.image_size)
    if bad := facts["bad"]:
        named = ", ".join(f"{name} {why}" for name, why in list(bad.items())[:3])
        problem = (
            f"{len(bad)} of {len(bad) + len(array)} images below {root} can't be used "
            f"({named}{', ...' if len(bad) > 3 else ''}; all in "
            f"{Path(array.path).with_suffix('.json')})"
        )
        if H.bad_images != "skip":
            raise UserError(f"{problem}: mend or remove them, or add --bad_images skip")
        if mpi_rank() == 0:
            print(f"going on although {problem}", flush=True)
    return array, facts


def read_record(path, keys):
    """The images.json of a run beside `path`, or None where there is none.

    Raises:
        UserError: if it is none, or lacks one of keys.
    """
    path = Path(path).with_name("images.json")
    record = read_json(path)
    if record and not keys <= record.keys():
        raise UserError(f"{path} lacks one of {', '.join(keys)}: delete it to measure anew")
    return record


def load_images(H):
    """The user's own images; sets H.image_size, H.image_mean, H.image_std and H.image_record.

    The record has mean, std and split, and is images.json in the run's folder once the run trains,
    see keep_image_record. A run that restores the weights of another takes the mean and std of that
    one, and its split where the images are the same.

    Raises:
        UserError: as open_own; if the run's folder tells of other images, or of another mean and
            std than the restored weights'; for fewer than 3 images or such of one level only.
    """
    array, facts = open_own(H)
    n, size = array.shape[:2]
    if n < 3 or not facts["std"]:
        raise UserError(
            f"{H.data_root} holds {n} images of standard deviation {facts['std']:g}: a split in "
            f"three needs 3 images, and levels that differ"
        )
    valid, test = split_own(n)
    record = {"image_size": size, "n_images": n, "valid": valid.tolist(), "test": test.tolist()}
    record |= {key: facts[key] for key in ("mean", "std", "sha256")}
    paths = [path for path in (H.restore_ema_path, H.restore_path, H.logdir) if path]
    known = [found for path in paths if (found := read_record(path, record.keys()))]
    if known:  # the restored weights' comes first: it is what they were trained with
        same = known[0]["sha256"] == record["sha256"]
        record |= known[0] if same else {key: known[0][key] for key in ("mean", "std")}
    if H.logdir:
        path, own = Path(H.logdir).with_name("images.json"), read_record(H.logdir, record.keys())
        if own and own != record:
            others = f"{own['n_images']} other images of {own['image_size']} pixels than the {n} of"
            others += f" {size} of {H.data_root}"
            if own["sha256"] == record["sha256"]:
                others = "another mean, std or split than the restored weights'"
            raise UserError(f"{path} tells of {others}: choose another --desc, or delete it")
    H.image_size, H.image_mean, H.image_std = size, record["mean"], record["std"]
    H.image_record = record
    valid, test = (np.array(record[key], dtype=np.int64) for key in ("valid", "test"))
    train = train_indices(n, valid, test)
    return Images(array, train), Images(array, valid), Images(array, test)


def keep_image_record(H):
    """Writes what load_images has found out, where there are own images, into the run's folder."""
    if H.image_record:
        write_json(Path(H.logdir).with_name("images.json"), H.image_record)


LOADERS = {
    "cifar10": load_cifar10,
    "imagenet32": load_imagenet,
    "imagenet64": load_imagenet,
    "imagenet32_box": load_imagenet,
    "imagenet64_box": load_imagenet,
    "ffhq_256": load_ffhq256,
    "ffhq_1024": load_ffhq1024,
    "digits": load_digits,
    "photos32": load_photos32,
    "images": load_images,
}


# ---- the door ------------------------------------------------------------------------------


def make_preprocess(dataset, device, mean=None, std=None):
    """A function [uint8 (N, S, S, 3), ...] → (input, target), float32 of that shape on `device`.

    input is (level - mean) / std of the data set (own images: as given); target is in [-1, 1], of 5
    bits where the data set's are. The caller's batch is left as it was.
    """
    facts = IMAGE_SETS[dataset]
    if dataset == "images":
        facts = facts._replace(mean=mean, std=std)

    def preprocess_fn(batch):
        levels = batch[0].to(device, non_blocking=True).float()  # (N, S, S, 3), 0 to 255
        x = (levels - facts.mean) * (1 / facts.std)
        if facts.bits == 5:
            levels = (levels / 8).floor() * 8
        return x, (levels - 127.5) / 127.5

    return preprocess_fn


def preprocess(images, H):
    """The network's (input, target) of images, an array or tensor of uint8 (N, S, S, 3).

    H is a model's, with its dataset, image_size and device. Both are float32 (N, S, S, 3).

    Raises:
        UserError: for images of another type or size.
    """
    images = torch.as_tensor(images)
    size = H.image_size
    if images.dtype != torch.uint8 or images.shape != (len(images), size, size, 3):
        raise UserError(
            f"images are {images.dtype} {tuple(images.shape)}; the model takes uint8 "
            f"(N, {size}, {size}, 3)"
        )
    if H.dataset == "images" and H.image_mean is None:
        raise UserError(
            "the mean and std of the images that the model was trained on are not known: "
            "images.json of its run must lie beside its weights"
        )
    device = resolve_device(H.device)
    return make_preprocess(H.dataset, device, H.image_mean, H.image_std)([images])


def set_up_data(H):
    """Opens H.dataset and sets H.image_size and H.image_channels.

    Returns:
        (H, training set, validation set or with H.test_eval the test set, preprocess_fn).

    Raises:
        UserError: for an unknown data set, or files that are missing or not what they should be.
    """
    set_image_size(H)
    train, valid, test = LOADERS[H.dataset](H)
    device = resolve_device(H.device)
    preprocess_fn = make_preprocess(H.dataset, device, H.image_mean, H.image_std)
    return H, train, test if H.test_eval else valid, preprocess_fn
