"""Folders of images: DIR/train/CLASS/* and DIR/test/CLASS/* (or DIR/val/CLASS/*)."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
import PIL
import torch

from util.console import print_line
from util.data.folder_cache import ImageCache, digest_files, read_statistics, save_statistics
from util.data.image_files import Colour, ImageFiles, Transform, grey_levels, readable_endings
from util.data.images import DataSpec, Split, channel_statistics, load_into_memory
from util.data.loader import LoaderOptions
from util.data.preprocessing import describe_preprocessing
from util.errors import DataError

DECODING = 2  # version of the conversion to RGB, part of the keys of caches
GREY = (128, 128, 128)  # behind transparent pixels until the mean is known
NO_CLASSES = {"@eaDir", "#recycle", "__MACOSX"}  # thumbnails, deleted files, attributes of files


@dataclass(frozen=True)
class Listing:
    """Image files of a split in order, with their targets (positions in `classes`)."""

    root: Path
    classes: list[str]
    paths: list[str]
    targets: list[int]


@dataclass(frozen=True)
class FolderScan:
    """Files of a split.

    Attributes:
        root: folder of the split.
        images: paths of the images by class, both in order. Names of classes are in the Unicode
            form NFC, whichever form the file system stores.
        unused: number of the other files, by ending.
    """

    root: Path
    images: dict[str, list[str]]
    unused: Counter[str]


def load_folder(
    root: Path, options: LoaderOptions, cache_dir: Path, image_cache: Path | None = None
) -> tuple[DataSpec, Split, Split]:
    """Return the description and the splits of a folder; decode what fits the memory budget.

    The folder holds train/ and test/ (or val/; with both, test/ is used). Every image is converted
    to RGB and resized as a whole; its aspect may change. Transparent pixels take the mean colour of
    the training images. Rank 0 writes the channel statistics into `cache_dir`, where the next run
    reads them. With `image_cache`, it also writes the decoded images into that folder, where the
    next run reads them if all files are unchanged. As many threads as loader workers decode at
    once.

    Raises:
        DataError: a folder is missing or empty, or classes differ. Without "skip", an image cannot
            be decoded.
    """
    listings = list_splits(root, ("train",), ("test", "val"))
    image_size, threads = options.image_size, max(1, options.num_workers)
    preprocessing = describe_preprocessing("folder", image_size)
    digest = digest_files(listings[0].root, listings[0].paths, DECODING, image_size)
    cache = cache_dir / f"channel-statistics-{digest}.json"
    statistics = read_statistics(cache)

    def load(listing: Listing, background: Colour) -> tuple[ImageFiles, Split]:
        form = {"background": background, "min_size": preprocessing.min_size}
        files, targets = open_split(listing, options, preprocessing, **form)
        if image_cache is None:
            return files, Split(load_into_memory(files, threads), targets)
        form = image_size, options.max_image_pixels
        key = digest_files(listing.root, listing.paths, DECODING, PIL.__version__, *form)
        place = hashlib.sha256(os.fsencode(listing.root.resolve())).hexdigest()[:8]
        path = image_cache / f"{listing.root.name}-{image_size}-{place}.npz"
        return files, Split(ImageCache(path, key, options.rank == 0).load(files, threads), targets)

    files, train = load(listings[0], grey_levels(statistics[0]) if statistics else GREY)
    if not statistics:
        statistics = channel_statistics(train.source, threads)
        if files.transparent:
            mean = visible_mean(files, threads)
            _, train = load(listings[0], grey_levels(mean))
            statistics = mean, channel_statistics(train.source, threads)[1]
        if options.rank == 0:
            save_statistics(cache, statistics, folder=str(root), image_size=image_size)
    spec = DataSpec("folder", 3, image_size, tuple(listings[0].classes), *statistics)
    _, test = load(listings[1], grey_levels(spec.mean))
    return spec, train, test


def visible_mean(files: ImageFiles, threads: int) -> tuple[float, ...]:
    """Return the mean per channel over the visible parts of images, for pixels in [0, 1].

    Transparent pixels in this colour do not change the mean.
    """
    on_black, on_white = (
        channel_statistics(replace(files, background=(level,) * 3), threads)[0]
        for level in (0, 255)
    )
    # A visible share v of mean m has the mean v m on black and v m + (1 - v) on white.
    shares = [1 - (white - black) for black, white in zip(on_black, on_white, strict=True)]
    return tuple(
        black / max(share, black, 1e-6) for black, share in zip(on_black, shares, strict=True)
    )


def open_split(
    listing: Listing,
    options: LoaderOptions,
    transform: Transform,
    *,
    background: Colour,
    min_size: int | None = None,
) -> Split:
    """Return images that are decoded on access, and their targets; see ImageFiles."""
    # One array: reference counts of a million strings would copy the memory in every worker.
    paths = np.array([os.fsencode(path) for path in listing.paths])
    files = ImageFiles(
        paths,
        options.image_size,
        transform,
        options.skip_bad_images,
        min_size,
        background=background,
        max_pixels=options.max_image_pixels,
    )
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
    scans = [scan_split(next(filter(Path.is_dir, paths))) for paths in candidates]
    listings = list(map(list_split, scans))
    require_same_classes(listings[0], listings[-1])
    for line in describe_unused(scans):
        print_line(line)
    return listings


def list_split(scan: FolderScan) -> Listing:
    """List the images of a split; refuse fewer than two classes, and classes without images."""
    classes = list(scan.images)
    if len(classes) < 2:
        found = ", ".join(classes) or "none"
        raise DataError(
            f"{scan.root}/CLASS/*: at least two class folders are needed, found {found}"
        )
    if empty := [str(scan.root / name) for name, paths in scan.images.items() if not paths]:
        raise DataError(f"no images ({', '.join(readable_endings())}) in {', '.join(empty)}")
    targets = [target for target, name in enumerate(classes) for _ in scan.images[name]]
    return Listing(scan.root, classes, list(chain(*scan.images.values())), targets)


def scan_split(root: Path) -> FolderScan:
    """Find the images of each class of a split, and count the other files.

    Hidden folders, thumbnails and folders of systems are no classes.

    Raises:
        DataError: two folders have names that are equal in the form NFC.
    """
    folders, unused = {}, Counter()
    for entry in os.scandir(root):
        if entry.is_dir():
            folders.setdefault(normalize_name(entry.name), []).append(entry.name)
        else:
            unused["outside of the class folders"] += 1
    if twins := [name for name, found in folders.items() if len(found) > 1]:
        raise DataError(f"{root / twins[0]}: two folders have this name; rename one of them")
    images = {}
    for name in sorted(folders):
        paths, others = list_images(root, *folders[name])
        unused += others
        if not is_hidden(name):
            images[name] = paths
    return FolderScan(root, images, unused)


def list_classes(root: Path) -> list[str]:
    """Return the names of the class folders of a split in order, without looking into them."""
    names = [entry.name for entry in os.scandir(root) if entry.is_dir()]
    return sorted(normalize_name(name) for name in names if not is_hidden(name))


def normalize_name(name: str) -> str:
    """Return the name of a class in the Unicode form NFC."""
    return unicodedata.normalize("NFC", name)


def is_hidden(name: str) -> bool:
    """Return True for a hidden file or folder, and for folders that systems add."""
    return name.startswith(".") or name in NO_CLASSES


def list_images(root: Path, name: str) -> tuple[list[str], Counter[str]]:
    """Return the images of a class of the split `root`, and the number of other files by ending.

    Images in folders below are included, ordered by folder, then name. Hidden names are left out.
    Links to folders are not followed, because a link may lead in a circle or to another class.
    """
    images, others = [], Counter()
    for parent, folders, files in os.walk(root / name):
        others["links to folders"] += sum(os.path.islink(os.path.join(parent, f)) for f in folders)
        in_hidden = any(map(is_hidden, Path(parent).relative_to(root).parts))
        for file in files:
            if in_hidden or is_hidden(file):
                others["hidden"] += 1
            elif file.lower().endswith(readable_endings()):
                images.append(os.path.join(parent, file))
            else:
                others[os.path.splitext(file)[1].lower() or "without an ending"] += 1
    return sorted(images, key=os.path.split), +others


def describe_unused(scans: Sequence[FolderScan]) -> Iterator[str]:
    """Yield one line that counts the files which are no images, by ending, if there are any."""
    unused = sum((scan.unused for scan in scans), Counter())
    if unused:
        counts = ", ".join(f"{count} {ending}" for ending, count in unused.most_common())
        yield f"not used: {counts}, in {' and '.join(str(scan.root) for scan in scans)}"


def require_same_classes(train: Listing, test: Listing) -> None:
    """Refuse splits of different classes, because their targets would differ."""
    differing = [
        f"only in {one.root}: {', '.join(extra)}"
        for one, other in ((train, test), (test, train))
        if (extra := sorted({*one.classes} - {*other.classes}))
    ]
    if differing:
        reason = f"train and test folders have different classes: {'; '.join(differing)}"
        raise DataError(f"{reason}; give each class images in both, or move its folder elsewhere")
