"""Cache channel statistics and decoded images of a folder, keyed by its files."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from util.data.image_files import ImageFiles
from util.data.images import InMemory, Source, Statistics, load_into_memory
from util.errors import DataError
from util.files import atomic_write


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


@dataclass(frozen=True)
class ImageCache:
    """File that holds the decoded images of a split.

    Attributes:
        path: of the file, which the images of a changed split replace.
        key: of the image files and their decoding. A file with another key is not used.
        writable: False only reads.
    """

    path: Path
    key: str
    writable: bool

    def load(self, files: ImageFiles, threads: int) -> Source:
        """Return images in memory, read from the cache or decoded; see `load_into_memory`."""
        if saved := self.read(files):
            return saved
        source = load_into_memory(files, threads)
        if self.writable and isinstance(source, InMemory):
            self.write(files, source)
        return source

    def read(self, files: ImageFiles) -> InMemory | None:
        """Return the images; None if the file is missing, damaged, or of other images."""
        try:
            with np.load(self.path, allow_pickle=False) as arrays:  # which verifies checksums
                bad, transparent = arrays["bad"].tolist(), arrays["transparent"].tolist()
                is_other = arrays["key"].item() != self.key or (bad and not files.skip)
                if is_other or (
                    transparent and arrays["background"].tolist() != [*files.background]
                ):
                    return None
                images = torch.from_numpy(arrays["images"])
        except Exception:  # a damaged file raises anything
            return None
        files.transparent.update(transparent)
        return InMemory(images, {i: os.fsdecode(files.paths[i]) for i in bad})

    def write(self, files: ImageFiles, source: InMemory) -> None:
        """Write the images; warn of a failed write."""
        arrays = {
            "key": self.key,
            "bad": np.array(sorted(source.bad), np.int64),
            "background": np.array(files.background, np.int64),
            "transparent": np.array(sorted(files.transparent), np.int64),
            "images": source.images.numpy(),
        }
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(self.path) as file:
                np.savez(file, **arrays)
        except OSError as error:
            print(f"warning: decoded images could not be saved: {error}", file=sys.stderr)


def digest_files(root: Path, paths: Sequence[str], *facts: object) -> str:
    """Return 16 hexadecimal digits that change with the folder, any file below it, or a fact."""
    words = "\n".join(map(str, [root.resolve(), *facts, ""]))
    digest = hashlib.sha256(os.fsencode(words))
    for path in paths:
        try:
            status = os.stat(path)
        except OSError as error:
            raise DataError(f"cannot read the image {path}: {error.strerror}") from None
        name = path.removeprefix(str(root))
        digest.update(os.fsencode(f"{name}\n{status.st_size}\n{status.st_mtime_ns}\n"))
    return digest.hexdigest()[:16]
