"""The view of feature vectors as blocks that are whitened together.

Per group of channels, a convolution sees vectors of C*T features: C channels, each at the T taps of
the kernel, channel-major as in `weight.flatten(1)`. One covariance of all features would be too
large. They form C / B blocks of F = B*T features, and each block is whitened separately (Ye et al.,
ICLR 2020, section 3.3). Patches and weights share this view, so folding needs no indices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple, SupportsFloat

from torch import Tensor

from .matmul import transform

LAYOUTS = ("contiguous", "interleaved")


def divide_channels(channels: int, block: int) -> int:
    """Return the largest divisor of `channels` up to `block`: the channels per block, B.

    All blocks then have the same size, and none is padded. 20 channels in blocks of 16 become 2
    blocks of 10; 17 become 17 blocks of 1.

    Raises:
        ValueError: `block` is below 1 or not whole.
    """
    if not isinstance(block, SupportsFloat) or block < 1 or block % 1:
        raise ValueError(f"block must be a whole number of channels, at least 1, got {block!r}")
    return next(size for size in range(int(min(block, channels)), 0, -1) if channels % size == 0)


@dataclass(frozen=True)
class Blocks:
    """The blocks of `groups` x `channels` x `taps` features.

    Args:
        groups: convolution groups; each is whitened separately.
        channels: channels of one group, C.
        size: channels of one block, B; divides `channels`.
        taps: kernel positions, T (1 where single pixels are whitened).
        unit: neighbouring features that stay together. Units go to the blocks in turn.
            F: contiguous blocks; block i has the channels iB ... (i+1)B - 1 with all their taps.
            T: channels are interleaved.
            1: features are interleaved, as in the published code. For most kernels, neighbouring
            taps of a channel then never meet in a block, but taps of more channels do.
        shared: the blocks of a group pool their covariances and share one whitening matrix (the
            paper's choice). Otherwise each block has its own matrix.
    """

    groups: int
    channels: int
    size: int
    taps: int
    unit: int
    shared: bool

    @property
    def count(self) -> int:
        """Blocks per group, C / B."""
        return self.channels // self.size

    @property
    def features(self) -> int:
        """Features per block, F."""
        return self.size * self.taps

    @property
    def matrices(self) -> int:
        """Whitening matrices of the layer, G."""
        return self.groups if self.shared else self.groups * self.count

    @property
    def sharing(self) -> int:
        """Blocks that share one whitening matrix, S."""
        return self.count if self.shared else 1

    def side(self, axis: str) -> int:
        """Return the length d of the vectors along `axis`, see `to_vectors`."""
        return {"joint": self.features, "channel": self.size, "pixel": self.taps}[axis]

    def to_vectors(self, axis: str, maps: Tensor) -> Tensor:
        """View maps (R, groups * C*T, P) as the vectors that `axis` whitens, (R', G * d, L).

        All other dimensions join R' or L, in the order in which they lie in memory. The result is a
        view, unless groups or blocks with their own matrices force a copy.

        Args:
            axis: "joint" (d = F), "channel" (d = B, at every tap) or "pixel" (d = T, in every
                channel).
            maps: R maps of P positions; a weight is `out` maps of one position.
        """
        layout, (count, _, positions) = self._find_layout(axis), maps.shape
        if layout.order is not None:
            maps = maps.reshape(count, *layout.lengths, positions).permute(layout.order)
        return maps.reshape(layout.before * count, layout.vector, layout.after * positions)

    def from_vectors(self, axis: str, vectors: Tensor, shape: Sequence[int]) -> Tensor:
        """Invert `to_vectors` for maps of `shape`."""
        layout = self._find_layout(axis)
        if layout.order is not None:
            lengths = shape[0], *layout.lengths, shape[2]
            vectors = vectors.reshape([lengths[i] for i in layout.order]).permute(layout.inverse)
        return vectors.reshape(shape)

    def pool(self, mean: Tensor) -> Tensor:
        """Average a mean patch (groups * C*T,) over the blocks that share a matrix, (G * F,)."""
        return self.to_vectors("joint", mean[None, :, None]).mean((0, 2))

    def expand(self, pooled: Tensor) -> Tensor:
        """Repeat the mean `pooled` (G * F,) for all blocks that share a matrix, (groups * C*T,)."""
        maps = pooled.new_empty(1, self.groups * self.channels * self.taps, 1)
        vectors = pooled[:, None].expand_as(self.to_vectors("joint", maps))
        return self.from_vectors("joint", vectors, maps.shape).flatten()

    def _find_layout(self, axis: str) -> _Layout:
        """Name each dimension by a letter: r maps, g groups, n blocks, b channels, t taps, p."""
        lengths = {"g": self.groups, "n": self.count, "b": self.size, "t": self.taps}
        features = {self.features: "nbt", self.taps: "bnt", 1: "btn"}[self.unit]
        vector = {"joint": "bt", "channel": "b", "pixel": "t"}[axis]
        rest = features if self.shared else features.replace("n", "")
        before, after = rest.split(vector[0], 1)
        after = "".join(name for name in after if name not in vector)
        middle = f"g{vector}" if self.shared else f"gn{vector}"
        names, wanted = f"rg{features}p", f"r{before}{middle}{after}p"
        order = tuple(names.index(name) for name in wanted)
        return _Layout(
            tuple(lengths[name] for name in names[1:-1]),
            None if names == wanted else order,
            tuple(wanted.index(name) for name in names),
            *(prod([lengths[name] for name in part]) for part in (before, middle, after)),
        )


class _Layout(NamedTuple):
    """The reshape and the permutation of `Blocks.to_vectors`."""

    lengths: tuple[int, ...]  # dimensions of the features in memory
    order: tuple[int, ...] | None  # wanted order of all dimensions; None: as in memory
    inverse: tuple[int, ...]
    before: int  # factors of R', of G * d and of L
    vector: int
    after: int


def make_blocks(
    groups: int, channels: int, block: int, taps: int, layout: str, shared: bool, joint: bool
) -> Blocks:
    """Return blocks of the largest admissible size.

    Args:
        groups: convolution groups.
        channels: channels of one group, C.
        block: largest number of channels per block.
        taps: kernel positions, T.
        layout: "contiguous" or "interleaved".
        shared: the blocks of a group share one matrix.
        joint: interleave single features. Otherwise channels, as separate axes need them whole.

    Raises:
        ValueError: `layout` is unknown, or `block` is not a whole number from 1.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")
    size = divide_channels(channels, block)
    interleaved = 1 if joint else taps
    unit = size * taps if layout == "contiguous" else interleaved
    return Blocks(groups, channels, size, taps, unit, shared)


def transform_along(axis: str, maps: Tensor, matrix: Tensor, blocks: Blocks) -> Tensor:
    """Multiply the vectors along an axis of maps (R, groups * C*T, P) by matrices (G, d, d)."""
    return blocks.from_vectors(axis, transform(matrix, blocks.to_vectors(axis, maps)), maps.shape)
