"""Decode every image of a folder before a long run: `python scripts/check_images.py DIR`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util.cli.parser import Parser
from util.console import print_line, progress_bar
from util.data.image_files import open_image
from util.data.image_folder import list_classes, list_images
from util.errors import DataError

SPLITS = ("train", "test", "val")


def main(argv: Sequence[str] | None = None) -> None:
    """Print a line for each fault of DIR/{train,test,val}/CLASS/*; exit with 1 if there is one."""
    parser = Parser("check_images.py", __doc__)
    text = "holds train/CLASS/* and test/CLASS/* (or val)"
    parser.add_argument("folder", metavar="DIR", help=text)
    root = Path(parser.parse_args(argv).folder).expanduser()
    splits = [root / name for name in SPLITS if (root / name).is_dir()]
    if not splits:
        parser.error(f"no folder {root}/train, {root}/test or {root}/val")
    classes = {split: list_classes(split) for split in splits}
    folders = [split / name for split in splits for name in classes[split]]
    files = {folder: list_images(folder) for folder in folders}
    faults = [*find_differences(classes)]
    faults += [f"{folder}: no images" for folder in folders if not files[folder]]
    paths = [path for folder in folders for path in files[folder]]
    faults += find_bad_images(paths)
    for fault in faults:
        print_line(fault)
    print_line(f"{len(paths)} images in {len(folders)} class folders, {len(faults)} faults")
    sys.exit(1 if faults else 0)


def find_differences(classes: dict[Path, list[str]]) -> Iterator[str]:
    """Yield a line for each class missing in a split, and for each split with fewer than two."""
    known = sorted(set().union(*classes.values()))
    for split, names in classes.items():
        yield from (f"{split / name}: missing" for name in known if name not in names)
        if len(names) < 2:
            yield f"{split}: {len(names)} class folders, at least two are needed"


def find_bad_images(paths: Sequence[str]) -> list[str]:
    """Decode all images as a run does; return a line for each bad one, in order."""
    with ThreadPool(os.cpu_count()) as pool:
        faults = progress_bar(pool.imap(_find_fault, paths, 16), "decoding", total=len(paths))
        return [fault for fault in faults if fault]


def _find_fault(path: str) -> str | None:
    """Return the message of the error, None for a sound image."""
    try:
        open_image(path)
    except DataError as error:
        return str(error)
    return None


if __name__ == "__main__":
    main()
