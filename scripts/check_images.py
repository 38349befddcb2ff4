"""Look at every image of a data set before a long run does: `python -m util.verify DIR`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path

from util.console import print_line, progress_bar
from util.data.image_files import open_image
from util.data.image_folder import list_classes, list_images
from util.errors import DataError

SPLITS = ("train", "test", "val")


def main(argv: Sequence[str] | None = None) -> None:
    """Report what is wrong with DIR/{train,test,val}/CLASS/*, a line each.

    Raises:
        SystemExit: code 1 if anything is, 2 if there is nothing to look at.
    """
    parser = argparse.ArgumentParser("python -m util.verify", description=__doc__)
    parser.add_argument(
        "folder", metavar="DIR", help="holds train/CLASS/* and test/CLASS/* (or val)"
    )
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
    print_line(f"{len(paths)} images in {len(folders)} folders of classes, {len(faults)} faults")
    sys.exit(1 if faults else 0)


def find_differences(classes: dict[Path, list[str]]) -> Iterator[str]:
    """A line for each class that one of the splits lacks, and for splits with fewer than two."""
    known = sorted(set().union(*classes.values()))
    for split, names in classes.items():
        yield from (f"{split / name}: missing" for name in known if name not in names)
        if len(names) < 2:
            yield f"{split}: {len(names)} class folders, at least two are needed"


def find_bad_images(paths: Sequence[str]) -> list[str]:
    """Decode all, as a run would; a line for each that cannot be, in order."""
    with ThreadPool(os.cpu_count()) as pool:
        answers = progress_bar(pool.imap(_fault_of, paths, 16), "looking", total=len(paths))
        return [fault for fault in answers if fault]


def _fault_of(path: str) -> str | None:
    try:
        open_image(path)
    except DataError as error:
        return str(error)
    return None


if __name__ == "__main__":
    main()
