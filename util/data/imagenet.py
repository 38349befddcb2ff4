"""Loaders of ImageNet-like folders, DIR/train/CLASS/* and DIR/val/CLASS/*, and of noise."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import numpy as np
import torch

from util.data.augment import Augmentation
from util.data.holdout import build_train_loader
from util.data.image_files import grey_levels, random_crop
from util.data.image_folder import list_splits, open_split
from util.data.images import DataSpec, Pixels, Split
from util.data.loader import ImageLoader, LoaderOptions
from util.data.preprocessing import describe_preprocessing
from util.data.sampler import random_words

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the training images of ImageNet
TRAIN_SIZE, TEST_SIZE, CLASSES = 1_281_167, 50_000, 1000  # of ImageNet
POOL = 64  # different noise images, 10 MB at 224 pixels


def build_imagenet_loaders(
    root: str | os.PathLike[str], options: LoaderOptions, *, test_only: bool = False
) -> tuple[DataSpec, ImageLoader | None, ImageLoader]:
    """Return the description of a folder of images, its training loader and its test loader.

    Images are decoded when a batch needs them. Training images: a random box of 8 to 100 % of the
    area, resized, flipped with probability 0.5. Test images: the shorter side resized to 256/224 of
    the image size, then a centre crop. ImageNet's published statistics normalise the channels;
    transparent pixels take its mean colour.

    Args:
        root: folder that holds train/ and val/ (or test/; with both, val/ is used).
        options: see LoaderOptions.
        test_only: True ignores train/ and returns None for the training loader.

    Raises:
        DataError: a folder is missing or empty, or classes differ. A loader raises the error for a
            bad image.
    """
    root = Path(root).expanduser()
    splits = [("val", "test")] if test_only else [("train",), ("val", "test")]
    *train_listings, test_listing = list_splits(root, *splits)
    spec = DataSpec("imagenet", 3, options.image_size, tuple(test_listing.classes), MEAN, STD)
    background, preprocessing = (
        grey_levels(MEAN),
        describe_preprocessing(spec.name, spec.image_size),
    )
    split = open_split(test_listing, options, preprocessing, background=background)
    test = ImageLoader(spec, split, options, train=False)
    if test_only:
        return spec, None, test
    crop = partial(random_crop, image_size=options.image_size, seed=options.seed)
    split, plain = (
        open_split(train_listings[0], options, transform, background=background)
        for transform in (crop, preprocessing)
    )
    form = {"augmentation": Augmentation(flip=True), "plain": plain.source}
    return spec, build_train_loader(spec, split, options, **form), test


def build_dummy_loaders(
    options: LoaderOptions, *, train_size: int = TRAIN_SIZE, test_size: int = TEST_SIZE
) -> tuple[DataSpec, ImageLoader, ImageLoader]:
    """Return loaders of noise in the shape of ImageNet, for timing without data.

    An image and its target depend on (seed, index) alone. There are POOL different images.
    """
    classes = tuple(f"class {i}" for i in range(CLASSES))
    spec = DataSpec("dummy", 3, options.image_size, classes, MEAN, STD)
    train, test = (
        Noise(size, options.image_size, options.seed).split() for size in (train_size, test_size)
    )
    train_loader = ImageLoader(spec, train, options, train=True)
    return spec, train_loader, ImageLoader(spec, test, options, train=False)


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
