"""Classify images by a trained network, with the preprocessing of its tests.

    python scripts/predict.py RUN cat.jpg dog.jpg
    python scripts/predict.py network.onnx FOLDER --csv predictions.csv

RUN is the folder of a run, a checkpoint, or a file *.onnx or *.safetensors of scripts/export.py. A
FOLDER stands for all images in and below it. Each line has an image and its five best classes.

Images that cannot be read are listed at the end. Exit codes: 1 there are such images, 2 bad input.
"""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, default_convert

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.exported_network import Predictor, load_predictor
from util.cli.parser import Parser, bounded_int, path_name, report_errors
from util.console import print_line, progress_bar, visible
from util.data import MAX_IMAGE_PIXELS
from util.data.image_files import ImageFiles, grey_levels
from util.data.image_folder import FolderScan, describe_unused, list_images
from util.data.images import Pixels, Split
from util.data.loader import ImageSet
from util.data.sampler import EpochBatches
from util.errors import DataError
from util.files import atomic_write

BEST = 5  # classes per image
BATCH_SIZE = 64  # images

Row = dict[str, Any]  # "image", and "classes" or "error"


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.csv and args.csv == args.json:
        parser.error(f"--json {args.json}: is the file of --csv; name another one")
    outputs = {args.csv: format_csv, args.json: format_json}
    outputs = {Path(file): write for file, write in outputs.items() if file}
    with report_errors(parser, ValueError):
        for file in outputs:
            if file.is_dir() or not os.access(file.parent, os.W_OK):
                parser.error(f"{file} cannot be written; name a file in a folder of yours")
        paths = find_images(args.images)
        predictor = load_predictor(args.network)
        if predictor.loss != "CE":
            note = "the softmax of the scores ranks the classes and is no probability"
            print(f"note: trained with --loss {predictor.loss}: {note}", file=sys.stderr)
        rows = list(predict(predictor, paths, args.max_image_pixels))
        for file, write in outputs.items():
            with atomic_write(file) as out:
                out.write(write(rows).encode(errors="surrogateescape"))
    bad = [row["error"] for row in rows if "error" in row]
    for error in bad:
        print(visible(error), file=sys.stderr)
    if bad:
        parser.exit(1, f"{parser.prog}: {len(bad)} of {len(rows)} images cannot be read")


def build_parser() -> Parser:
    parser = Parser("predict.py", __doc__.splitlines()[0])
    add = parser.add_group("network and images")
    text = "folder of a run, checkpoint, or exported file *.onnx or *.safetensors"
    add("network", text, path_name, metavar="RUN")
    text = "image file, or folder of which all images are classified"
    add("images", text, path_name, nargs="+", metavar="IMAGE|FOLDER")
    text = "most pixels of an image file; the memory must hold them, 3 bytes each"
    add("--max-image-pixels", text, bounded_int(1, 10**12), MAX_IMAGE_PIXELS)
    add = parser.add_group("output")
    add("--csv", "also write a table with one row per image", path_name, metavar="FILE")
    add("--json", "also write a list with one entry per image", path_name, metavar="FILE")
    return parser


def find_images(places: Sequence[str]) -> list[str]:
    """Return the image files of `places`, those of a folder in order.

    Raises:
        DataError: a folder has no image.
    """
    paths = []
    for place in places:
        if not os.path.isdir(place):
            paths.append(place)
            continue
        found, others = list_images(Path(place), "")
        if not found:
            raise DataError(f"{place}: no images in this folder")
        for line in describe_unused([FolderScan(Path(place), {}, others)]):
            print(line, file=sys.stderr)
        paths += found
    return paths


@dataclass(frozen=True)
class ReportedFiles(ImageFiles):
    """Image files; `Pixels.bad` has the reason of each file that cannot be read or decoded."""

    def read(self, epoch: np.ndarray, index: np.ndarray) -> Pixels:
        images, bad = [], {}
        for i in index:
            try:
                images.append(super().read(epoch[:1], np.array([i])).images)
            except DataError as error:
                bad[int(i)] = str(error)
        empty = super().read(epoch[:0], index[:0]).images
        return Pixels(torch.cat([empty, *images]), bad)


def predict(predictor: Predictor, paths: Sequence[str], max_pixels: int) -> Iterator[Row]:
    """Yield a row for each image in order; print the line of each image that can be read."""
    preprocessing, spec = predictor.preprocessing, predictor.spec
    files = ReportedFiles(
        paths,
        preprocessing.crop,
        preprocessing,
        min_size=preprocessing.min_size,
        colour=preprocessing.colour,
        background=grey_levels(spec.mean),
        max_pixels=max_pixels,
    )
    # The target of an image is its number.
    images = ImageSet(spec, Split(files, torch.arange(len(paths))))
    batches = EpochBatches(len(paths), BATCH_SIZE, train=False)
    workers = min(os.cpu_count() or 1, len(batches) - 1)  # none for a single batch
    loader = DataLoader(
        images, batch_sampler=batches, collate_fn=default_convert, num_workers=workers
    )
    with progress_bar(None, "predicting", total=len(paths)) as bar:
        for batch, (images, numbers, errors) in enumerate(loader):
            scores = predictor.scores(images)
            best = scores.double().softmax(1).topk(min(BEST, scores.shape[1]))
            found = dict(zip(numbers.tolist(), zip(*best, strict=True), strict=True))
            reasons = iter(errors)
            for number in batches.images(batch):
                path = paths[number]
                if number not in found:
                    yield {"image": path, "error": next(reasons)}
                    continue
                pairs = zip(*(values.tolist() for values in found[number]), strict=True)
                classes = [{"name": spec.classes[k], "probability": p} for p, k in pairs]
                print_line(f"{path}  " + "  ".join(map(format_class, classes)))
                yield {"image": path, "classes": classes}
            bar.update(len(numbers) + len(errors))


def format_class(entry: Row) -> str:
    """Return a class and its probability in percent."""
    return f"{entry['name']} {100 * entry['probability']:.2f}%"


def format_csv(rows: Sequence[Row]) -> str:
    """Return a table: image, class and probability of each rank, error."""
    ranks = range(1, 1 + max(len(row.get("classes", ())) for row in rows))
    names = [f"{name}_{rank}" for rank in ranks for name in ("class", "probability")]
    table = StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["image", *names, "error"])
    for row in rows:
        entries = row.get("classes") or [{"name": "", "probability": ""}] * len(ranks)
        cells = [entry[key] for entry in entries for key in ("name", "probability")]
        writer.writerow([row["image"], *cells, row.get("error", "")])
    return table.getvalue()


def format_json(rows: Sequence[Row]) -> str:
    """Return a list: image with classes, names and probabilities, or with error."""
    return json.dumps(rows, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    main()
