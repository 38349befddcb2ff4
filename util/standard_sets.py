"""The published data sets, read (and fetched when missing) by torchvision, and embedded digits."""

from __future__ import annotations

import math
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision import datasets
from torchvision.transforms.v2 import functional

from .pictures import (
    DataError,
    DataSpec,
    Held,
    Resized,
    Split,
    channel_statistics,
    hold_in_memory,
)

TIMEOUT = 30  # seconds that a silent server is given
DIGITS_TEST = 360  # of 1797 pictures, a fifth of every class
DIGIT_NAMES = tuple("0123456789")


# fmt: off
STL10_NAMES = (
    "airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck",
)
# fmt: on


@dataclass(frozen=True)
class StandardSet:
    """A data set of torchvision: its class, channel statistics, and where its files come from.

    Attributes:
        mean, std: the well-known values of the training pictures at their native size.
        folder: below the root; holds `files`.
        archive: what `url` offers, accepted below the root as it is; "" where `files` come singly.
        classes: names, where torchvision has none.
    """

    kind: type
    mean: tuple[float, ...]
    std: tuple[float, ...]
    folder: str
    files: tuple[str, ...]
    url: str
    archive: str = ""
    classes: tuple[str, ...] = ()


IDX_FILES = tuple(
    f"{part}-ubyte" for s in ("train", "t10k") for part in (f"{s}-images-idx3", f"{s}-labels-idx1")
)
STANDARD_SETS = {
    "cifar10": StandardSet(
        datasets.CIFAR10,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        folder="cifar-10-batches-py",
        files=(*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"),
        url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        archive="cifar-10-python.tar.gz",
    ),
    "cifar100": StandardSet(
        datasets.CIFAR100,
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        folder="cifar-100-python",
        files=("train", "test", "meta"),
        url="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        archive="cifar-100-python.tar.gz",
    ),
    "mnist": StandardSet(
        datasets.MNIST,
        mean=(0.1307,),
        std=(0.3081,),
        folder="MNIST/raw",
        files=IDX_FILES,
        url="https://ossci-datasets.s3.amazonaws.com/mnist/",
    ),
    "fashion": StandardSet(
        datasets.FashionMNIST,
        mean=(0.2860,),
        std=(0.3530,),
        folder="FashionMNIST/raw",
        files=IDX_FILES,
        url="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    ),
    "svhn": StandardSet(
        datasets.SVHN,
        mean=(0.4377, 0.4438, 0.4728),
        std=(0.1980, 0.2010, 0.1970),
        folder="",
        files=("train_32x32.mat", "test_32x32.mat"),
        url="http://ufldl.stanford.edu/housenumbers/",
        classes=DIGIT_NAMES,
    ),
    "stl10": StandardSet(
        datasets.STL10,
        mean=(0.4467, 0.4398, 0.4066),
        std=(0.2603, 0.2566, 0.2713),
        folder="stl10_binary",
        files=(*(f"{s}_{a}.bin" for s in ("train", "test") for a in "Xy"), "unlabeled_X.bin"),
        url="http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz",
        archive="stl10_binary.tar.gz",
        classes=STL10_NAMES,
    ),
}


def load_standard(name: str, root: Path, image_size: int) -> tuple[DataSpec, Split, Split]:
    """Read a published data set, downloading it into root only if it is not there.

    Raises:
        DataError: neither there nor to be downloaded, or damaged.
    """
    row = STANDARD_SETS[name]
    opened = [open_split(name, root, part) for part in ("train", "test")]
    classes = row.classes or tuple(opened[0].classes)
    splits = [
        make_split(
            as_pictures(s.data), getattr(s, "targets", getattr(s, "labels", None)), image_size
        )
        for s in opened
    ]
    for part, split in zip(("train", "test"), splits, strict=True):
        check_labels(f"{name}, {part}, in {root / row.folder}", split, len(classes))
    return DataSpec(name, len(row.mean), image_size, classes, row.mean, row.std), *splits


def check_labels(where: str, split: Split, classes: int) -> None:
    """See that every picture has a label, and every label a class.

    Raises:
        DataError: naming `where`, and the first label that has none.
    """
    if len(split.targets) != len(split.source):
        counts = f"{len(split.source)} pictures and {len(split.targets)} labels"
        raise DataError(f"{where}: damaged files: {counts}")
    wrong = (split.targets < 0) | (split.targets >= classes)
    if wrong.any():
        first = int(wrong.nonzero()[0])
        label = int(split.targets[first])
        raise DataError(f"{where}: picture {first} has the label {label}, of 0 to {classes - 1}")


def find_torn_idx(folder: Path) -> str | None:
    """The first of IDX_FILES whose length is not the one that its header tells; None if none is.

    Source: http://yann.lecun.com/exdb/mnist, the IDX format: two zeros, the type, the number of
    dimensions; each dimension as four bytes, the first byte the highest; the values, here bytes.
    """
    for path in (folder / name for name in IDX_FILES):
        if not path.exists():
            continue
        content = path.read_bytes()
        numbers = np.frombuffer(content[: 4 + 4 * content[3]] if len(content) > 3 else b"", ">u4")
        if len(content) < 8 or len(content) != 4 * len(numbers) + math.prod(numbers[1:].tolist()):
            return f"{path} has {len(content):,} bytes, not those that it announces"
    return None


def load_digits(image_size: int) -> tuple[DataSpec, Split, Split]:
    """The 1,797 handwritten 8 x 8 digits that come with scikit-learn, enlarged; no download.

    Always the same stratified split: 1,437 pictures to train, 360 to test.
    """
    from sklearn import datasets as embedded  # here, because importing it takes a second
    from sklearn.model_selection import train_test_split

    digits = embedded.load_digits()
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)
    parts = train_test_split(
        pixels, digits.target, test_size=DIGITS_TEST, stratify=digits.target, random_state=0
    )
    train, test = (make_split(as_pictures(parts[i]), parts[2 + i], image_size) for i in (0, 1))
    mean, std = channel_statistics(train.source)
    return DataSpec("digits", 1, image_size, DIGIT_NAMES, mean, std), train, test


def as_pictures(data: np.ndarray | Tensor) -> Tensor:
    """Any layout that torchvision stores, N H W, N H W 3 or N 3 H W, as N C H W uint8."""
    images = torch.as_tensor(data)
    if images.ndim == 3:
        images = images[:, None]
    elif images.shape[-1] == 3:
        images = images.permute(0, 3, 1, 2)
    return images.contiguous()


def make_split(images: Tensor, targets: np.ndarray | Tensor | list[int], image_size: int) -> Split:
    """Pictures at image_size: 28 x 28 is first padded to 32 with black, others are resized."""
    if images.shape[-1] == 28:
        images = functional.pad(images, [2])
    held = Held(images)
    same = images.shape[-1] == image_size
    source = held if same else hold_in_memory(Resized(held, image_size))
    return Split(source, torch.as_tensor(targets, dtype=torch.int64))


def open_split(name: str, root: Path, part: str) -> datasets.VisionDataset:
    """The "train" or "test" part from files below root, or else from the network.

    Raises:
        DataError: what is missing or damaged, what was tried, and where files can be put by hand.
    """
    row = STANDARD_SETS[name]
    by_split = row.kind in (datasets.SVHN, datasets.STL10)
    choice = {"split": part} if by_split else {"train": part == "train"}
    try:
        return row.kind(root, download=False, **choice)
    except Exception as error:  # parsers of foreign files raise anything
        if "not found" not in str(error):
            folder = root / row.folder
            torn = row.files == IDX_FILES and find_torn_idx(folder)
            raise DataError(
                f"{name}: damaged files in {folder} ({torn or one_line(error)})"
            ) from None
    try:
        with socket_timeout(TIMEOUT):
            return row.kind(root, download=True, **choice)
    except Exception as error:  # from no network to a full disk
        raise DataError(explain_missing(name, root, error)) from None


def explain_missing(name: str, root: Path, error: Exception) -> str:
    """What was tried, and the exact files and folder that would mend it."""
    row, root = STANDARD_SETS[name], root.resolve()
    by_hand = f"put {', '.join(row.files)} into {root / row.folder}"
    if row.archive:
        by_hand += f", or {row.archive} as it is into {root}"
    elif row.files == IDX_FILES:
        by_hand += " (with .gz, as offered there, will do)"
    return (
        f"data set {name} is missing or incomplete in {root}\n"
        f"  tried: to download it from {row.url}: {one_line(error)}\n"
        f"  by hand: {by_hand}"
    )


def one_line(error: Exception) -> str:
    """An error as one line, named by its kind if it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def socket_timeout(seconds: float) -> Iterator[None]:
    """Give new connections a limit: torchvision sets none, and a silent firewall would hang it."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
