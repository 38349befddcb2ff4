"""Make util/data/fashion_mini.npz, the class-balanced subset of Fashion-MNIST.

    python scripts/dev/make_fashion_mini.py DIR

DIR holds the four original IDX files (https://github.com/zalandoresearch/fashion-mnist), unpacked.
The subset keeps the first 640 training and the first 200 test images of each class, in file order.
The images are those of Xiao et al. 2017 (https://arxiv.org/abs/1708.07747), under the MIT licence.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torchvision.datasets.mnist import read_image_file, read_label_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from util.cli.parser import Parser
from util.data.embedded_sets import FASHION_MINI
from util.files import atomic_write

CLASSES = 10
PARTS = {"train": ("train", 640), "test": ("t10k", 200)}  # name in the file, images per class


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser("make_fashion_mini.py", __doc__.splitlines()[0])
    add = parser.add_group("files")
    add("folder", "holds the four IDX files", Path, metavar="DIR")
    text = "util/data/fashion_mini.npz"
    add("--out", "file to write", Path, FASHION_MINI, text, metavar="FILE")
    args = parser.parse_args(argv)
    try:
        arrays = make_subset(args.folder)
        with atomic_write(args.out) as file:
            np.savez_compressed(file, **arrays)
    except (OSError, ValueError) as error:
        parser.error(str(error))
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
        kept = [np.flatnonzero(labels == label)[:per_class] for label in range(CLASSES)]
        for label, indices in enumerate(kept):
            if len(indices) < per_class:
                raise ValueError(f"class {label} has {len(indices)} images, fewer than {per_class}")
        in_order = np.sort(np.concatenate(kept))
        arrays[f"{part}_images"] = images[in_order]
        arrays[f"{part}_labels"] = labels[in_order].astype(np.uint8)
    return arrays


if __name__ == "__main__":
    main()
