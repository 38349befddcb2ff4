"""Table of datasets; loaders of a dataset by name."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from torchvision.datasets import CIFAR10, CIFAR100, MNIST, STL10, SVHN, FashionMNIST

from util.data.augment import Augmentation
from util.data.embedded_sets import DIGIT_NAMES, EmbeddedSet, read_digits, read_fashion_mini
from util.data.holdout import build_train_loader
from util.data.image_files import grey_levels
from util.data.image_folder import load_folder
from util.data.images import DataSpec
from util.data.loader import ImageLoader, LoaderOptions
from util.data.torchvision_sets import STL10_NAMES, TorchvisionSet

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
        CIFAR10, CROP_AND_FLIP, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)
    ),
    "cifar100": TorchvisionSet(
        CIFAR100, CROP_AND_FLIP, mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762)
    ),
    "mnist": TorchvisionSet(MNIST, mean=(0.1307,), std=(0.3081,)),
    "fashion": TorchvisionSet(FashionMNIST, FLIP, mean=(0.2860,), std=(0.3530,)),
    "svhn": TorchvisionSet(
        SVHN, CROP, DIGIT_NAMES, mean=(0.4377, 0.4438, 0.4728), std=(0.1980, 0.2010, 0.1970)
    ),
    "stl10": TorchvisionSet(
        STL10,
        CROP_AND_FLIP,
        STL10_NAMES,
        mean=(0.4467, 0.4398, 0.4066),
        std=(0.2603, 0.2566, 0.2713),
    ),
    "digits": EmbeddedSet(read_digits, DIGIT_NAMES),
    "fashion-mini": EmbeddedSet(read_fashion_mini, tuple(FashionMNIST.classes), FLIP),
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
    options: LoaderOptions,
    *,
    cache_dir: str | os.PathLike[str],
    mirror: str | None = None,
    image_cache: str | os.PathLike[str] | None = None,
) -> tuple[DataSpec, ImageLoader, ImageLoader]:
    """Return the description of a dataset, its training loader and its test loader.

    Args:
        dataset: a name in DATASETS.
        root: folder of the files, also of downloaded ones. Embedded datasets ignore it.
        options: see LoaderOptions. Bad images can be skipped in `folder` only.
        cache_dir: folder for the channel statistics of `folder`. Rank 0 writes them.
        mirror: address of a folder that holds the archives under their published names. None means
            the published addresses.
        image_cache: folder for the decoded images of `folder`. None decodes them at each start.

    Raises:
        ValueError: an unknown dataset, or "skip" without image files.
        DataError: data that is missing, damaged or inconsistent.
    """
    if dataset not in DATASETS:
        raise ValueError(f"unknown dataset {dataset!r}: choose from {', '.join(DATASETS)}")
    entry = DATASETS[dataset]
    if options.skip_bad_images and not isinstance(entry, FolderSet):
        raise ValueError(f"on_bad_image 'skip' needs image files, and {dataset} has none")
    root = Path(root).expanduser()
    if isinstance(entry, TorchvisionSet):
        spec, train, test = entry.load(dataset, root, options.image_size, mirror)
    elif isinstance(entry, EmbeddedSet):
        spec, train, test = entry.load(dataset, options.image_size)
    else:
        spec, train, test = load_folder(
            root, options, Path(cache_dir), image_cache and Path(image_cache)
        )
    augmentation = replace(entry.augmentation, fill=grey_levels(spec.mean))
    train_loader = build_train_loader(spec, train, options, augmentation=augmentation)
    return spec, train_loader, ImageLoader(spec, test, options, train=False)
