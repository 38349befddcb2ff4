"""Published archives of torchvision's datasets: list, check, download and unpack them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from torchvision import datasets
from torchvision.datasets.mnist import read_sn3_pascalvincent_tensor
from torchvision.datasets.utils import check_integrity, extract_archive

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
    """

    path: Path
    md5: str | None
    urls: tuple[str, ...]
    files: Mapping[Path, str | None]

    def addresses(self, mirror: str | None) -> list[str]:
        """Return the address below `mirror`, else the published ones, by https where offered."""
        if mirror:
            return [f"{mirror.rstrip('/')}/{self.path.name}"]
        return [url for url in self.urls if url.startswith("https:")] or list(self.urls)

    def find_faults(self, root: Path) -> dict[Path, str]:
        """Return the unusable unpacked files: "missing", or a description of the damage."""
        faults = {root / name: find_fault(root / name, md5) for name, md5 in self.files.items()}
        return {path: fault for path, fault in faults.items() if fault}


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
    return [Archive(Path(dataset.filename), dataset.tgz_md5, (dataset.url,), unpacked)]


def find_damaged(dataset: DatasetClass, root: Path) -> list[str]:
    """Describe each damaged file of a dataset, archives included; skip missing files."""
    faults: dict[Path, str] = {}
    for archive in list_archives(dataset):
        path = root / archive.path
        faults |= archive.find_faults(root) | {path: find_fault(path, archive.md5)}
    return [f"{path} {fault}" for path, fault in faults.items() if fault not in ("", "missing")]


def download(dataset: DatasetClass, root: Path, mirror: str | None = None) -> None:
    """Download and unpack missing or damaged files; use archives that are already there.

    One of several processes downloads, the others wait. `mirror` is the address of a folder that
    holds the archives; None means the published addresses.

    Raises:
        DownloadError: no address gives an archive.
        OSError: a file cannot be written.
    """
    root.mkdir(parents=True, exist_ok=True)

    def on_wait(owner: str) -> None:
        print_line(f"waiting for {owner}, which downloads {dataset.__name__} to {root}")

    with closing(take_lock(root / f".{dataset.__name__}.lock", on_wait)):
        for archive in list_archives(dataset):
            if archive.find_faults(root):
                path = root / archive.path
                path.parent.mkdir(parents=True, exist_ok=True)
                if not check_integrity(path, archive.md5):
                    fetch(path, archive.md5, archive.addresses(mirror))
                if archive.path not in archive.files:
                    extract_archive(str(path), str(path.parent))


def find_fault(path: Path, md5: str | None) -> str:
    """Return "" for a sound file, "missing", or a description of the damage."""
    if not path.is_file():
        return "missing"
    if not check_integrity(path, md5):
        return f"has another checksum than the published one, and {path.stat().st_size:,} bytes"
    if path.name.endswith("-ubyte"):  # files of MNIST, whose checksums are not published
        try:
            read_sn3_pascalvincent_tensor(str(path))
        except Exception:  # from an assertion to a header of other numbers
            return f"has {path.stat().st_size:,} bytes, another number than its header announces"
    return ""
