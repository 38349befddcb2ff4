"""Caches of a folder of images: channel statistics, keyed by the image files."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from util.data.images import Statistics
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


def digest_files(root: Path, paths: Sequence[str], *facts: int) -> str:
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
