"""Make util/data/fashion_mini.npz, the class-balanced subset of Fashion-MNIST.

    python scripts/dev/make_fashion_mini.py DIR

DIR holds the four original IDX files (https://github.com/zalandoresearch/fashion-mnist), unpacked.
The subset keeps the first 640 training and the first 200 test images of each class, in file order.
The images are those of Xiao et al. 2017 (https://arxiv.org/abs/1708.07747), under the MIT licence.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torchvision.datasets.mnist import read_image_file, read_label_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from util.data.embedded_sets import FASHION_MINI
from util.files import atomic_write

CLASSES = 10
PARTS = {"train": ("train", 640), "test": ("t10k", 200)}  # name in the file, images per class


def main(argv: Sequence[str] | None = None) -> None:
    """Write the subset of the files that the command line names."""
    parser = argparse.ArgumentParser(
        prog="make_fashion_mini.py", description=__doc__.splitlines()[0]
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="holds the four IDX files")
    text = "file to write (default: util/data/fashion_mini.npz)"
    parser.add_argument("--out", metavar="FILE", type=Path, default=FASHION_MINI, help=text)
    args = parser.parse_args(argv)
    try:
        arrays = make_subset(args.folder)
        with atomic_write(args.out) as file:
            np.savez_compressed(file, **arrays)
    except (OSError, ValueError) as error:
        raise SystemExit(f"make_fashion_mini.py: {error}") from error
    sizes = ", ".join(f"{len(arrays[f'{part}_labels']):,} {part}" for part in PARTS)
    print(f"{args.out}: {sizes} images, {args.out.stat().st_size:,} bytes")


def make_subset(folder: Path) -> dict[str, np.ndarray]:
    """Return the arrays of the subset: `train_images` (N, 28, 28) and `train_labels` (N,), ...

    Raises:
        ValueError: a class has too few images.
    """
    arrays = {}
    for part, (stem, per_class) in PARTS.items():
        images = read_image_file(str(folder / f"{stem}-images-idx3-ubyte")).numpy()
        labels = read_label_file(str(folder / f"{stem}-labels-idx1-ubyte")).numpy()
        kept = choose_images(labels, per_class)
        arrays[f"{part}_images"] = images[kept]
        arrays[f"{part}_labels"] = labels[kept].astype(np.uint8)
    return arrays


def choose_images(labels: np.ndarray, per_class: int) -> np.ndarray:
    """Return the sorted indices of the first `per_class` images of each class.

    Raises:
        ValueError: a class has fewer.
    """
    kept = [np.flatnonzero(labels == label)[:per_class] for label in range(CLASSES)]
    for label, indices in enumerate(kept):
        if len(indices) < per_class:
            raise ValueError(f"class {label} has {len(indices)} images, fewer than {per_class}")
    return np.sort(np.concatenate(kept))


if __name__ == "__main__":
    main()
