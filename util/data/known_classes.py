"""Load test images from a folder for a trained network, whose classes are known."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from util.console import join_names, print_line
from util.data.image_files import grey_levels
from util.data.image_folder import (
    FolderScan,
    Listing,
    describe_unused,
    list_classes,
    normalize_name,
    open_split,
    scan_split,
)
from util.data.images import DataSpec
from util.data.loader import ImageLoader, LoaderOptions
from util.data.preprocessing import describe_preprocessing
from util.errors import DataError


def build_test_loader(
    spec: DataSpec, root: str | os.PathLike[str], options: LoaderOptions
) -> ImageLoader:
    """Return a loader of a folder's test images, with the targets and statistics of `spec`.

    The folder needs no training images, and not every class. A line names the missing classes.

    Args:
        spec: dataset that the network was trained on, "folder" or one like "imagenet".
        root: folder that holds test/ or val/, or the class folders themselves. With both, the one
            that training tests on is used.
        options: see LoaderOptions.

    Raises:
        DataError: there is no folder or image, or a class folder that the network does not know.
    """
    classes = [normalize_name(name) for name in spec.classes]  # earlier runs recorded any form
    splits = ("test", "val") if spec.name == "folder" else ("val", "test")
    scan = scan_split(find_classes(Path(root).expanduser(), splits, classes))
    listing = list_known_classes(scan, classes)
    for line in describe_unused([scan]):
        print_line(line)
    preprocessing = describe_preprocessing(spec.name, options.image_size)
    form = {"background": grey_levels(spec.mean), "min_size": preprocessing.min_size}
    split = open_split(listing, options, preprocessing, **form)
    return ImageLoader(spec, split, options, train=False)


def find_classes(root: Path, splits: Sequence[str], classes: Sequence[str]) -> Path:
    """Return the folder of the class folders: `root` itself, or else a folder of `splits` in it."""
    if not root.is_dir():
        raise DataError(f"no folder {root}: name a folder of test images")
    if {*list_classes(root)} <= {*classes}:
        return root
    return next(filter(Path.is_dir, (root / name for name in splits)), root)


def list_known_classes(scan: FolderScan, classes: Sequence[str]) -> Listing:
    """List the images of a folder; say which of `classes` have none.

    Raises:
        DataError: a class folder is not one of `classes`, or there is no image.
    """
    if foreign := [str(scan.root / name) for name in scan.images if name not in classes]:
        advice = f"it knows {join_names(classes)}; move the folders away"
        raise DataError(f"the network does not know the classes of {join_names(foreign)}: {advice}")
    files = [scan.images.get(name, []) for name in classes]
    missing = [name for name, paths in zip(classes, files, strict=True) if not paths]
    if len(missing) == len(classes):
        raise DataError(f"no images in {scan.root}/CLASS/*: CLASS is one of {join_names(classes)}")
    if missing:
        count = f"{len(missing)} of {len(classes)} classes"
        print_line(f"{scan.root}: no images of {count}: {join_names(missing)}")
    targets = [target for target, paths in enumerate(files) for _ in paths]
    return Listing(scan.root, [*classes], [*chain(*files)], targets)
