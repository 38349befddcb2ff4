"""Embedded datasets: handwritten digits and a subset of Fashion-MNIST. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from util.data.augment import NO_AUGMENTATION, Augmentation
from util.data.images import DataSpec, Split, channel_statistics, make_split
from util.data.preprocessing import describe_preprocessing

DIGITS_TEST = 360  # of 1797 images, a fifth of every class
DIGIT_NAMES = tuple("0123456789")
FASHION_MINI = Path(__file__).with_name("fashion_mini.npz")

Part = tuple[np.ndarray, np.ndarray]  # images (N, H, W) uint8, labels (N,)


@dataclass(frozen=True)
class EmbeddedSet:
    """Dataset that comes with this repository or its requirements.

    Attributes:
        read: returns the training part and the test part.
        classes: names, by target.
        augmentation: of training images.
    """

    read: Callable[[], tuple[Part, Part]]
    classes: tuple[str, ...]
    augmentation: Augmentation = NO_AUGMENTATION

    def load(self, name: str, image_size: int) -> tuple[DataSpec, Split, Split]:
        """Return the splits at `image_size`, with channel statistics of the training images."""
        preprocessing = describe_preprocessing(name, image_size)
        train, test = (make_split(*part, preprocessing) for part in self.read())
        mean, std = channel_statistics(train.source)
        return DataSpec(name, len(mean), image_size, self.classes, mean, std), train, test


def read_digits() -> tuple[Part, Part]:
    """Read the 1,797 handwritten 8 x 8 digits of scikit-learn.

    The stratified split is always the same: 1,437 images to train, 360 to test.
    """
    from sklearn import datasets as embedded  # here, because importing it takes a second
    from sklearn.model_selection import train_test_split

    digits = embedded.load_digits()
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)
    train, test, train_labels, test_labels = train_test_split(
        pixels, digits.target, test_size=DIGITS_TEST, stratify=digits.target, random_state=0
    )
    return (train, train_labels), (test, test_labels)


def read_fashion_mini() -> tuple[Part, Part]:
    """Read 6,400 training and 2,000 test images of Fashion-MNIST, 28 x 28, class-balanced.

    `scripts/dev/make_fashion_mini.py` makes the file.
    """
    with np.load(FASHION_MINI, allow_pickle=False) as arrays:
        train, test = ((arrays[f"{p}_images"], arrays[f"{p}_labels"]) for p in ("train", "test"))
    return train, test
