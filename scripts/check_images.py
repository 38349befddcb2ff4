"""Decode every image of a folder before a long run: `python scripts/check_images.py DIR`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util.cli.parser import Parser, bounded_int, report_errors
from util.console import print_line, progress_bar
from util.data import MAX_IMAGE_PIXELS
from util.data.image_files import open_image
from util.data.image_folder import FolderScan, describe_unused, scan_split
from util.errors import DataError

SPLITS = ("train", "test", "val")


def main(argv: Sequence[str] | None = None) -> None:
    """Print a line for each fault of DIR/{train,test,val}/CLASS/*; exit with 1 if there is one."""
    parser = Parser("check_images.py", __doc__)
    text = "holds train/CLASS/* and test/CLASS/* (or val)"
    parser.add_argument("folder", metavar="DIR", help=text)
    text = "most pixels of an image, as in a run (default: %(default)s)"
    limit = {"type": bounded_int(1, 10**12), "default": MAX_IMAGE_PIXELS}
    parser.add_argument("--max-image-pixels", metavar="N", help=text, **limit)
    args = parser.parse_args(argv)
    root = Path(args.folder).expanduser()
    splits = [root / name for name in SPLITS if (root / name).is_dir()]
    if not splits:
        parser.error(f"no folder {root}/train, {root}/test or {root}/val")
    with report_errors(parser):
        scans = list(map(scan_split, splits))
    folders = {scan.root / name: paths for scan in scans for name, paths in scan.images.items()}
    faults = [*find_differences(scans)]
    faults += [f"{folder}: no images" for folder, paths in folders.items() if not paths]
    paths = [path for paths in folders.values() for path in paths]
    faults += find_bad_images(paths, args.max_image_pixels)
    for line in describe_unused(scans):
        print_line(line)
    for fault in faults:
        print_line(fault)
    print_line(f"{len(paths)} images in {len(folders)} class folders, {len(faults)} faults")
    sys.exit(1 if faults else 0)


def find_differences(scans: Sequence[FolderScan]) -> Iterator[str]:
    """Yield a line for each class missing in a split, and for each split with fewer than two."""
    known = sorted(set().union(*(scan.images for scan in scans)))
    for scan in scans:
        yield from (f"{scan.root / name}: missing" for name in known if name not in scan.images)
        if (count := len(scan.images)) < 2:
            yield f"{scan.root}: {count} class folders, at least two are needed"


def find_bad_images(paths: Sequence[str], max_pixels: int) -> list[str]:
    """Decode all images as a run does; return a line for each bad one, in order."""
    find = partial(_find_fault, max_pixels=max_pixels)
    with ThreadPool(os.cpu_count()) as pool:
        faults = progress_bar(pool.imap(find, paths, 16), "decoding", total=len(paths))
        return [fault for fault in faults if fault]


def _find_fault(path: str, max_pixels: int) -> str | None:
    """Return the message of the error, None for a sound image."""
    try:
        open_image(path, max_pixels=max_pixels)
    except DataError as error:
        return str(error)
    return None


if __name__ == "__main__":
    main()
