"""The files that torchvision's data sets are read from: as published, found, fetched, unpacked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torchvision import datasets
from torchvision.datasets.utils import calculate_md5, check_integrity, extract_archive

from util.console import print_line
from util.data.download import fetch
from util.lock import take_lock

Kind = type[datasets.VisionDataset]


@dataclass(frozen=True)
class Archive:
    """A file that is published, and what it is unpacked to.

    Attributes:
        path: below the root, as all paths here.
        md5: published.
        urls: published addresses.
        files: -> their checksums, None where none is published; only itself if it is not packed.
        most: bytes that it can have, above what it has.
    """

    path: Path
    md5: str | None
    urls: tuple[str, ...]
    files: Mapping[Path, str | None]
    most: int = 2**28  # CIFAR and SVHN have up to 182,040,794

    def addresses(self, mirror: str | None) -> list[str]:
        """Where to get it: from the mirror, else as published, by https if that is offered."""
        if mirror:
            return [f"{mirror.rstrip('/')}/{self.path.name}"]
        return [url for url in self.urls if url.startswith("https:")] or list(self.urls)


def list_archives(kind: Kind) -> list[Archive]:
    """What torchvision knows of a data set: CIFAR, STL-10, the MNISTs or SVHN."""
    if issubclass(kind, datasets.MNIST):
        raw = Path(kind.__name__, "raw")
        return [
            Archive(
                raw / name,
                md5,
                tuple(mirror + name for mirror in kind.mirrors),
                {raw / name.removesuffix(".gz"): None},
                2**26,  # up to 26,421,880
            )
            for name, md5 in kind.resources
        ]
    if issubclass(kind, datasets.SVHN):
        parts = [kind.split_list[part] for part in ("train", "test")]
        return [Archive(Path(n), md5, (url,), {Path(n): md5}) for url, n, md5 in parts]
    files = dict([*kind.train_list, *kind.test_list])
    if meta := getattr(kind, "meta", None):
        files[meta["filename"]] = meta["md5"]
    below = {Path(kind.base_folder, name): md5 for name, md5 in files.items()}
    packed = Archive(Path(kind.filename), kind.tgz_md5, (kind.url,), below)
    return [replace(packed, most=2**32) if issubclass(kind, datasets.STL10) else packed]


def find_faults(archive: Archive, root: Path) -> dict[Path, str]:
    """The files of an archive that cannot be used, by path: "missing", or in what way damaged."""
    faults = {root / name: _find_fault(root / name, md5) for name, md5 in archive.files.items()}
    return {path: fault for path, fault in faults.items() if fault}


def find_damaged(kind: Kind, root: Path) -> list[str]:
    """A clause for each file of a data set that is there and damaged, archives included."""
    faults: dict[Path, str] = {}
    for archive in list_archives(kind):
        path = root / archive.path
        faults |= find_faults(archive, root) | {path: _find_fault(path, archive.md5)}
    return [f"{path} {fault}" for path, fault in faults.items() if fault not in ("", "missing")]


def is_complete(kind: Kind, root: Path) -> bool:
    return not any(find_faults(archive, root) for archive in list_archives(kind))


def obtain(kind: Kind, root: Path, mirror: str | None = None) -> None:
    """Fetch and unpack what is missing or damaged; archives that are there are used.

    Of several processes one does so, while the others wait.

    Args:
        mirror: the address of a folder that holds the archives, in place of the published ones.

    Raises:
        DownloadError: an archive is not to be had.
        OSError: something cannot be written.
    """
    root.mkdir(parents=True, exist_ok=True)
    busy = lambda owner: print_line(
        f"waiting for {owner}, which downloads {kind.__name__} to {root}"
    )
    with closing(take_lock(root / f".{kind.__name__}.lock", busy)):
        for archive in list_archives(kind):
            if find_faults(archive, root):
                _obtain_one(archive, root, mirror)


def _obtain_one(archive: Archive, root: Path, mirror: str | None) -> None:
    path = root / archive.path
    path.parent.mkdir(parents=True, exist_ok=True)
    if not check_integrity(path, archive.md5):
        fetch(path, archive.md5, archive.addresses(mirror), archive.most)
    if archive.path not in archive.files:
        extract_archive(str(path), str(path.parent))


def _find_fault(path: Path, md5: str | None) -> str:
    """Nothing, "missing", or in what way the file is damaged."""
    if not path.is_file():
        return "missing"
    if md5 is not None and calculate_md5(path) != md5:
        return f"has another checksum than the published one, and {path.stat().st_size:,} bytes"
    if path.name.endswith("-ubyte") and _is_torn(path):
        return f"has {path.stat().st_size:,} bytes, not those that it announces"
    return ""


def _is_torn(path: Path) -> bool:
    """Whether a file of the format IDX has another length than its header tells.

    Source: http://yann.lecun.com/exdb/mnist, the IDX format: two zeros, the type, the number of
    dimensions; each dimension as four bytes, the first byte the highest; the values, here bytes.
    """
    content = path.read_bytes()
    numbers = np.frombuffer(content[: 4 + 4 * content[3]] if len(content) > 3 else b"", ">u4")
    return len(content) < 8 or len(content) != 4 * len(numbers) + math.prod(numbers[1:].tolist())
