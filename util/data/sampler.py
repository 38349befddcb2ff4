"""Order of the images and their random numbers: pure functions of (seed, epoch, index).

No generator carries state from image to image. Workers and processes therefore share nothing, and a
resumed epoch needs no replay. The global random state is neither read nor changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass

import numpy as np
from numpy.typing import ArrayLike
from torch.utils.data import Sampler

# Random numbers of an image in an epoch. Each attempt at a random crop takes two, from CROP on.
ORDER, TOP, LEFT, FLIP, CROP = range(5)
POLICY, ERASE, MIX = range(100, 103)  # seeds of torchvision's transforms; MIX is of a batch
HOLD_OUT = 103  # chooses validation images

Key = tuple[int, int, int]  # epoch and index of an image, number of its batch


def random_words(seed: int, epoch: ArrayLike, index: ArrayLike, draw: ArrayLike) -> np.ndarray:
    """Return uniform words (N,) uint64, each a function of its (seed, epoch, index, draw) alone.

    Nested SplitMix64 (Steele, Lea and Flood 2014, https://doi.org/10.1145/2714064.2660195): each
    number of the key selects an output of the generator that starts at the previous word.

    Args:
        seed: any integer, taken modulo 2**64.
        epoch, index: integers >= 0, or (N,) of them.
        draw: as `epoch`; one of the numbers above.
    """
    word = np.zeros(1, np.uint64)
    for number in (seed % 2**64, epoch, index, draw):
        word = _splitmix64(word, np.atleast_1d(np.asarray(number, np.uint64)))
    return word


def _splitmix64(state: np.ndarray, step: np.ndarray) -> np.ndarray:
    """Return output number `step` (from 0) of the generator that starts at `state`."""
    word = state + (step + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))


@dataclass(eq=False)
class EpochBatches(Sampler[list[Key]]):
    """Batches of one process, as lists of keys (epoch, index, batch).

    Together the processes see the batches of a single process, image for image.

    Training batches are shuffled, and each process takes its part of every batch: consecutive
    images, in parts that differ by one at most. A part of the last batch may be empty; the process
    still takes the step.

    Test batches keep the order of the dataset. Whole batches are dealt to the processes in turn, so
    that each is computed exactly as by a single process.

    Attributes:
        size: images in the dataset.
        batch_size: images in a batch, over all processes. The last batch may have fewer.
        seed: the order of training images depends on (seed, epoch, size) alone.
        train: True for training batches, False for test batches.
        rank: number of this process, 0 .. processes - 1.
        processes: world size.
        mixed: True puts the image before a training part, cyclically in the batch, in front of the
            part. The mixture of its first image needs this image.

    Raises:
        ValueError: `rank` is out of range.
    """

    size: int
    batch_size: int
    _: KW_ONLY
    seed: int = 0
    train: bool = True
    rank: int = 0
    processes: int = 1
    mixed: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.processes:
            given = f"{self.rank} of {self.processes}"
            raise ValueError(f"rank must be in 0 .. processes - 1, got {given}")
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Set the epoch to iterate next, from batch `start_batch` on (both from 0)."""
        self.epoch, self.start = epoch, start_batch

    def images(self, batch: int) -> list[int]:
        """Return the image indices of a batch (from 0) of this epoch, over all processes."""
        return self._cut(self._order(), batch).tolist()

    def draw_keys(self, count: int) -> list[Key]:
        """Return keys of the first `count` images in the order of this epoch, or of all."""
        return [(self.epoch, index, 0) for index in self._order()[:count].tolist()]

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, order = self.epoch, self._order()
        for step in self._steps():
            batch = self._cut(order, step)
            part = np.arange(len(batch))
            if self.train:
                part = np.array_split(part, self.processes)[self.rank]
                if self.mixed and len(part):
                    part = np.insert(part, 0, part[0] - 1)  # -1 is the last image of the batch
            yield [(epoch, index, step) for index in batch[part].tolist()]

    def __len__(self) -> int:
        return len(self._steps())

    def _steps(self) -> range:
        """Return the numbers of the batches of which this process has a part."""
        steps = range(self.start, -(-self.size // self.batch_size))
        if self.train:
            return steps
        return steps[(self.rank - self.start) % self.processes :: self.processes]

    def _cut(self, order: np.ndarray, batch: int) -> np.ndarray:
        return order[batch * self.batch_size : (batch + 1) * self.batch_size]

    def _order(self) -> np.ndarray:
        indices = np.arange(self.size)
        if not self.train:
            return indices
        return np.argsort(random_words(self.seed, self.epoch, indices, ORDER), kind="stable")
