"""Patches -> their mean and regularised covariance, of one process or of all together."""

from __future__ import annotations

import torch
from torch import distributed

from .products import outer_products, transform


def centre(maps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean of every feature, and the patches without it.

    NOTE (differs from the published code): blocks that share a matrix keep a mean each. Pooling the
    means too leaves features off centre and their offsets inside the covariance.

    Args:
        maps: (N, C*T, P), the features of P patches in each of N pictures.

    Returns:
        mean (1, C*T, 1), 0 for no patches at all, and centred maps (N, C*T, P), which must be used
        through second moments alone: see `_Centre`.
    """
    return _Centre.apply(maps)


class _Centre(torch.autograd.Function):
    """Takes the gradient of the centred maps for centred too, and does not centre it again.

    Which it is wherever they are used through second moments alone: these do not change to first
    order when the mean is off.
    """

    @staticmethod
    def forward(ctx, maps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.count = max(maps.shape[0] * maps.shape[2], 1)
        mean = maps.sum(dim=(0, 2), keepdim=True) / ctx.count
        return mean, maps - mean

    @staticmethod
    def backward(ctx, grad_mean: torch.Tensor, grad_maps: torch.Tensor) -> torch.Tensor:
        return grad_maps + grad_mean / ctx.count


def covariance(maps: torch.Tensor, groups: int, eps: float) -> torch.Tensor:
    """Cov = mean v v^T + eps I of the vectors v of each group.

    They are centred before the product: E[xx^T] - mu mu^T would cancel in float32.

    Args:
        maps: (R, groups * d, L): R * L vectors of mean zero in each group; blocks that share a
            matrix are simply more vectors.
        eps: added to the diagonal, in units of variance.

    Returns:
        (groups, d, d), symmetric, positive definite for eps > 0.
    """
    return _SecondMoment.apply(maps, groups, eps)


class _SecondMoment(torch.autograd.Function):
    """For the gradient A of the matrix, its own is (A + A^T) v: one product; autograd takes two."""

    @staticmethod
    def forward(ctx, maps: torch.Tensor, groups: int, eps: float) -> torch.Tensor:
        ctx.save_for_backward(maps)
        ctx.count = max(maps.shape[0] * maps.shape[2], 1)
        cov = outer_products(maps, groups) / ctx.count
        cov.diagonal(dim1=-2, dim2=-1).add_(eps)
        return cov

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (maps,) = ctx.saved_tensors
        return transform((grad + grad.mT) / ctx.count, maps), None, None


def several_processes() -> bool:
    """Whether this process is one of several that torch.distributed has brought together."""
    initialized = distributed.is_available() and distributed.is_initialized()
    return initialized and distributed.get_world_size() > 1


def average_across(count: int, *means: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Averages over the rows of all processes from the averages over each one's: one message.

    Every process sends M * [1, means], and the sum is divided by its first element. A process
    without rows weighs nothing, but must take part, as in every collective.

    The gradient is that of the sum of all processes' losses: backward adds up, in one message of
    the same size, what the averages of all rows are worth to each process's loss. Parameter
    gradients then need only be added too, to be those of one process with all rows. (DDP divides
    them by the number of processes: they are those of the average loss.)

    Args:
        count: M, rows of this process.
        means: any shapes, the same in all processes; finite where M is 0.

    Returns:
        M of all processes together, (), and the averages, 0 for no rows at all.
    """
    parts = [mean.flatten() for mean in (means[0].new_ones(()), *means)]
    total, *sums = _SumAcross.apply(count * torch.cat(parts)).split([p.numel() for p in parts])
    averages = (part / total.clamp(min=1) for part in sums)
    reshaped = (part.reshape(mean.shape) for part, mean in zip(averages, means, strict=True))
    return total.squeeze(0), *reshaped


class _SumAcross(torch.autograd.Function):
    """The sum of all processes' tensors; so is its gradient."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        return _SumAcross.apply(grad)
