"""Loaders of ImageNet-like folders, DIR/train/CLASS/* and DIR/val/CLASS/*, and of noise."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from util.data.augment import Augmentation
from util.data.image_files import ImageFiles, Transform, centre_crop, random_crop
from util.data.image_folder import Listing, require_same_classes, scan_split
from util.data.images import DataSpec, Pixels, Split
from util.data.loader import ImageLoader, LoaderOptions, check_arguments
from util.data.sampler import random_words

if TYPE_CHECKING:
    from typing_extensions import Unpack

IMAGE_SIZE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the training images of ImageNet
TRAIN_SIZE, TEST_SIZE, CLASSES = 1_281_167, 50_000, 1000  # of ImageNet
POOL = 64  # different noise images, 10 MB at 224 pixels


def build_imagenet_loaders(
    root: str | os.PathLike[str],
    *,
    batch_size: int,
    image_size: int = IMAGE_SIZE,
    on_bad_image: str = "error",
    test_only: bool = False,
    **options: Unpack[LoaderOptions],
) -> tuple[DataSpec, ImageLoader | None, ImageLoader]:
    """Return the description of a folder of images, its training loader and its test loader.

    Images are decoded when a batch needs them. Training images: a random box of 8 to 100 % of the
    area, resized, flipped with probability 0.5. Test images: the shorter side resized to 256/224 of
    `image_size`, then a centre crop. ImageNet's published statistics normalise the channels.

    Args:
        root: folder that holds train/ and val/ (or test/; with both, val/ is used).
        batch_size: see ImageLoader.
        options: num_workers, seed, device_type, rank and processes of ImageLoader.
        image_size: side in pixels, at least 32.
        on_bad_image: "error" stops at an image that cannot be decoded. "skip" leaves the image out
            of its batch and names the file in `ImageLoader.skipped`.
        test_only: do not read train/; return None for the training loader.

    Raises:
        ValueError: a number out of range.
        DataError: a folder is missing or empty, or classes differ. A loader raises the error for a
            bad image.
    """
    check_arguments(image_size, on_bad_image, batch_size=batch_size, **options)
    root = Path(root).expanduser()
    test_listing = scan_split(root, "val", "test")
    spec = DataSpec("imagenet", 3, image_size, tuple(test_listing.classes), MEAN, STD)

    def make_split(listing: Listing, transform: Transform) -> Split:
        files = ImageFiles(listing.paths, image_size, transform, skip=on_bad_image == "skip")
        return Split(files, torch.tensor(listing.targets))

    loader = partial(ImageLoader, spec, batch_size=batch_size, **options)
    test = loader(make_split(test_listing, centre_crop), train=False)
    if test_only:
        return spec, None, test
    train_listing = scan_split(root, "train")
    require_same_classes(train_listing, test_listing)
    train = make_split(train_listing, partial(random_crop, seed=options.get("seed", 0)))
    return spec, loader(train, train=True, augmentation=Augmentation(flip=True)), test


def build_dummy_loaders(
    *,
    batch_size: int,
    image_size: int = IMAGE_SIZE,
    train_size: int = TRAIN_SIZE,
    test_size: int = TEST_SIZE,
    **options: Unpack[LoaderOptions],
) -> tuple[DataSpec, ImageLoader, ImageLoader]:
    """Return loaders of noise in the shape of ImageNet, for timing without data.

    An image and its target depend on (seed, index) alone. There are POOL different images.

    Args:
        batch_size: see ImageLoader.
        options: num_workers, seed, device_type, rank and processes of ImageLoader.
        image_size: side in pixels, at least 32.
        train_size: number of training images.
        test_size: number of test images.

    Raises:
        ValueError: a number out of range.
    """
    check_arguments(image_size, batch_size=batch_size, **options)
    classes = tuple(f"class {i}" for i in range(CLASSES))
    spec = DataSpec("dummy", 3, image_size, classes, MEAN, STD)
    loader = partial(ImageLoader, spec, batch_size=batch_size, **options)
    seed = options.get("seed", 0)
    train, test = (Noise(size, image_size, seed).split() for size in (train_size, test_size))
    return spec, loader(train, train=True), loader(test, train=False)


class Noise:
    """Source of `size` square images of uniform noise, each a function of (seed, index) alone."""

    def __init__(self, size: int, image_size: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        shape = (POOL, 3, image_size, image_size)
        self.pool = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        self.size, self.seed = size, seed

    def __len__(self) -> int:
        return self.size

    def read(self, epoch: np.ndarray, index: np.ndarray) -> Pixels:
        return Pixels(self.pool[torch.from_numpy(index % POOL)], {})

    def split(self) -> Split:
        """Return the images with random targets."""
        words = random_words(self.seed, 0, np.arange(self.size), 0) % np.uint64(CLASSES)
        return Split(self, torch.from_numpy(words.astype(np.int64)))
