"""Table of datasets; loaders of a dataset by name."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from torchvision import datasets as published

from util.data import MIN_IMAGE_SIZE
from util.data.augment import Augmentation
from util.data.embedded_sets import DIGIT_NAMES, EmbeddedSet, read_digits, read_fashion_mini
from util.data.image_folder import load_folder
from util.data.images import DataSpec
from util.data.loader import ImageLoader, LoaderOptions, check_arguments
from util.data.torchvision_sets import STL10_NAMES, TorchvisionSet

if TYPE_CHECKING:
    from typing_extensions import Unpack

# The augmentations are the published ones, except for the grey level of the border.
CROP = Augmentation(pad=4)
FLIP = Augmentation(flip=True)
CROP_AND_FLIP = Augmentation(pad=4, flip=True)


@dataclass(frozen=True)
class FolderSet:
    """Image files in DIR/train/CLASS and DIR/test/CLASS."""

    augmentation: Augmentation = CROP_AND_FLIP


DATASETS: dict[str, TorchvisionSet | EmbeddedSet | FolderSet] = {
    "cifar10": TorchvisionSet(
        published.CIFAR10,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        augmentation=CROP_AND_FLIP,
    ),
    "cifar100": TorchvisionSet(
        published.CIFAR100,
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        augmentation=CROP_AND_FLIP,
    ),
    "mnist": TorchvisionSet(published.MNIST, mean=(0.1307,), std=(0.3081,)),
    "fashion": TorchvisionSet(
        published.FashionMNIST, mean=(0.2860,), std=(0.3530,), augmentation=FLIP
    ),
    "svhn": TorchvisionSet(
        published.SVHN,
        mean=(0.4377, 0.4438, 0.4728),
        std=(0.1980, 0.2010, 0.1970),
        classes=DIGIT_NAMES,
        augmentation=CROP,
    ),
    "stl10": TorchvisionSet(
        published.STL10,
        mean=(0.4467, 0.4398, 0.4066),
        std=(0.2603, 0.2566, 0.2713),
        classes=STL10_NAMES,
        augmentation=CROP_AND_FLIP,
    ),
    "digits": EmbeddedSet(read_digits, DIGIT_NAMES),
    "fashion-mini": EmbeddedSet(read_fashion_mini, tuple(published.FashionMNIST.classes), FLIP),
    "folder": FolderSet(),
}


def is_embedded(dataset: str | None) -> bool:
    """Return True for a dataset that needs no folder, so that `--data` does not apply."""
    return isinstance(DATASETS.get(dataset), EmbeddedSet)


def is_downloaded(dataset: str | None) -> bool:
    """Return True for a dataset that is downloaded when missing."""
    return isinstance(DATASETS.get(dataset), TorchvisionSet)


def build_loaders(
    dataset: str,
    root: str | os.PathLike[str],
    *,
    batch_size: int,
    image_size: int | None = None,
    cache_dir: str | os.PathLike[str],
    on_bad_image: str = "error",
    mirror: str | None = None,
    **options: Unpack[LoaderOptions],
) -> tuple[DataSpec, ImageLoader, ImageLoader]:
    """Return the description of a dataset, its training loader and its test loader.

    Args:
        dataset: a name in DATASETS.
        root: folder of the files, also of downloaded ones. Embedded datasets ignore it.
        batch_size: see ImageLoader.
        options: num_workers, seed, device_type, rank and processes of ImageLoader.
        image_size: side in pixels, at least 32. None means 32.
        cache_dir: folder for the channel statistics of `folder`. Rank 0 writes them.
        on_bad_image: "error" stops at an image that cannot be decoded. "skip" leaves the image out
            of its batch and names the file in `ImageLoader.skipped`; it needs `folder`.
        mirror: address of a folder that holds the archives under their published names. None means
            the published addresses.

    Raises:
        ValueError: an unknown dataset, a number out of range, or "skip" without image files.
        DataError: data that is missing, damaged or inconsistent.
    """
    image_size = MIN_IMAGE_SIZE if image_size is None else image_size
    if dataset not in DATASETS:
        raise ValueError(f"unknown dataset {dataset!r}: choose from {', '.join(DATASETS)}")
    entry = DATASETS[dataset]
    check_arguments(image_size, on_bad_image, batch_size=batch_size, **options)
    if on_bad_image == "skip" and not isinstance(entry, FolderSet):
        raise ValueError(f"on_bad_image 'skip' needs image files, and {dataset} has none")
    root = Path(root).expanduser()
    if isinstance(entry, TorchvisionSet):
        spec, train, test = entry.load(dataset, root, image_size, mirror)
    elif isinstance(entry, EmbeddedSet):
        spec, train, test = entry.load(dataset, image_size)
    else:
        spec, train, test = load_folder(
            root,
            image_size,
            Path(cache_dir),
            threads=max(1, options.get("num_workers", 0)),
            skip=on_bad_image == "skip",
            writes=options.get("rank", 0) == 0,
        )
    loader = partial(ImageLoader, spec, batch_size=batch_size, **options)
    border = tuple(round(255 * mean) for mean in spec.mean)
    augmentation = replace(entry.augmentation, fill=border)
    return spec, loader(train, train=True, augmentation=augmentation), loader(test, train=False)
