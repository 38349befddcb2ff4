"""Images before augmentation: descriptions, splits, sources in memory or read on access."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from multiprocessing.pool import ThreadPool
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from util.console import progress_bar
from util.data.preprocessing import Preprocessing
from util.errors import DataError

MEMORY_BUDGET = 2**30  # bytes of uint8 pixels that a split may hold in memory
CHUNK = 256  # images per read when a whole split is read

Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean and deviation, per channel


@dataclass(frozen=True)
class DataSpec:
    """Description of a dataset, for networks and logs.

    Attributes:
        name: one of `util.data.datasets.DATASETS`, or "imagenet" or "dummy".
        in_channels, image_size: shape of an image, (in_channels, image_size, image_size).
        classes: names, by target.
        mean, std: per channel, of pixels in [0, 1].
    """

    name: str
    in_channels: int
    image_size: int
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def num_classes(self) -> int:
        return len(self.classes)


class Pixels(NamedTuple):
    """Result of a read.

    Attributes:
        images: (N, C, H, W) uint8, the good images in the requested order.
        bad: file names of the bad images, by index.
    """

    images: Tensor
    bad: dict[int, str]


class Source(Protocol):
    """Images of a split, read by index."""

    def __len__(self) -> int: ...

    def read(self, epoch: np.ndarray, index: np.ndarray) -> Pixels:
        """Read images `index` (N,). Sources that crop at random use `epoch` (N,)."""
        ...


class Split(NamedTuple):
    """Training or test part of a dataset: images and int64 targets."""

    source: Source
    targets: Tensor


def is_good(index: np.ndarray, bad: dict[int, str]) -> np.ndarray:
    """Return a mask (N,) of the images `index` (N,) that are not `bad`."""
    return ~np.isin(index, list(bad))


@dataclass(frozen=True)
class InMemory:
    """Images in memory, (size, C, H, W) uint8. The rows of `bad` images are undefined.

    With `preprocessing`, a read resizes the images.
    """

    images: Tensor
    bad: dict[int, str] = field(default_factory=dict)
    preprocessing: Preprocessing | None = None

    def __len__(self) -> int:
        return len(self.images)

    def read(self, epoch: np.ndarray, index: np.ndarray) -> Pixels:
        good = is_good(index, self.bad)
        images = self.images[torch.from_numpy(index[good])]
        if self.preprocessing is not None:
            images = self.preprocessing(images)
        return Pixels(images, {i: self.bad[i] for i in index[~good].tolist()})


@dataclass(frozen=True)
class Subset:
    """Images `positions` (N,) of a source."""

    source: Source
    positions: np.ndarray

    def __len__(self) -> int:
        return len(self.positions)

    def read(self, epoch: np.ndarray, index: np.ndarray) -> Pixels:
        images, bad = self.source.read(epoch, self.positions[index])
        own = dict(zip(self.positions[index].tolist(), index.tolist(), strict=True))
        return Pixels(images, {own[position]: name for position, name in bad.items()})


def read_batches(source: Source, threads: int = 1) -> Iterator[tuple[np.ndarray, Pixels]]:
    """Yield all indices and images as read in epoch 0, CHUNK at a time, with a progress bar."""

    def read(index: np.ndarray) -> tuple[np.ndarray, Pixels]:
        return index, source.read(np.zeros_like(index), index)

    indices = np.arange(len(source))
    parts = [indices[i : i + CHUNK] for i in range(0, len(indices), CHUNK)]
    with ThreadPool(threads) as pool:
        scale = {"total": len(parts), "unit_scale": CHUNK, "delay": 1}
        yield from progress_bar(pool.imap(read, parts), "reading images", **scale)


def load_into_memory(source: Source, threads: int = 1) -> Source:
    """Load a source into memory if its images fit MEMORY_BUDGET, else return the source."""
    first = np.zeros(1, np.int64)
    shape = source.read(first, first).images.shape[1:]  # C H W
    if len(source) * math.prod(shape) > MEMORY_BUDGET:
        return source
    pixels, all_bad = torch.empty(len(source), *shape, dtype=torch.uint8), {}
    for index, (images, bad) in read_batches(source, threads):
        pixels[torch.from_numpy(index[is_good(index, bad)])] = images
        all_bad |= bad
    return InMemory(pixels, all_bad)


def channel_statistics(source: Source, threads: int = 1) -> Statistics:
    """Return mean and standard deviation of each channel over all pixels, for pixels in [0, 1].

    The sums are exact integers: neither chunks nor threads change the result. The deviation is at
    least one grey level, so that normalisation stays finite.

    Raises:
        DataError: no image can be read.
    """
    pixels, total, squares = 0, 0, 0
    for _, (images, _) in read_batches(source, threads):
        values = images.transpose(0, 1).flatten(1).long()  # C N*H*W
        pixels += values.shape[1]
        total, squares = total + values.sum(1), squares + values.square().sum(1)
    if not pixels:
        raise DataError(f"not one of {len(source)} images can be read")
    mean = total.double() / pixels
    std = (squares.double() / pixels - mean.square()).clamp(min=1).sqrt()
    return tuple((mean / 255).tolist()), tuple((std / 255).tolist())


def make_split(
    data: np.ndarray | Tensor,
    targets: np.ndarray | Tensor | list[int],
    preprocessing: Preprocessing,
) -> Split:
    """Return images in memory, at the size of the network's input, and their targets (N,).

    Images are uint8 (N, H, W), (N, H, W, 3) or (N, C, H, W). Images of another size are
    preprocessed.
    """
    images = torch.as_tensor(data)
    if images.ndim == 3:
        images = images[:, None]
    elif images.shape[-1] == 3:
        images = images.permute(0, 3, 1, 2)
    source = InMemory(images.contiguous())
    if images.shape[-1] != preprocessing.crop:
        source = load_into_memory(replace(source, preprocessing=preprocessing))
    return Split(source, torch.as_tensor(targets, dtype=torch.int64))
