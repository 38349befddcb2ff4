"""Published datasets: torchvision reads the files, missing files are downloaded."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from torchvision import datasets

from util.data.archives import DatasetClass, download, find_damaged, list_archives
from util.data.augment import NO_AUGMENTATION, Augmentation
from util.data.images import DataSpec, Split, make_split
from util.data.preprocessing import describe_preprocessing
from util.errors import DataError

STL10_NAMES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")


@dataclass(frozen=True)
class TorchvisionSet:
    """Dataset of torchvision.

    Attributes:
        dataset: the torchvision class.
        augmentation: of training images.
        classes: names, where torchvision has none.
        mean, std: published channel statistics of the training images, of pixels in [0, 1].
    """

    dataset: DatasetClass
    augmentation: Augmentation = NO_AUGMENTATION
    classes: tuple[str, ...] = ()
    _: KW_ONLY
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def load(
        self, name: str, root: Path, image_size: int, mirror: str | None = None
    ) -> tuple[DataSpec, Split, Split]:
        """Read both splits, with images of side `image_size`; see `open_parts`."""
        parts = open_parts(name, self.dataset, root, mirror)
        classes = self.classes or tuple(parts[0].classes)
        preprocessing, splits = describe_preprocessing(name, image_size), []
        for part_name, part in zip(("train", "test"), parts, strict=True):
            targets = part.labels if hasattr(part, "labels") else part.targets
            split = make_split(part.data, targets, preprocessing)
            if fault := find_label_fault(split, len(classes)):
                folder = find_folder(self.dataset, root)
                raise DataError(f"{name}, {part_name}, in {folder}: {fault}")
            splits.append(split)
        spec = DataSpec(name, len(self.mean), image_size, classes, self.mean, self.std)
        return spec, *splits


def find_label_fault(split: Split, classes: int) -> str:
    """Return "" if every image has a label and every label a class, else a description."""
    if len(split.targets) != len(split.source):
        return f"damaged files: {len(split.source)} images and {len(split.targets)} labels"
    for image, label in enumerate(split.targets.tolist()):
        if not 0 <= label < classes:
            return f"image {image} has the label {label}, of 0 to {classes - 1}"
    return ""


def open_parts(
    name: str, dataset: DatasetClass, root: Path, mirror: str | None = None
) -> list[datasets.VisionDataset]:
    """Return the training part and the test part, from files below `root` or from the network.

    Raises:
        DataError: naming what is missing or damaged, and the folder for files put by hand.
    """
    try:
        return read_parts(dataset, root)
    except Exception as error:  # parsers of foreign files raise anything
        if not any(archive.find_faults(root) for archive in list_archives(dataset)):
            where = f"{name}: damaged files in {find_folder(dataset, root)}"
            raise DataError(f"{where} ({format_error(error)})") from None
    try:
        download(dataset, root, mirror)
        return read_parts(dataset, root)
    except Exception as error:  # from no network to a full disk
        raise DataError(explain_missing(name, dataset, root, error)) from None


def read_parts(dataset: DatasetClass, root: Path) -> list[datasets.VisionDataset]:
    """Read both parts with torchvision, which compares the checksums that it knows."""
    if issubclass(dataset, datasets.SVHN | datasets.STL10):
        return [dataset(root, split=part) for part in ("train", "test")]
    return [dataset(root, train=train) for train in (True, False)]


def find_folder(dataset: DatasetClass, root: Path) -> Path:
    """Return the folder of a dataset's unpacked files."""
    return (root / next(iter(list_archives(dataset)[0].files))).parent


def explain_missing(name: str, dataset: DatasetClass, root: Path, error: Exception) -> str:
    """Describe the fault, the attempted download, and the files to put by hand."""
    root = root.resolve()
    archives = list_archives(dataset)
    files = ", ".join(file.name for archive in archives for file in archive.files)
    by_hand = f"put {files} into {find_folder(dataset, root)}"
    if len(archives) == 1:
        by_hand += f", or {archives[0].path} as it is into {root}"
    elif issubclass(dataset, datasets.MNIST):
        by_hand += " (the published .gz files will do)"
    lines = [
        f"dataset {name} is missing or incomplete in {root}",
        *(f"damaged: {fault}" for fault in find_damaged(dataset, root)),
        f"tried to download it: {format_error(error)}",
        f"by hand: {by_hand}; or name a mirror by --data-url",
    ]
    return "\n  ".join(lines)


def format_error(error: Exception) -> str:
    """Return an error as one line; an error without a message is named by its class."""
    return " ".join(str(error).split()) or type(error).__name__
