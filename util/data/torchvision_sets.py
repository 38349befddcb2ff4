"""The published data sets, read by torchvision and fetched when missing, and embedded digits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision import datasets
from torchvision.transforms.v2 import functional

from util.data.archives import find_damaged, is_complete, list_archives, obtain
from util.data.images import DataSpec, Held, Resized, Split, channel_statistics, hold_in_memory
from util.errors import DataError

DIGITS_TEST = 360  # of 1797 images, a fifth of every class
DIGIT_NAMES = tuple("0123456789")


# fmt: off
STL10_NAMES = (
    "airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck",
)
# fmt: on


@dataclass(frozen=True)
class StandardSet:
    """A data set of torchvision: its class, and channel statistics.

    Attributes:
        mean, std: the well-known values of the training images at their native size.
        classes: names, where torchvision has none.
    """

    kind: type
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...] = ()


STANDARD_SETS = {
    "cifar10": StandardSet(
        datasets.CIFAR10, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)
    ),
    "cifar100": StandardSet(
        datasets.CIFAR100, mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762)
    ),
    "mnist": StandardSet(datasets.MNIST, mean=(0.1307,), std=(0.3081,)),
    "fashion": StandardSet(datasets.FashionMNIST, mean=(0.2860,), std=(0.3530,)),
    "svhn": StandardSet(
        datasets.SVHN,
        mean=(0.4377, 0.4438, 0.4728),
        std=(0.1980, 0.2010, 0.1970),
        classes=DIGIT_NAMES,
    ),
    "stl10": StandardSet(
        datasets.STL10,
        mean=(0.4467, 0.4398, 0.4066),
        std=(0.2603, 0.2566, 0.2713),
        classes=STL10_NAMES,
    ),
}


def load_standard(
    name: str, root: Path, image_size: int, mirror: str | None = None
) -> tuple[DataSpec, Split, Split]:
    """Read a published data set, downloading into root only what is not there, or damaged.

    Args:
        mirror: see `obtain`.

    Raises:
        DataError: neither there nor to be downloaded, or damaged.
    """
    row = STANDARD_SETS[name]
    opened = open_splits(name, root, mirror)
    classes = row.classes or tuple(opened[0].classes)
    splits = [
        make_split(as_images(s.data), getattr(s, "targets", getattr(s, "labels", None)), image_size)
        for s in opened
    ]
    for part, split in zip(("train", "test"), splits, strict=True):
        check_labels(f"{name}, {part}, in {folder_of(name, root)}", split, len(classes))
    return DataSpec(name, len(row.mean), image_size, classes, row.mean, row.std), *splits


def check_labels(where: str, split: Split, classes: int) -> None:
    """See that every image has a label, and every label a class.

    Raises:
        DataError: naming `where`, and the first label that has none.
    """
    if len(split.targets) != len(split.source):
        counts = f"{len(split.source)} images and {len(split.targets)} labels"
        raise DataError(f"{where}: damaged files: {counts}")
    wrong = (split.targets < 0) | (split.targets >= classes)
    if wrong.any():
        first = int(wrong.nonzero()[0])
        label = int(split.targets[first])
        raise DataError(f"{where}: image {first} has the label {label}, of 0 to {classes - 1}")


def load_digits(image_size: int) -> tuple[DataSpec, Split, Split]:
    """The 1,797 handwritten 8 x 8 digits that come with scikit-learn, enlarged; no download.

    Always the same stratified split: 1,437 images to train, 360 to test.
    """
    from sklearn import datasets as embedded  # here, because importing it takes a second
    from sklearn.model_selection import train_test_split

    digits = embedded.load_digits()
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)
    parts = train_test_split(
        pixels, digits.target, test_size=DIGITS_TEST, stratify=digits.target, random_state=0
    )
    train, test = (make_split(as_images(parts[i]), parts[2 + i], image_size) for i in (0, 1))
    mean, std = channel_statistics(train.source)
    return DataSpec("digits", 1, image_size, DIGIT_NAMES, mean, std), train, test


def as_images(data: np.ndarray | Tensor) -> Tensor:
    """Any layout that torchvision stores, N H W, N H W 3 or N 3 H W, as N C H W uint8."""
    images = torch.as_tensor(data)
    if images.ndim == 3:
        images = images[:, None]
    elif images.shape[-1] == 3:
        images = images.permute(0, 3, 1, 2)
    return images.contiguous()


def make_split(images: Tensor, targets: np.ndarray | Tensor | list[int], image_size: int) -> Split:
    """Images at image_size: 28 x 28 is first padded to 32 with black, others are resized."""
    if images.shape[-1] == 28:
        images = functional.pad(images, [2])
    held = Held(images)
    same = images.shape[-1] == image_size
    source = held if same else hold_in_memory(Resized(held, image_size))
    return Split(source, torch.as_tensor(targets, dtype=torch.int64))


def open_splits(name: str, root: Path, mirror: str | None = None) -> list[datasets.VisionDataset]:
    """The training and the test part from files below root, or else from the network.

    Raises:
        DataError: what is missing or damaged, what was tried, and where files can be put by hand.
    """
    kind = STANDARD_SETS[name].kind
    try:
        return read_splits(kind, root)
    except Exception as error:  # parsers of foreign files raise anything
        if is_complete(kind, root):
            text = f"{name}: damaged files in {folder_of(name, root)} ({one_line(error)})"
            raise DataError(text) from None
    try:
        obtain(kind, root, mirror)
        return read_splits(kind, root)
    except Exception as error:  # from no network to a full disk
        raise DataError(explain_missing(name, root, error)) from None


def read_splits(kind: type, root: Path) -> list[datasets.VisionDataset]:
    """Both parts as torchvision reads them, which compares checksums where they are known."""
    if issubclass(kind, datasets.SVHN | datasets.STL10):
        return [kind(root, split=part) for part in ("train", "test")]
    return [kind(root, train=train) for train in (True, False)]


def folder_of(name: str, root: Path) -> Path:
    """Where the files of a data set lie that are read."""
    first = next(iter(list_archives(STANDARD_SETS[name].kind)[0].files))
    return (root / first).parent


def explain_missing(name: str, root: Path, error: Exception) -> str:
    """What is wrong, what was tried, and the exact files and folder that would mend it."""
    kind, root = STANDARD_SETS[name].kind, root.resolve()
    archives = list_archives(kind)
    files = ", ".join(file.name for archive in archives for file in archive.files)
    by_hand = f"put {files} into {folder_of(name, root)}"
    if len(archives) == 1:
        by_hand += f", or {archives[0].path} as it is into {root}"
    elif issubclass(kind, datasets.MNIST):
        by_hand += " (with .gz, as offered there, will do)"
    lines = [
        f"data set {name} is missing or incomplete in {root}",
        *(f"damaged: {fault}" for fault in find_damaged(kind, root)),
        f"tried to download it: {one_line(error)}",
        f"by hand: {by_hand}; or name a mirror by --data-url",
    ]
    return "\n  ".join(lines)


def one_line(error: Exception) -> str:
    """An error as one line, named by its kind if it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
