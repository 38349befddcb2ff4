"""Which features are whitened together: the view of feature vectors as blocks.

A convolution sees, per group of channels, vectors of C * T features: C channels, each at the T taps
of the kernel, channel-major as in `weight.flatten(1)`. A joint covariance of all of them would be
too large, so they are dealt into n = C / B blocks of F = B * T features, each whitened by itself.
Patches and weights go through the same view, so the fold needs no bookkeeping of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


def divide_channels(channels: int, block: int) -> int:
    """The largest divisor of `channels` not above `block`: the channels a block really gets.

    Every block then has the same size, no channel is left out and none is mixed with padding.
    20 channels in blocks of 16 become 2 blocks of 10; 17 become 17 blocks of 1.

    Raises:
        ValueError: `block` is below 1.
    """
    if block < 1:
        raise ValueError(f"block must be at least 1 channel, got {block}")
    return next(size for size in range(min(block, channels), 0, -1) if channels % size == 0)


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
        """Blocks that share one whitening matrix, S."""
        return self.count if self.shared else 1

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """(groups, M, C*T) -> (G, S, M, F); a view wherever strides allow one."""
        x = x.unflatten(-1, (-1, self.count, self.unit))  # groups M F/unit n unit
        x = x.permute(0, 3, 1, 2, 4).flatten(-2)  # groups n M F
        return x if self.shared else x.flatten(0, 1).unsqueeze(1)

    def merge(self, x: torch.Tensor) -> torch.Tensor:
        """(G, S, M, F) or (G, S, M, B, T) -> (groups, M, C*T), the inverse of `split`."""
        if not self.shared:
            x = x.squeeze(1).unflatten(0, (self.groups, self.count))
        x = x.reshape(*x.shape[:3], self.features // self.unit, self.unit)
        return x.permute(0, 2, 3, 1, 4).flatten(2)
