"""Which picture comes when, and with what chance numbers: pure functions of (seed, epoch, index).

No generator carries state from picture to picture, so workers share nothing, a resumed epoch needs
no replay, and the global random state (dropout, initialisation) is neither read nor moved.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

ORDER, TOP, LEFT, FLIP = range(4)  # the numbers drawn for a picture in an epoch


def random_words(seed: int, epoch: np.ndarray, index: np.ndarray, draw: int) -> np.ndarray:
    """Uniform 64-bit words, one for each picture, by (seed, epoch, index, draw) alone.

    Nested SplitMix64 (Steele, Lea and Flood 2014, https://doi.org/10.1145/2714064.2660195): every
    number of the key selects an output of the generator that starts at the word so far.

    Args:
        seed: any integer, taken modulo 2**64.
        epoch, index: (N,) integers >= 0, or shapes that broadcast to (N,).
        draw: which number of that picture, see ORDER, TOP, LEFT, FLIP.

    Returns:
        (N,) uint64.
    """
    word = np.zeros(1, np.uint64)
    for number in ([seed % 2**64], epoch, index, [draw]):
        word = _splitmix64(word, np.asarray(number, np.uint64))
    return word


def _splitmix64(state: np.ndarray, step: np.ndarray) -> np.ndarray:
    word = state + (step + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))


class EpochSampler(Sampler[tuple[int, int]]):
    """Yields keys (epoch, index), so that whoever fetches a picture knows its epoch.

    Args:
        size: pictures in the data set.
        batch_size: pictures in a batch; only `start_batch` needs it.
        seed: with `shuffle`, the order depends on (seed, epoch, size) alone.
        shuffle: False keeps the order of the data set.
    """

    def __init__(self, size: int, *, batch_size: int, seed: int = 0, shuffle: bool = True) -> None:
        self.size, self.batch_size, self.seed, self.shuffle = size, batch_size, seed, shuffle
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Choose the epoch to iterate next, from its batch `start_batch` on (both from 0).

        Raises:
            ValueError: a negative number.
        """
        if epoch < 0 or start_batch < 0:
            raise ValueError(f"epoch and start_batch must be >= 0, got {epoch} and {start_batch}")
        self.epoch, self.start = epoch, start_batch * self.batch_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.epoch
        return ((epoch, index) for index in self._order()[self.start :].tolist())

    def __len__(self) -> int:
        return max(self.size - self.start, 0)

    def _order(self) -> np.ndarray:
        indices = np.arange(self.size)
        if not self.shuffle:
            return indices
        keys = random_words(self.seed, np.array([self.epoch]), indices, ORDER)
        return np.argsort(keys, kind="stable")
