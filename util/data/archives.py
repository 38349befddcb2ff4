"""Published archives of torchvision's datasets: list, check, download and unpack them."""

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

DatasetClass = type[datasets.VisionDataset]


@dataclass(frozen=True)
class Archive:
    """Published file and its unpacked files. All paths are relative to the root.

    Attributes:
        path: of the published file.
        md5: published checksum.
        urls: published addresses.
        files: checksum of each unpacked file, None where none is published. A file that is not
            packed unpacks to itself.
        max_bytes: upper limit of the download.
    """

    path: Path
    md5: str | None
    urls: tuple[str, ...]
    files: Mapping[Path, str | None]
    max_bytes: int = 2**28  # CIFAR and SVHN have up to 182,040,794

    def addresses(self, mirror: str | None) -> list[str]:
        """Return the address below `mirror`, else the published ones, by https where offered."""
        if mirror:
            return [f"{mirror.rstrip('/')}/{self.path.name}"]
        return [url for url in self.urls if url.startswith("https:")] or list(self.urls)


def list_archives(dataset: DatasetClass) -> list[Archive]:
    """Return the archives of a torchvision class: CIFAR, STL-10, an MNIST or SVHN."""
    if issubclass(dataset, datasets.MNIST):
        raw = Path(dataset.__name__, "raw")
        return [
            Archive(
                raw / name,
                md5,
                tuple(mirror + name for mirror in dataset.mirrors),
                {raw / name.removesuffix(".gz"): None},
                2**26,  # up to 26,421,880
            )
            for name, md5 in dataset.resources
        ]
    if issubclass(dataset, datasets.SVHN):
        parts = [dataset.split_list[part] for part in ("train", "test")]
        return [Archive(Path(name), md5, (url,), {Path(name): md5}) for url, name, md5 in parts]
    files = dict([*dataset.train_list, *dataset.test_list])
    if meta := getattr(dataset, "meta", None):
        files[meta["filename"]] = meta["md5"]
    unpacked = {Path(dataset.base_folder, name): md5 for name, md5 in files.items()}
    archive = Archive(Path(dataset.filename), dataset.tgz_md5, (dataset.url,), unpacked)
    return [replace(archive, max_bytes=2**32) if issubclass(dataset, datasets.STL10) else archive]


def find_faults(archive: Archive, root: Path) -> dict[Path, str]:
    """Return the unusable unpacked files by path: "missing", or a description of the damage."""
    faults = {root / name: _find_fault(root / name, md5) for name, md5 in archive.files.items()}
    return {path: fault for path, fault in faults.items() if fault}


def find_damaged(dataset: DatasetClass, root: Path) -> list[str]:
    """Describe each damaged file of a dataset, archives included; skip missing files."""
    faults: dict[Path, str] = {}
    for archive in list_archives(dataset):
        path = root / archive.path
        faults |= find_faults(archive, root) | {path: _find_fault(path, archive.md5)}
    return [f"{path} {fault}" for path, fault in faults.items() if fault not in ("", "missing")]


def is_complete(dataset: DatasetClass, root: Path) -> bool:
    """Return True if no unpacked file is missing or damaged."""
    return not any(find_faults(archive, root) for archive in list_archives(dataset))


def download(dataset: DatasetClass, root: Path, mirror: str | None = None) -> None:
    """Download and unpack missing or damaged files; use archives that are already there.

    One of several processes downloads, the others wait.

    Args:
        dataset: the torchvision class.
        root: folder for the archives and the unpacked files.
        mirror: address of a folder that holds the archives. None means the published addresses.

    Raises:
        DownloadError: no address gives an archive.
        OSError: a file cannot be written.
    """
    root.mkdir(parents=True, exist_ok=True)

    def on_wait(owner: str) -> None:
        print_line(f"waiting for {owner}, which downloads {dataset.__name__} to {root}")

    with closing(take_lock(root / f".{dataset.__name__}.lock", on_wait)):
        for archive in list_archives(dataset):
            if find_faults(archive, root):
                path = root / archive.path
                path.parent.mkdir(parents=True, exist_ok=True)
                if not check_integrity(path, archive.md5):
                    fetch(path, archive.md5, archive.addresses(mirror), archive.max_bytes)
                if archive.path not in archive.files:
                    extract_archive(str(path), str(path.parent))


def _find_fault(path: Path, md5: str | None) -> str:
    """Return "" for a sound file, "missing", or a description of the damage."""
    if not path.is_file():
        return "missing"
    if md5 is not None and calculate_md5(path) != md5:
        return f"has another checksum than the published one, and {path.stat().st_size:,} bytes"
    if path.name.endswith("-ubyte") and _has_wrong_length(path):
        return f"has {path.stat().st_size:,} bytes, another number than its header announces"
    return ""


def _has_wrong_length(path: Path) -> bool:
    """Compare the length of an IDX file with its header.

    The IDX format (http://yann.lecun.com/exdb/mnist): two zeros, the type, the number of
    dimensions; each dimension as four bytes, highest first; the values, here bytes.
    """
    content = path.read_bytes()
    header = np.frombuffer(content[: 4 + 4 * content[3]] if len(content) > 3 else b"", ">u4")
    return len(content) < 8 or len(content) != 4 * len(header) + math.prod(header[1:].tolist())
