"""The two products of the method, on vectors that lie along the channels of a map.

Both are 1 x 1 convolutions: matrices times vectors, and the sum of outer products, which is the
gradient of such a convolution for its weight. On a CPU the convolutions of torch multiply float32
numbers up to twice as fast as its matrix product, and take maps as they lie.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F
from torch.nn.grad import conv1d_weight


def transform(matrices: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """A_g v for every vector v of group g.

    Args:
        matrices: (G, d, d).
        maps: (R, G * d, L): R * L vectors in each group.

    Returns:
        (R, G * d, L).
    """
    groups, side = matrices.shape[:2]
    if _convolves(maps):
        return F.conv1d(maps, matrices.reshape(groups * side, side, 1), groups=groups)
    return (matrices @ maps.unflatten(1, (groups, side))).flatten(1, 2)


def outer_products(maps: torch.Tensor, groups: int) -> torch.Tensor:
    """The sum of v v^T over the vectors of each group, (groups, d, d).

    Args:
        maps: (R, groups * d, L).
    """
    side = maps.shape[1] // groups
    if _convolves(maps):
        sums = conv1d_weight(maps, (groups * side, side, 1), maps, groups=groups)
        return sums.reshape(groups, side, side)
    vectors = maps.unflatten(1, (groups, side)).permute(1, 2, 0, 3).flatten(2)
    return vectors @ vectors.mT


def _convolves(maps: torch.Tensor) -> bool:
    return maps.device.type == "cpu" and maps.dtype == torch.float32 and maps.numel() > 0
