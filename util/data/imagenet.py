"""ImageNet and folders like it, DIR/train/<class>/* and DIR/val/<class>/*; or as much noise."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import numpy as np
import torch

from util.data.augment import Augmentation
from util.data.image_files import ImageFiles, View, centre_crop, random_crop
from util.data.image_folder import Listing, require_same_classes, scan_split
from util.data.images import DataSpec, Pixels, Split
from util.data.loader import ImageLoader, check_arguments
from util.data.sampler import random_words

IMAGE_SIZE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's training images
TRAIN_SIZE, TEST_SIZE, CLASSES = 1_281_167, 50_000, 1000  # of ImageNet
POOL = 64  # different images of noise: as many as a test of speed needs, 10 MB at 224 pixels


def build_imagenet_loaders(
    root: str | os.PathLike[str],
    *,
    batch_size: int,
    num_workers: int = 0,
    seed: int = 0,
    image_size: int = IMAGE_SIZE,
    device_type: str = "cpu",
    on_bad_image: str = "error",
    test_only: bool = False,
    rank: int = 0,
    processes: int = 1,
) -> tuple[DataSpec, ImageLoader | None, ImageLoader]:
    """Find the images below `root`, and wrap training and test split in loaders.

    Images are decoded when a batch needs them. To train: a random box of 8 to 100 % of the area,
    resized, mirrored half of the time. To test: the shorter side is made 256/224 of image_size, and
    the middle cut out. Channels are normalised by the published statistics of ImageNet.

    Args:
        root: the folder that holds train/ and val/ (or test/; with both, val/ is used).
        batch_size, num_workers, seed, device_type, rank, processes: see ImageLoader.
        image_size: side in pixels, at least 32.
        on_bad_image: "error" stops at a image that cannot be decoded; "skip" makes the batch
            smaller by it and names it in `ImageLoader.skipped`.
        test_only: leave train/ alone, which need not be there, and return None for its loader.

    Raises:
        ValueError: a number out of range.
        DataError: a missing or empty folder, classes that differ; out of a loader, a bad image.
    """
    check_arguments(batch_size, num_workers, image_size, on_bad_image)
    root = Path(root).expanduser()
    found = scan_split(root, "val", "test")
    spec = DataSpec("imagenet", 3, image_size, tuple(found.classes), MEAN, STD)

    def split(found: Listing, view: View) -> Split:
        files = ImageFiles(found.paths, image_size, view, skip=on_bad_image == "skip")
        return Split(files, torch.tensor(found.targets))

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
    test = loader(split(found, centre_crop), train=False)
    if test_only:
        return spec, None, test
    to_learn = scan_split(root, "train")
    require_same_classes(to_learn, found)
    images = split(to_learn, partial(random_crop, seed=seed))
    return spec, loader(images, train=True, augmentation=Augmentation(flip=True)), test


def build_dummy_loaders(
    *,
    batch_size: int,
    num_workers: int = 0,
    seed: int = 0,
    image_size: int = IMAGE_SIZE,
    device_type: str = "cpu",
    train_size: int = TRAIN_SIZE,
    test_size: int = TEST_SIZE,
    rank: int = 0,
    processes: int = 1,
) -> tuple[DataSpec, ImageLoader, ImageLoader]:
    """Loaders like ImageNet's, but of noise: for timing without data.

    A image and its target depend on (seed, index) alone; there are only POOL different images.
    What is left to do, copying and normalising, takes half a millisecond for a image.

    Args:
        batch_size, num_workers, seed, device_type, rank, processes: see ImageLoader.
        image_size: side in pixels, at least 32.
        train_size, test_size: images.

    Raises:
        ValueError: a number out of range.
    """
    check_arguments(batch_size, num_workers, image_size)
    classes = tuple(f"class {i}" for i in range(CLASSES))
    loader = partial(
        ImageLoader,
        spec := DataSpec("dummy", 3, image_size, classes, MEAN, STD),
        batch_size=batch_size,
        num_workers=num_workers,
        seed=seed,
        device_type=device_type,
        rank=rank,
        processes=processes,
    )
    train, test = (Noise(size, image_size, seed).split() for size in (train_size, test_size))
    return spec, loader(train, train=True), loader(test, train=False)


class Noise:
    """A source of `size` square images of uniform noise, each by (seed, index) alone."""

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
        """The images with targets by chance."""
        words = random_words(self.seed, 0, np.arange(self.size), 0) % np.uint64(CLASSES)
        return Split(self, torch.from_numpy(words.astype(np.int64)))
