"""Feature map -> the patches a convolution sees, as rows of a matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def sample_patches(
    x: torch.Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
) -> torch.Tensor:
    """Collect the patches of an already padded feature map at every `stride`-th position.

    The rows are strided windows of x, gathered in one copy. A stride above the kernel size visits
    only some pixels, which is what makes sampled statistics cheap.

    Args:
        x: (N, C, *size), any number of spatial dimensions, padding included.
        kernel_size: per spatial dimension, in pixels.
        stride: distance of two patches, in input pixels, per dimension.
        dilation: distance of two taps, in input pixels, per dimension.
        groups: convolution groups; rows of different groups are kept apart.

    Returns:
        (groups, M, C/groups * T) with M = N * positions and T = prod(kernel_size); features are
        channel-major, as in `weight.flatten(1)`.

    Raises:
        RuntimeError: x is smaller than the kernel (from torch).
    """
    dims = len(kernel_size)
    for dim, (k, s, d) in enumerate(zip(kernel_size, stride, dilation, strict=True), start=2):
        x = x.unfold(dim, (k - 1) * d + 1, s)[..., ::d]  # N C L... K...
    x = x.unflatten(1, (groups, -1))
    # groups C K... N L...: features outermost, for long inner loops and blocks that are views
    x = x.permute(1, 2, *range(3 + dims, 3 + 2 * dims), 0, *range(3, 3 + dims))
    return x.reshape(groups, x.shape[1 : 2 + dims].numel(), -1).mT
