"""Which image comes when, and with what chance numbers: pure functions of (seed, epoch, index).

No generator carries state from image to image, so workers and processes share nothing, a
resumed epoch needs no replay, and the global random state (dropout, initialisation) is neither read
nor moved.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike
from torch.utils.data import Sampler

# The numbers drawn for a image in an epoch; from CROP on, two for each attempt at a random crop.
ORDER, TOP, LEFT, FLIP, CROP = range(5)

Key = tuple[int, int]  # epoch and index of a image


def random_words(seed: int, epoch: ArrayLike, index: ArrayLike, draw: ArrayLike) -> np.ndarray:
    """Uniform 64-bit words, one for each key (seed, epoch, index, draw), by that key alone.

    Nested SplitMix64 (Steele, Lea and Flood 2014, https://doi.org/10.1145/2714064.2660195): every
    number of the key selects an output of the generator that starts at the word so far.

    Args:
        seed: any integer, taken modulo 2**64.
        epoch, index, draw: integers >= 0, or (N,) arrays of them, together of shape (N,); `draw`
            says which number of the image, see ORDER, TOP, LEFT, FLIP, CROP.

    Returns:
        (N,) uint64.
    """
    word = np.zeros(1, np.uint64)
    for number in (seed % 2**64, epoch, index, draw):
        word = _splitmix64(word, np.atleast_1d(np.asarray(number, np.uint64)))
    return word


def _splitmix64(state: np.ndarray, step: np.ndarray) -> np.ndarray:
    word = state + (step + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))


class EpochBatches(Sampler[list[Key]]):
    """Yields the batches of one process: lists of keys (epoch, index), so that whoever fetches a
    image knows its epoch.

    Together the processes see the batches that one process would see, image for image. Either
    each takes its part of every batch, as training needs: consecutive images, parts as equal as
    possible, the earlier ones larger by one. The last batch may leave some with an empty list: it
    is a batch all the same, so that all take the same number of steps. Or whole batches are dealt
    in turn, as testing likes: each is computed exactly as one process would compute it.

    Args:
        size: images in the data set.
        batch_size: images in a batch, over all processes; the last may have fewer.
        seed: with `shuffle`, the order depends on (seed, epoch, size) alone.
        shuffle: False keeps the order of the data set.
        rank: the number of this process, 0 .. processes - 1.
        processes: how many there are.
        whole: deal whole batches, batch i to process i % processes, instead of cutting each.

    Raises:
        ValueError: rank is no number of one of the processes.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        processes: int = 1,
        whole: bool = False,
    ) -> None:
        if not 0 <= rank < processes:
            raise ValueError(f"rank must be in 0 .. processes - 1, got {rank} of {processes}")
        self.size, self.batch_size, self.seed, self.shuffle = size, batch_size, seed, shuffle
        self.rank, self.processes, self.whole = rank, processes, whole
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Choose the epoch to iterate next, from its batch `start_batch` on (both from 0).

        Raises:
            ValueError: a negative number.
        """
        if epoch < 0 or start_batch < 0:
            raise ValueError(f"epoch and start_batch must be >= 0, got {epoch} and {start_batch}")
        self.epoch, self.start = epoch, start_batch

    def images(self, batch: int) -> list[int]:
        """The indices of a batch of this epoch, from 0, over all processes."""
        return self._cut(self._order(), batch).tolist()

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, order = self.epoch, self._order()
        for step in self._steps():
            batch = self._cut(order, step)
            mine = batch if self.whole else np.array_split(batch, self.processes)[self.rank]
            yield [(epoch, index) for index in mine.tolist()]

    def __len__(self) -> int:
        return len(self._steps())

    def _steps(self) -> range:
        """The numbers of the batches that this process has, or has a part of."""
        end = -(-self.size // self.batch_size)
        if not self.whole:
            return range(self.start, end)
        return range(self.start + (self.rank - self.start) % self.processes, end, self.processes)

    def _cut(self, order: np.ndarray, batch: int) -> np.ndarray:
        return order[batch * self.batch_size : (batch + 1) * self.batch_size]

    def _order(self) -> np.ndarray:
        indices = np.arange(self.size)
        if not self.shuffle:
            return indices
        keys = random_words(self.seed, self.epoch, indices, ORDER)
        return np.argsort(keys, kind="stable")
