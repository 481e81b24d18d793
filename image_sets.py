"""Facts of the data sets that need none of their files."""

from typing import NamedTuple

from errors import UserError


class ImageSet(NamedTuple):
    """What a network has to know of a data set, known without any of its files.

    mean and std are those of about 10,000 training images, in levels of 0 to 255: the network's
    input is (level - mean) / std. bits is the depth of the target; at 5 bits the lowest three of
    each level are dropped from it. notice is what every result on the data set says with it; counts
    are its images to train on, validate and test; setup is the command that fetches it. Pixels have
    `channels` levels. labels are the names of its classes, used if always_labelled or asked for.
    """

    image_size: int | None
    mean: float | None
    std: float | None
    bits: int = 8
    notice: str | None = None
    counts: tuple[int, int, int] | None = None
    setup: str | None = None
    channels: int = 3
    labels: tuple[str, ...] = ()
    always_labelled: bool = False


# As in its batches.meta.
_CIFAR10 = tuple("airplane automobile bird cat deer dog frog horse ship truck".split())

_BOX = "box-filtered ImageNet (Chrabaszcz et al. 2017): not comparable with the published {} of {}"

# 5,000 of the train file validate.
_IMAGENET = (1_281_149 - 5_000, 5_000, 49_999)
_IMAGENET_BOX = (1_281_167 - 5_000, 5_000, 50_000)

IMAGE_SETS = {
    "cifar10": ImageSet(
        32,
        120.63838,
        64.16736,
        counts=(45_000, 5_000, 10_000),
        setup="./setup_cifar10.sh",
        labels=_CIFAR10,
    ),
    "imagenet32": ImageSet(
        32, 116.2373, 69.37404, counts=_IMAGENET, setup="./setup_imagenet.sh imagenet32"
    ),
    "imagenet64": ImageSet(
        64, 115.92961967, 69.37404, counts=_IMAGENET, setup="./setup_imagenet.sh imagenet64"
    ),
    # The same photographs, made smaller by another filter. With the same mean and std, weights
    # trained on one can be tried on the other.
    "imagenet32_box": ImageSet(
        32,
        116.2373,
        69.37404,
        notice=_BOX.format(3.80, "imagenet32"),
        counts=_IMAGENET_BOX,
        setup="./setup_imagenet.sh imagenet32_box",
    ),
    "imagenet64_box": ImageSet(
        64,
        115.92961967,
        69.37404,
        notice=_BOX.format(3.52, "imagenet64"),
        counts=_IMAGENET_BOX,
        setup="./setup_imagenet.sh imagenet64_box",
    ),
    "ffhq_256": ImageSet(
        256,
        112.8666757481,
        69.84780273,
        bits=5,
        counts=(63_000, 7_000, 7_000),
        setup="./setup_ffhq256.sh",
    ),
    # Mean and std are published for levels of 0 to 1.
    "ffhq_1024": ImageSet(
        1024,
        0.4387 * 255,
        0.2743 * 255,
        counts=(65_000, 5_000, 5_000),
        setup="./setup_ffhq1024.sh FOLDER",
    ),
    # The two data sets that scikit-learn ships; measured on their training images
    # (tests/test_data.py measures them again).
    "digits": ImageSet(
        8, 78.04011, 95.98312, channels=1, labels=tuple("0123456789"), always_labelled=True
    ),
    "photos32": ImageSet(32, 105.21026, 81.46530),
    # The user's own: --image_size, --image_channels and --labels say what they are, own_images.py
    # measures mean and std.
    "images": ImageSet(None, None, None),
}


def image_size_of(dataset, asked=None):
    """Pixels of a side of a data set's images; of own images those asked for (None: not known).

    Raises:
        UserError: for an unknown data set, or another size asked for than it has.
    """
    if dataset not in IMAGE_SETS:
        raise UserError(f"unknown dataset {dataset!r}: it is one of {', '.join(IMAGE_SETS)}")
    size = IMAGE_SETS[dataset].image_size
    if size and asked not in (None, size):
        raise UserError(
            f"--image_size {asked}: {dataset} has {size} pixels; leave it out, or give your own "
            f"images with --dataset images"
        )
    return asked or size


CHANNELS = (1, 3)  # grey, or red, green and blue


def channels_of(H):
    """Channels of a network's images: H.image_channels, 3 where H has none, or raises for it.

    Raises:
        UserError: for any number but 1 and 3.
    """
    try:
        channels = H.image_channels
    except Exception:  # a program's H may raise anything
        channels = None
    channels = 3 if channels is None else channels
    if channels not in CHANNELS:
        raise UserError(f"image_channels is {channels!r}: it must be 1 (grey) or 3 (RGB)")
    return channels


def image_channels_of(dataset, asked=None):
    """Channels of a data set's images; of own images those asked for, by default 3.

    Raises:
        UserError: for another number asked for than it has.
    """
    channels = IMAGE_SETS[dataset].channels
    if dataset != "images" and asked not in (None, channels):
        raise UserError(
            f"--image_channels {asked}: {dataset} has {channels}; leave it out, or give your own "
            f"images with --dataset images"
        )
    return asked or channels


def set_labels(dataset, asked=None):
    """The names of a data set's labels, a list; empty where it has none, or none are asked for.

    asked: --labels. Those of own images are in their folders and files: none are known here.

    Raises:
        UserError: for labels asked of a data set that has none, or of which they are not its own.
    """
    facts = IMAGE_SETS[dataset]
    if dataset == "images" and asked != "own":
        return []
    if asked not in (None, "own") or asked and not facts.labels:
        rule = "its labels are `own`" if facts.labels else "it has no labels"
        remedy = "" if dataset != "images" else "; name `folders` or a FILE.json"
        raise UserError(f"--labels {asked}: {dataset}: {rule}{remedy or ': leave it out'}")
    return list(facts.labels) if asked or facts.always_labelled else []


def target_bits(dataset):
    """Bit depth of the targets of a data set: 5 for ffhq_256, else 8 (also for None)."""
    return IMAGE_SETS[dataset].bits if dataset in IMAGE_SETS else 8


def result_notice(dataset, more=None):
    """{} for most results; {"notice": text} for those that must not be compared with others.

    more: a further reason, beside the data set's own.
    """
    notices = [IMAGE_SETS[dataset].notice if dataset in IMAGE_SETS else None, more]
    text = "; ".join(notice for notice in notices if notice)
    return {"notice": text} if text else {}
