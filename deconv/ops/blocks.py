"""Which features are whitened together: the view of feature vectors as blocks.

A convolution sees, per group of channels, vectors of C * T features: C channels, each at the T taps
of the kernel, channel-major as in `weight.flatten(1)`. A joint covariance of all of them would be
too large, so they are dealt into n = C / B blocks of F = B * T features, each whitened by itself.
Patches and weights go through the same view, so the fold needs no bookkeeping of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch

from .matmul import transform


def divide_channels(channels: int, block: int) -> int:
    """The largest divisor of `channels` not above `block`: the channels a block really gets.

    Every block then has the same size, no channel is left out and none is mixed with padding.
    20 channels in blocks of 16 become 2 blocks of 10; 17 become 17 blocks of 1.

    Raises:
        ValueError: `block` is below 1 or not whole.
    """
    if block < 1 or block % 1:
        raise ValueError(f"block must be a whole number of channels, at least 1, got {block}")
    return next(size for size in range(int(min(block, channels)), 0, -1) if channels % size == 0)


@dataclass(frozen=True)
class Blocks:
    """How the features of `groups` x `channels` x `taps` fall into blocks.

    Args:
        groups: convolution groups; each is whitened by itself.
        channels: channels of one group, C.
        size: channels of one block, B; divides `channels`.
        taps: kernel positions, T (1 where only channels are whitened).
        unit: neighbouring features that stay together when they are dealt to the blocks in turn,
            like cards. F: contiguous blocks, block i has the channels iB ... (i+1)B - 1 with all
            their taps, and every view is free of copies. T: channels are dealt. 1: features are
            dealt, as the published code does; for most kernels no two neighbouring taps of a
            channel then meet in a block, but taps of many more channels do.
        shared: all blocks of a group pool their covariances and share one whitening matrix (the
            paper's choice), otherwise each block has its own.
    """

    groups: int
    channels: int
    size: int
    taps: int
    unit: int
    shared: bool

    @property
    def count(self) -> int:
        """Blocks of one group, n."""
        return self.channels // self.size

    @property
    def features(self) -> int:
        """Features of one block, F."""
        return self.size * self.taps

    @property
    def matrices(self) -> int:
        """Whitening matrices of the layer, G."""
        return self.groups if self.shared else self.groups * self.count

    @property
    def sharing(self) -> int:
        """Blocks that share one whitening matrix."""
        return self.count if self.shared else 1

    def side(self, axis: str) -> int:
        """Features of a vector along an axis, d, see `along`."""
        return {"joint": self.features, "channel": self.size, "pixel": self.taps}[axis]

    def to_vectors(self, axis: str, x: torch.Tensor) -> torch.Tensor:
        """The vectors that an axis whitens: (R, groups * C*T, P) -> (R', G * d, L).

        What is not whitened together goes to R' or L, wherever it lies in memory: a view, unless
        groups or blocks with matrices of their own force a copy.

        Args:
            axis: "joint" (d = F), "channel" (d = B, at every tap) or "pixel" (d = T, in every
                channel).
            x: R maps of P positions; weights are maps of one.
        """
        layout, (count, _, positions) = _find_layout(self, axis), x.shape
        if layout.order is not None:
            x = x.reshape(count, *layout.lengths, positions).permute(layout.order)
        return x.reshape(layout.before * count, layout.vector, layout.after * positions)

    def from_vectors(self, axis: str, y: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """What `along` has made of a tensor of `shape` as it was: its inverse."""
        layout = _find_layout(self, axis)
        if layout.order is not None:
            lengths = shape[0], *layout.lengths, shape[2]
            y = y.reshape([lengths[i] for i in layout.order]).permute(layout.inverse)
        return y.reshape(shape)


class _Layout(NamedTuple):
    """How vectors along an axis lie among features: `Blocks.to_vectors` in numbers."""

    lengths: tuple[int, ...]  # of the dimensions of features as they lie
    order: tuple[int, ...] | None  # in which they are wanted, maps first; None: as they lie
    inverse: tuple[int, ...]
    before: int  # vectors of a map and position that go to R', to G * d and to L
    vector: int
    after: int


def _lay_out(blocks: Blocks, axis: str) -> _Layout:
    # Dimensions by letters: maps, groups, blocks, channels, taps, positions.
    lengths = {"g": blocks.groups, "n": blocks.count, "b": blocks.size, "t": blocks.taps}
    features = {blocks.features: "nbt", blocks.taps: "bnt", 1: "btn"}[blocks.unit]
    vector = {"joint": "bt", "channel": "b", "pixel": "t"}[axis]
    rest = features if blocks.shared else features.replace("n", "")
    before, after = rest.split(vector[0], 1)
    after = "".join(name for name in after if name not in vector)
    middle = f"g{vector}" if blocks.shared else f"gn{vector}"
    names, wanted = f"rg{features}p", f"r{before}{middle}{after}p"
    order = tuple(names.index(name) for name in wanted)
    return _Layout(
        tuple(lengths[name] for name in names[1:-1]),
        None if names == wanted else order,
        tuple(wanted.index(name) for name in names),
        *(prod([lengths[name] for name in part]) for part in (before, middle, after)),
    )


_cached_layout = lru_cache(maxsize=256)(_lay_out)


def _find_layout(blocks: Blocks, axis: str) -> _Layout:
    # A compiler looks through the cache, and warns that it does.
    return (_lay_out if torch.compiler.is_compiling() else _cached_layout)(blocks, axis)


def transform_along(
    axis: str, maps: torch.Tensor, matrix: torch.Tensor, blocks: Blocks
) -> torch.Tensor:
    """Multiply the vectors along an axis of maps (R, groups * C*T, P) by matrices (G, d, d)."""
    return blocks.from_vectors(axis, transform(matrix, blocks.to_vectors(axis, maps)), maps.shape)
