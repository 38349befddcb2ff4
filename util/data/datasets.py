"""Data sets by name: the loaders that a training run iterates, and what to know about them."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path

from util.data.augment import Augmentation
from util.data.image_folder import load_folder
from util.data.images import DataSpec
from util.data.loader import SMALLEST, ImageLoader, check_arguments
from util.data.torchvision_sets import STANDARD_SETS, load_digits, load_standard
from util.errors import DataError

__all__ = ["DATASETS", "SMALLEST", "DataError", "DataSpec", "build_loaders"]

DATASETS = (*STANDARD_SETS, "digits", "folder")

# As published but for the colour of the border, see Augmentation. A digit is never mirrored: its
# mirror image is another symbol, or none.
CROP_AND_FLIP = Augmentation(pad=4, flip=True)
AUGMENTATIONS = {
    "cifar10": CROP_AND_FLIP,
    "cifar100": CROP_AND_FLIP,
    "stl10": CROP_AND_FLIP,
    "folder": CROP_AND_FLIP,
    "svhn": Augmentation(pad=4),
    "fashion": Augmentation(flip=True),
}


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
    on_bad_image: str = "error",
    mirror: str | None = None,
    rank: int = 0,
    processes: int = 1,
) -> tuple[DataSpec, ImageLoader, ImageLoader]:
    """Read a data set and wrap its training and its test split in loaders.

    Args:
        dataset: one of DATASETS.
        root: where the files are, or go when downloaded; `digits` needs none.
        batch_size, num_workers, seed, device_type, rank, processes: see ImageLoader.
        image_size: side in pixels, at least 32; None means 32 (stl10 is 96 by nature).
        cache_dir: folder for the channel statistics of `folder`, which process 0 writes.
        on_bad_image: "error" stops at a image that cannot be decoded; "skip" makes the batch
            smaller by it and names it in `ImageLoader.skipped`, which `folder` alone can do.
        mirror: the address of a folder that holds the archives that would be downloaded, by their
            published names, in place of the published address.

    Raises:
        ValueError: an unknown dataset, a number out of range, or what the dataset cannot do.
        DataError: data that is missing, damaged or inconsistent.
    """
    image_size = SMALLEST if image_size is None else image_size
    if dataset not in DATASETS:
        raise ValueError(f"unknown dataset {dataset!r}: choose from {', '.join(DATASETS)}")
    check_arguments(batch_size, num_workers, image_size, on_bad_image)
    if on_bad_image == "skip" and dataset != "folder":
        raise ValueError(f"on_bad_image 'skip' needs image files, and {dataset} has none")
    root = Path(root).expanduser()
    if dataset == "folder":
        spec, train, test = load_folder(
            root,
            image_size,
            Path(cache_dir),
            threads=max(1, num_workers),
            skip=on_bad_image == "skip",
            writes=rank == 0,
        )
    elif dataset == "digits":
        spec, train, test = load_digits(image_size)
    else:
        spec, train, test = load_standard(dataset, root, image_size, mirror)
    loader = partial(
        ImageLoader,
        spec,
        batch_size=batch_size,
        num_workers=num_workers,
        seed=seed,
        device_type=device_type,
        rank=rank,
        processes=processes,
    )
    border = tuple(round(255 * mean) for mean in spec.mean)
    augmentation = replace(AUGMENTATIONS.get(dataset, Augmentation()), fill=border)
    return spec, loader(train, train=True, augmentation=augmentation), loader(test, train=False)
