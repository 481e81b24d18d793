"""Facts of the data sets that need none of their files."""

from typing import NamedTuple

from errors import UserError


class ImageSet(NamedTuple):
    """What a network has to know of a data set, known without any of its files.

    mean and std are those of about 10,000 training images, in levels of 0 to 255: the network's
    input is (level - mean) / std. bits is the depth of the target; at 5 bits the lowest three of
    each level are dropped from it. notice is what every result on the data set says with it; counts
    are its images to train on, validate and test; setup is the command that fetches it.
    """

    image_size: int | None
    mean: float | None
    std: float | None
    bits: int = 8
    notice: str | None = None
    counts: tuple[int, int, int] | None = None
    setup: str | None = None


_BOX = "box-filtered ImageNet (Chrabaszcz et al. 2017): not comparable with the published {} of {}"

# 5,000 of the train file validate.
_IMAGENET = (1_281_149 - 5_000, 5_000, 49_999)
_IMAGENET_BOX = (1_281_167 - 5_000, 5_000, 50_000)

IMAGE_SETS = {
    "cifar10": ImageSet(
        32, 120.63838, 64.16736, counts=(45_000, 5_000, 10_000), setup="./setup_cifar10.sh"
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
    "digits": ImageSet(8, 78.04011, 95.98312),
    "photos32": ImageSet(32, 105.21026, 81.46530),
    # The user's own: --image_size gives the size, own_images.py measures mean and std.
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
