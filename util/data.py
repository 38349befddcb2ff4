"""Data sets by name: the loaders that a training run iterates, and what to know about them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar

import torch
from torch.utils.data import DataLoader

from .augment import Augmentation
from .folder import load_folder
from .pictures import DataError, DataSpec, PictureSet, Split
from .sampling import EpochSampler
from .standard_sets import STANDARD_SETS, load_digits, load_standard

__all__ = ["DATASETS", "SMALLEST", "DataError", "DataSpec", "build_loaders"]

SMALLEST = 32  # pixels, the side of the smallest picture that the networks take, and the default
DATASETS = (*STANDARD_SETS, "digits", "folder")

# As published. A digit is never mirrored: its mirror image is another symbol, or none.
CROP_AND_FLIP = Augmentation(pad=4, flip=True)
AUGMENTATIONS = {
    "cifar10": CROP_AND_FLIP,
    "cifar100": CROP_AND_FLIP,
    "stl10": CROP_AND_FLIP,
    "folder": CROP_AND_FLIP,
    "fashion": Augmentation(flip=True),
}

T = TypeVar("T")


def build_loaders(
    dataset: str,
    root: str | os.PathLike[str],
    *,
    batch_size: int,
    num_workers: int = 0,
    seed: int = 0,
    image_size: int | None = None,
    cache_dir: str | os.PathLike[str],
    device_type: str = "cpu",
) -> tuple[DataSpec, DataLoader, DataLoader]:
    """Read a data set and wrap both its splits in loaders.

    Batches are (images (N, C, H, W) float32 normalised, targets (N,) int64); the last one may be
    smaller. Call `train_loader.sampler.set_epoch(epoch)` before each epoch: the order depends on
    (seed, epoch) alone, the augmentation of a picture on (seed, epoch, index) alone, whatever the
    workers and whatever else draws random numbers. The test loader keeps the order of the data set
    and augments nothing.

    Args:
        dataset: one of DATASETS.
        root: where the files are, or go when downloaded; `digits` needs none.
        num_workers: processes that prepare batches; 0 prepares them in the calling one.
        image_size: side in pixels, at least 32; None means 32 (stl10 is 96 by nature).
        cache_dir: folder for the channel statistics of `folder`.
        device_type: "cuda" gives pinned memory.

    Raises:
        ValueError: an unknown dataset, or a number out of range.
        DataError: data that is missing, damaged or inconsistent.
    """
    image_size = SMALLEST if image_size is None else image_size
    check_arguments(dataset, batch_size, num_workers, image_size)
    spec, train, test = load(dataset, Path(root), image_size, Path(cache_dir), num_workers)

    def loader(split: Split, *, train: bool) -> DataLoader:
        augmentation = AUGMENTATIONS.get(dataset) if train else None
        return DataLoader(
            PictureSet(spec, split, seed=seed, augmentation=augmentation),
            batch_size=batch_size,
            sampler=EpochSampler(
                len(split.targets), batch_size=batch_size, seed=seed, shuffle=train
            ),
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            collate_fn=as_is,
            pin_memory=device_type == "cuda",
            generator=torch.Generator(),  # else each epoch would draw from the global one
        )

    return spec, loader(train, train=True), loader(test, train=False)


def check_arguments(dataset: str, batch_size: int, num_workers: int, image_size: int) -> None:
    """Refuse by name what no data set can serve, before any file is touched."""
    if dataset not in DATASETS:
        raise ValueError(f"unknown dataset {dataset!r}: choose from {', '.join(DATASETS)}")
    if image_size < SMALLEST:
        raise ValueError(f"image_size must be at least {SMALLEST} pixels, got {image_size}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if num_workers < 0:
        raise ValueError(f"num_workers must be at least 0, got {num_workers}")


def load(
    dataset: str, root: Path, image_size: int, cache_dir: Path, num_workers: int
) -> tuple[DataSpec, Split, Split]:
    """Specification, training and test split of a data set."""
    if dataset == "digits":
        return load_digits(image_size)
    if dataset == "folder":
        return load_folder(root.expanduser(), image_size, cache_dir, threads=max(1, num_workers))
    return load_standard(dataset, root.expanduser(), image_size)


def as_is(batch: T) -> T:
    """Collate nothing: the set hands over finished batches. Named, so that it pickles."""
    return batch
