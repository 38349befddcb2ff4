"""Pictures on their way to the network: fetched a batch at a time, augmented, normalised."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional
from tqdm import tqdm

from .augment import Augmentation

MEMORY_BUDGET = 2**30  # bytes of uint8 pixels that a split may hold in memory
CHUNK = 256  # pictures read at once when a whole split is read


class DataError(RuntimeError):
    """A fault of the data that the user can mend; the message says what, where and how."""

    def __init__(self, message: str) -> None:
        # A worker of the loader hands its error on with a traceback in front: keep the sentence.
        super().__init__(message.rpartition("DataError: ")[2])


@dataclass(frozen=True)
class DataSpec:
    """What a network and a log need to know about a data set.

    Attributes:
        name: one of `util.data.DATASETS`.
        in_channels, image_size: pictures are (in_channels, image_size, image_size).
        classes: names, by target.
        mean, std: per channel, of pixels scaled to [0, 1].
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


class Source(Protocol):
    """Raw pictures, indexed like the (size, C, H, W) uint8 tensor that they may be or stand for."""

    def __len__(self) -> int: ...

    def __getitem__(self, indices: Tensor) -> Tensor: ...


class Split(NamedTuple):
    """The training or the test half of a data set: pictures and their int64 targets."""

    source: Source
    targets: Tensor


class Resized:
    """A source whose square pictures are resized on access (bilinear, antialiased)."""

    def __init__(self, source: Source, image_size: int) -> None:
        self.source, self.size = source, [image_size, image_size]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, indices: Tensor) -> Tensor:
        return functional.resize(self.source[indices], self.size, antialias=True)


def read_batches(source: Source, threads: int = 1) -> Iterator[Tensor]:
    """All pictures in order, CHUNK at a time; a terminal sees a bar if it takes over a second."""
    parts = torch.arange(len(source)).split(CHUNK)
    with ThreadPool(threads) as pool:
        yield from tqdm(
            pool.imap(source.__getitem__, parts),
            desc="reading pictures",
            total=len(parts),
            unit=" pictures",
            unit_scale=CHUNK,
            delay=1,
            leave=False,
            disable=None,
        )


def hold_in_memory(source: Source, threads: int = 1) -> Source:
    """The source as one uint8 tensor if that fits MEMORY_BUDGET, else the source as it is."""
    first = source[torch.tensor([0])]  # 1 C H W
    if len(source) * first.numel() > MEMORY_BUDGET:
        return source
    images = first.new_empty(len(source), *first.shape[1:])
    for part, batch in zip(images.split(CHUNK), read_batches(source, threads), strict=True):
        part.copy_(batch)
    return images


def channel_statistics(
    source: Source, threads: int = 1
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel over all pixels, in [0, 1] units.

    Sums are of integers, so exact: neither chunks nor threads change the result. A channel of one
    flat value counts as one grey level of deviation, so that dividing by it stays finite.
    """
    pixels, total, squares = 0, 0, 0
    for batch in read_batches(source, threads):
        values = batch.transpose(0, 1).flatten(1).long()  # C N*H*W
        pixels += values.shape[1]
        total, squares = total + values.sum(1), squares + values.square().sum(1)
    mean = total.double() / pixels
    std = (squares.double() / pixels - mean.square()).clamp(min=1).sqrt()
    return tuple((mean / 255).tolist()), tuple((std / 255).tolist())


class PictureSet(Dataset):
    """A split as the loader wants it: keys (epoch, index) in, one finished batch out.

    Works on whole batches (`__getitems__`), because a call for each picture would cost more than
    the picture.
    """

    def __init__(
        self,
        spec: DataSpec,
        split: Split,
        *,
        seed: int = 0,
        augmentation: Augmentation | None = None,
    ) -> None:
        self.spec, self.split, self.seed = spec, split, seed
        self.augmentation = augmentation or Augmentation()

    def __len__(self) -> int:
        return len(self.split.targets)

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Images (N, C, H, W) float32 normalised and targets (N,) int64."""
        epoch, index = np.array(keys).T
        chosen = torch.from_numpy(index)
        images = self.augmentation(self.split.source[chosen], self.seed, epoch, index)
        images = functional.to_dtype(images, torch.float32, scale=True)
        images = functional.normalize(images, self.spec.mean, self.spec.std, inplace=True)
        return images, self.split.targets[chosen]

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """One picture (C, H, W) and its target ()."""
        images, targets = self.__getitems__([key])
        return images[0], targets[0]
