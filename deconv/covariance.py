"""Rows -> their mean and regularised covariance, of one process or of all together."""

from __future__ import annotations

import torch
from torch import distributed

from .triangle import gram


def centre(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean of every feature, and the rows without it.

    NOTE (differs from the published code): blocks that share a matrix keep a mean each. Pooling the
    means too leaves features off centre and their offsets inside the covariance.

    Args:
        rows: (G, S, M, F), M rows of F features for S blocks, G times.

    Returns:
        mean (G, S, 1, F), 0 for no rows at all, and centred rows (G, S, M, F).
    """
    return _Centre.apply(rows)


class _Centre(torch.autograd.Function):
    """Its gradient takes that of the centred rows for centred, and does not centre it again.

    That holds wherever they are used through second moments alone, as here: these do not change to
    first order when the mean is off.
    """

    @staticmethod
    def forward(ctx, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.count = max(rows.shape[2], 1)
        mean = rows.sum(dim=2, keepdim=True) / ctx.count
        return mean, rows - mean

    @staticmethod
    def backward(ctx, grad_mean: torch.Tensor, grad_rows: torch.Tensor) -> torch.Tensor:
        return grad_rows + grad_mean / ctx.count


def covariance(centred: torch.Tensor, eps: float) -> torch.Tensor:
    """Cov = mean_m x_m x_m^T + eps I of centred rows.

    The rows are centred before the product: E[xx^T] - mu mu^T would cancel in float32.

    Args:
        centred: (G, M, F), M rows of mean zero; blocks that share a matrix are simply more rows.
        eps: added to the diagonal, in units of variance.

    Returns:
        (G, F, F), symmetric, positive definite for eps > 0.
    """
    return _SecondMoment.apply(centred, eps)


class _SecondMoment(torch.autograd.Function):
    """X^T X / M + eps I. Its gradient, X (G + G^T) / M, is one product; autograd takes two."""

    @staticmethod
    def forward(rows: torch.Tensor, eps: float) -> torch.Tensor:
        cov = gram(rows).div_(max(rows.shape[1], 1))
        cov.diagonal(dim1=-2, dim2=-1).add_(eps)
        return cov

    @staticmethod
    def setup_context(ctx, inputs: tuple[torch.Tensor, float], output: torch.Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (rows,) = ctx.saved_tensors
        # Transposed twice, so that the gradient lies in memory as the rows do.
        return ((grad + grad.mT) / max(rows.shape[1], 1) @ rows.mT).mT, None


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
