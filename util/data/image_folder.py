"""Folders of images: DIR/train/CLASS/* and DIR/test/CLASS/* (or DIR/val/CLASS/*)."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torchvision.datasets.folder import IMG_EXTENSIONS

from util.data.image_files import ImageFiles, Transform
from util.data.images import DataSpec, Split, Statistics, channel_statistics, load_into_memory
from util.data.loader import LoaderOptions
from util.data.preprocessing import describe_preprocessing
from util.errors import DataError
from util.files import atomic_write


@dataclass(frozen=True)
class Listing:
    """Image files of a split in order, with their targets (positions in `classes`)."""

    root: Path
    classes: list[str]
    paths: list[str]
    targets: list[int]


def load_folder(
    root: Path, options: LoaderOptions, cache_dir: Path
) -> tuple[DataSpec, Split, Split]:
    """Return the description and the splits of a folder; decode what fits the memory budget.

    The folder holds train/ and test/ (or val/; with both, test/ is used). Every image is converted
    to RGB and resized as a whole; its aspect may change. Rank 0 writes the channel statistics into
    `cache_dir`, where the next run reads them. As many threads as loader workers decode at once.

    Raises:
        DataError: a folder is missing or empty, or classes differ. Without "skip", an image cannot
            be decoded.
    """
    listings = list_splits(root, ("train",), ("test", "val"))
    image_size, threads = options.image_size, max(1, options.num_workers)
    preprocessing, splits = describe_preprocessing("folder", image_size), []
    for listing in listings:
        min_size = preprocessing.min_size
        source, targets = open_split(listing, options, preprocessing, min_size=min_size)
        splits.append(Split(load_into_memory(source, threads), targets))
    cache = cache_dir / f"channel-statistics-{digest_files(listings[0], image_size)}.json"
    statistics = read_statistics(cache)
    if not statistics:
        statistics = channel_statistics(splits[0].source, threads)
        if options.rank == 0:
            save_statistics(cache, statistics, folder=str(root), image_size=image_size)
    return DataSpec("folder", 3, image_size, tuple(listings[0].classes), *statistics), *splits


def open_split(
    listing: Listing, options: LoaderOptions, transform: Transform, *, min_size: int | None = None
) -> Split:
    """Return images that are decoded on access, and their targets; see ImageFiles."""
    # One array: reference counts of a million strings would copy the memory in every worker.
    paths = np.array([os.fsencode(path) for path in listing.paths])
    files = ImageFiles(paths, options.image_size, transform, options.skip_bad_images, min_size)
    return Split(files, torch.tensor(listing.targets))


def list_splits(root: Path, *splits: Sequence[str]) -> list[Listing]:
    """List the images of each split, in the first existing folder root/NAME of its names.

    Raises:
        DataError: a folder is missing or empty, or classes differ.
    """
    candidates = [[root / name for name in names] for names in splits]
    missing = [paths for paths in candidates if not any(path.is_dir() for path in paths)]
    if missing:
        wanted = " and no folder ".join(" or ".join(map(str, paths)) for paths in missing)
        advice = "expected images in CLASS folders inside; name the folder that holds train/"
        raise DataError(f"no folder {wanted}: {advice}")
    listings = [scan_split(next(filter(Path.is_dir, paths))) for paths in candidates]
    require_same_classes(listings[0], listings[-1])
    return listings


def scan_split(folder: Path) -> Listing:
    """List the images of a split; refuse fewer than two classes, and classes without images."""
    classes = list_classes(folder)
    if len(classes) < 2:
        found = ", ".join(classes) or "none"
        raise DataError(f"{folder}/CLASS/*: at least two class folders are needed, found {found}")
    files = [list_images(folder / name) for name in classes]
    empty = [str(folder / name) for name, paths in zip(classes, files, strict=True) if not paths]
    if empty:
        raise DataError(f"no images ({', '.join(IMG_EXTENSIONS)}) in {', '.join(empty)}")
    targets = [target for target, paths in enumerate(files) for _ in paths]
    return Listing(folder, classes, list(chain(*files)), targets)


def list_classes(folder: Path) -> list[str]:
    """Return the sorted names of the folders in `folder`, without hidden ones."""
    return sorted(e.name for e in os.scandir(folder) if e.is_dir() and e.name[0] != ".")


def list_images(folder: Path) -> list[str]:
    """Return the image files in and below `folder`, ordered by folder, then name.

    Hidden names are left out. Links to folders are not followed, because a link may lead in a
    circle or to another class.
    """
    paths = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name[0] != "."]  # `walk` descends into these
        images = [name for name in names if name.lower().endswith(IMG_EXTENSIONS)]
        paths += [os.path.join(parent, name) for name in images if name[0] != "."]
    return sorted(paths, key=os.path.split)


def require_same_classes(train: Listing, test: Listing) -> None:
    """Refuse splits of different classes, because their targets would differ."""
    differing = [
        f"only in {one.root}: {', '.join(extra)}"
        for one, other in ((train, test), (test, train))
        if (extra := sorted({*one.classes} - {*other.classes}))
    ]
    if differing:
        raise DataError(f"train and test folders have different classes: {'; '.join(differing)}")


def read_statistics(cache: Path) -> Statistics | None:
    """Return channel mean and deviation from a cache, None if it is missing or damaged."""
    try:
        saved = json.loads(cache.read_text())
        return tuple(saved["mean"]), tuple(saved["std"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def save_statistics(cache: Path, statistics: Statistics, **facts: str | int) -> None:
    """Write channel mean and deviation, with facts for the reader; warn of a failed write."""
    facts |= dict(zip(("mean", "std"), statistics, strict=True))
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(cache) as file:
            file.write(json.dumps(facts, indent=1).encode() + b"\n")
    except OSError as error:
        print(f"warning: the channel statistics could not be saved: {error}", file=sys.stderr)


def digest_files(listing: Listing, image_size: int) -> str:
    """Return 16 hexadecimal digits that change with the folder, the image size or any file."""
    digest = hashlib.sha256(os.fsencode(f"{Path(listing.root).resolve()}\n{image_size}\n"))
    for path in listing.paths:
        try:
            status = os.stat(path)
        except OSError as error:
            raise DataError(f"cannot read the image {path}: {error.strerror}") from None
        name = path.removeprefix(str(listing.root))
        digest.update(os.fsencode(f"{name}\n{status.st_size}\n{status.st_mtime_ns}\n"))
    return digest.hexdigest()[:16]
