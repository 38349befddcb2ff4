"""Products of which a triangle is known to be zero, or to mirror the other: in strips, without it.

For large matrices this leaves out up to half of the work. Strips narrower than STRIP columns would
take longer than the zeros they save, so matrices below two strips are multiplied whole.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.autograd.function import once_differentiable

STRIP = 144


def _strips(size: int) -> Iterator[tuple[int, int]]:
    """First and last column of each strip."""
    ends = [*range(STRIP, size - STRIP + 1, STRIP), size]
    return zip([0, *ends[:-1]], ends, strict=True)


def gram(rows: torch.Tensor) -> torch.Tensor:
    """X^T X of rows X (G, M, F): (G, F, F)."""
    size = rows.shape[-1]
    if size < 2 * STRIP:
        return rows.mT @ rows
    result = rows.new_zeros(rows.shape[0], size, size)
    for first, last in _strips(size):
        result[:, first:last, :last] = rows[..., first:last].mT @ rows[..., :last]
    return result.tril() + result.tril(-1).mT


def times_lower(rows: torch.Tensor, lower: torch.Tensor) -> torch.Tensor:
    """X L of rows (G, R, F) and lower triangular matrices (G, F, F)."""
    if lower.shape[-1] < 2 * STRIP:
        return rows @ lower
    return _TimesLower.apply(rows, lower)


class _TimesLower(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: torch.Tensor, lower: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows, lower)
        result = torch.empty_like(rows)
        for first, last in _strips(lower.shape[-1]):
            for x, matrix, y in zip(rows, lower, result, strict=True):
                torch.mm(x[:, first:], matrix[first:, first:last], out=y[:, first:last])
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows, lower = ctx.saved_tensors
        grad_rows, grad_lower = torch.empty_like(rows), torch.zeros_like(lower)
        for first, last in _strips(lower.shape[-1]):
            for x, matrix, g, grad_x, grad_matrix in zip(
                rows, lower, grad, grad_rows, grad_lower, strict=True
            ):
                torch.mm(g[:, :last], matrix[first:last, :last].T, out=grad_x[:, first:last])
                torch.mm(x[:, first:last].T, g[:, :last], out=grad_matrix[first:last, :last])
        return grad_rows, grad_lower.tril_()
