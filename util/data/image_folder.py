"""Any folder of images: DIR/train/<class>/* and DIR/test/<class>/* (or DIR/val/<class>/*)."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torchvision.datasets.folder import IMG_EXTENSIONS

from util.data.image_files import ImageFiles, whole_image
from util.data.images import DataSpec, Source, Split, channel_statistics, hold_in_memory
from util.errors import DataError
from util.files import atomic_write

Statistics = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True)
class Listing:
    """The image files of a split, in order, and for each the position of its class."""

    root: Path
    classes: list[str]
    paths: list[str]
    targets: list[int]


def load_folder(
    root: Path,
    image_size: int,
    cache_dir: Path,
    *,
    threads: int = 1,
    skip: bool = False,
    writes: bool = True,
) -> tuple[DataSpec, Split, Split]:
    """Find, check and (within the memory budget) decode the images of both splits.

    Every image is made RGB and resized as a whole: nothing is cut off, its aspect is not kept.

    Args:
        root: the folder that holds train/ and test/ (or val/; with both, test/ is used).
        cache_dir: gets the channel statistics, as JSON, so that the next run need not compute them.
        threads: that decode at once.
        skip: whether images that cannot be decoded are left out.
        writes: whether this process is the one that writes to cache_dir.

    Raises:
        DataError: a missing or empty folder, differing classes, and unless `skip` a image that
            cannot be decoded.
    """
    train, test = scan_split(root, "train"), scan_split(root, "test", "val")
    require_same_classes(train, test)

    def read(found: Listing) -> Split:
        files = ImageFiles(found.paths, image_size, whole_image, skip=skip, at_least=2 * image_size)
        return Split(hold_in_memory(files, threads), torch.tensor(found.targets))

    splits = read(train), read(test)
    statistics = cached_statistics(
        train, image_size, cache_dir, splits[0].source, threads=threads, writes=writes
    )
    return DataSpec("folder", 3, image_size, tuple(train.classes), *statistics), *splits


def scan_split(root: Path, *names: str) -> Listing:
    """List the images of the first folder root/<name> that exists; hidden names are left out.

    Raises:
        DataError: no such folder, fewer than two classes in it, or a class without a image.
    """
    folder = next((root / name for name in names if (root / name).is_dir()), None)
    if folder is None:
        wanted = " or ".join(str(root / name) for name in names)
        raise DataError(
            f"no folder {wanted}: images are expected in <class> folders inside it; the folder "
            f"to name is the one that holds train/"
        )
    classes = list_classes(folder)
    if not classes:
        raise DataError(f"{folder} has no class folders: expected {folder}/<class>/*")
    if len(classes) == 1:
        raise DataError(
            f"{folder} has one class only, {classes[0]}: there is nothing to tell apart"
        )
    files = [list_images(folder / name) for name in classes]
    empty = [str(folder / name) for name, paths in zip(classes, files, strict=True) if not paths]
    if empty:
        raise DataError(f"no images ({', '.join(IMG_EXTENSIONS)}) in {', '.join(empty)}")
    targets = [target for target, paths in enumerate(files) for _ in paths]
    return Listing(folder, classes, list(chain(*files)), targets)


def list_classes(folder: Path) -> list[str]:
    """The names of the folders in `folder`, in order; hidden ones are left out."""
    return sorted(e.name for e in os.scandir(folder) if e.is_dir() and e.name[0] != ".")


def list_images(folder: Path) -> list[str]:
    """Image files in `folder` and below, ordered by folder, then name; hidden ones are left out.

    Below `folder`, links to folders are not followed: they may lead in a circle, or to another
    class.
    """
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name[0] != "."]  # where `walk` goes on
        images = [name for name in names if name.lower().endswith(IMG_EXTENSIONS)]
        found += [os.path.join(parent, name) for name in images if name[0] != "."]
    return sorted(found, key=os.path.split)


def require_same_classes(train: Listing, test: Listing) -> None:
    """Targets are positions in the list of classes, so both splits need the same list."""
    differing = [
        f"only in {one.root}: {', '.join(sorted(set(one.classes) - set(other.classes)))}"
        for one, other in ((train, test), (test, train))
        if set(one.classes) - set(other.classes)
    ]
    if differing:
        raise DataError(f"train and test folders have different classes: {'; '.join(differing)}")


def cached_statistics(
    train: Listing,
    image_size: int,
    cache_dir: Path,
    source: Source,
    *,
    threads: int = 1,
    writes: bool = True,
) -> Statistics:
    """Channel mean and deviation of the training images, computed unless cache_dir has them.

    The file's name carries a digest of folder, image size and list of files (sizes and times too),
    so other images never meet these numbers. An unreadable cache is computed anew; one that
    cannot be written costs a line on stderr, no more.
    """
    cache = cache_dir / f"channel-statistics-{digest_files(train, image_size)}.json"
    try:
        saved = json.loads(cache.read_text())
        return tuple(saved["mean"]), tuple(saved["std"])
    except (OSError, ValueError, KeyError, TypeError):
        mean, std = channel_statistics(source, threads)
    if not writes:
        return mean, std
    about = {"folder": str(train.root), "image_size": image_size, "images": len(source)}
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with atomic_write(cache) as file:
            file.write(json.dumps({**about, "mean": mean, "std": std}, indent=1).encode() + b"\n")
    except OSError as error:
        print(f"warning: the channel statistics could not be kept: {error}", file=sys.stderr)
    return mean, std


def digest_files(found: Listing, image_size: int) -> str:
    """Sixteen hexadecimal digits that change with the folder, the image size or any file.

    Raises:
        DataError: naming a file that is listed but not there, as a broken link.
    """
    digest = hashlib.sha256(os.fsencode(f"{Path(found.root).resolve()}\n{image_size}\n"))
    for path in found.paths:
        try:
            status = os.stat(path)
        except OSError as error:
            raise DataError(f"cannot read the image {path}: {error.strerror}") from None
        name = path.removeprefix(str(found.root))
        digest.update(os.fsencode(f"{name}\n{status.st_size}\n{status.st_mtime_ns}\n"))
    return digest.hexdigest()[:16]
