"""What the Newton-Schulz iteration does, carried by an eigendecomposition: the same D, sooner.

On a CPU one eigendecomposition of A with four products for its gradient takes less than the
products of the iteration and of its backward. Every iterate is a polynomial of A, so the iteration
acts on each eigenvalue by itself:

    A / |A|_F = U diag(x) U^T,    D = U diag(z) U^T / sqrt(|A|_F),
    z <- z t,  t = (3 - x z^2) / 2,  starting at z = 1                          (y = x z throughout)

The gradient of such a function f is that of its eigenvalues, with divided differences f[x_i, x_j] =
(z_i - z_j) / (x_i - x_j) for the directions between them. They follow the recursion too, by the
product rule for differences, (f g)[i, j] = f_i g[i, j] + f[i, j] g_j, so nothing is ever divided by
the distance of two eigenvalues.
"""

from __future__ import annotations

import math

import torch
from torch.autograd.function import once_differentiable


def respond(x: torch.Tensor, n_iter: int) -> torch.Tensor:
    """z after `n_iter` steps, for eigenvalues x (..., d) in units of |A|_F."""
    z = torch.ones_like(x)
    for _ in range(n_iter):
        z = z * (1.5 - 0.5 * x * z.square())
    return z


def differences(x: torch.Tensor, n_iter: int) -> torch.Tensor:
    """First divided differences f[x_i, x_j] of `respond`, (..., d, d), for x (..., d)."""
    z, first = torch.ones_like(x), None
    for _ in range(n_iter):
        grown = -0.5 * _outer(z, z.square())
        first = grown if first is None else first * _slope(x, z) + grown
        z = z * (1.5 - 0.5 * x * z.square())
    return first


def differences_to_last(x: torch.Tensor, n_iter: int) -> tuple[torch.Tensor, torch.Tensor]:
    """First and second divided differences to the last eigenvalue.

    Args:
        x: (..., d).

    Returns:
        f[x_i, x_d] (..., d) and f[x_i, x_j, x_d] (..., d, d).
    """
    z, first = torch.ones_like(x), torch.zeros_like(x)
    second = x.new_zeros(*x.shape, x.shape[-1])
    for _ in range(n_iter):
        both, last = first * (z + z[..., -1:]), z[..., -1:]
        slope = _slope(x, z)
        bend = (x * both + last.square())[..., None, :] + _outer(x * z, first)
        second = second * slope - 0.5 * (first[..., None] * bend + _outer(z, both))
        first = first * slope[..., -1] - 0.5 * z * last.square()
        z = z * (1.5 - 0.5 * x * z.square())
    return first, second


def _slope(x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """What a step multiplies f[x_i, x_j] by: t_j - z_i (x_i z_i + x_i z_j) / 2."""
    w = x * z.square()
    return (1.5 - 0.5 * w)[..., None, :] - 0.5 * (w[..., None] + _outer(x * z, z))


def _outer(column: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    return column[..., :, None] * row[..., None, :]


def root_of_matrix(cov: torch.Tensor, n_iter: int) -> tuple[torch.Tensor, ...]:
    """D of A (G, d, d), and what it was made of: x (G, d), U (G, d, d) and |A|_F (G, 1)."""
    norm = torch.linalg.matrix_norm(cov)[:, None]
    x, basis = torch.linalg.eigh(_scaled(cov, norm))
    scale = norm.fmod(math.inf).rsqrt()  # NaN, and not 0, for an infinite norm
    return (basis * (respond(x, n_iter) * scale)[:, None]) @ basis.mT, x, basis, norm


class RootOfMatrix(torch.autograd.Function):
    """`root_of_matrix` with a gradient."""

    @staticmethod
    def forward(ctx, cov: torch.Tensor, n_iter: int) -> torch.Tensor:
        root, *parts = root_of_matrix(cov, n_iter)
        ctx.n_iter = n_iter
        ctx.save_for_backward(*parts)
        return root

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        x, basis, norm = ctx.saved_tensors
        turned = basis.mT @ (grad + grad.mT).mul_(0.5) @ basis
        inner = differences(x, ctx.n_iter) * turned
        # D = Z(A / |A|) / sqrt(|A|), and |A| depends on A as well, its gradient being A / |A|.
        own = turned.diagonal(dim1=-2, dim2=-1) * respond(x, ctx.n_iter)
        diagonal = inner.diagonal(dim1=-2, dim2=-1)
        scale = -(0.5 * own + diagonal * x).sum(-1, keepdim=True)
        diagonal += scale * x
        return basis @ inner @ basis.mT * norm[..., None] ** -1.5, None


class RootOfRows(torch.autograd.Function):
    """D of A = X^T X + eps I from X (G, M, d), M < d, by the M eigenvalues of X X^T.

    Every other direction has the eigenvalue eps, x_0 in units of |A|_F. So with R = U^T X

        D = (z_0 I + R^T diag(f[x_i, x_0]) R / |A|_F) / sqrt(|A|_F),

    and of the gradient of f only the part within the rows of X is needed, as X is zero elsewhere.
    """

    @staticmethod
    def forward(ctx, rows: torch.Tensor, eps: float, n_iter: int) -> torch.Tensor:
        gram, features = rows @ rows.mT, rows.shape[-1]
        trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)
        square = gram.square().sum((-2, -1))[:, None]
        norm = (features * eps**2 + 2 * eps * trace + square).sqrt()  # |A|_F
        norm = norm.fmod(math.inf)  # NaN for infinity, which would make D 0
        x, basis = torch.linalg.eigh(_scaled(gram, norm))
        least = eps / norm
        x = torch.cat([x.clamp(min=0) + least, least], dim=-1)
        first, second = differences_to_last(x, n_iter)
        turned = basis.mT @ rows  # R
        ctx.save_for_backward(x, basis, turned, norm, first, second)
        ctx.n_iter = n_iter
        D = turned.mT @ ((first[:, :-1] / norm)[..., None] * turned)
        D.diagonal(dim1=-2, dim2=-1).add_(respond(least, n_iter))
        return D * norm[..., None].rsqrt()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        x, basis, turned, norm, first, second = ctx.saved_tensors
        grad = (grad + grad.mT).mul_(0.5)
        product = turned @ grad  # R S, S the symmetric part of the gradient
        square = product @ turned.mT / norm[..., None]  # R S R^T / |A|
        trace = grad.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)
        diagonal = square.diagonal(dim1=-2, dim2=-1)
        to_least, at_least = first[:, :-1], first[:, -1:]
        inner, bend = second[:, :-1, :-1], second[:, :-1, -1]
        # |A| depends on A: what D = Z(A / |A|) / sqrt(|A|) loses when |A| grows
        slope = x[:, :-1] * (inner.diagonal(dim1=-2, dim2=-1) + bend) + at_least
        loss = trace * (0.5 * respond(x[:, -1:], ctx.n_iter) + x[:, -1:] * at_least)
        loss = loss + ((0.5 * to_least + slope) * diagonal).sum(-1, keepdim=True)
        within = inner * square - torch.diag_embed(loss * x[:, :-1])
        result = basis @ (within @ turned + to_least[..., None] * product)
        return 2 * result * norm[..., None] ** -1.5, None, None


def _scaled(matrix: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """matrix / norm; zeros where that is not finite, which the decomposition would not survive."""
    norm = norm[..., None]
    return torch.where(norm.isfinite(), matrix / norm, 0.0)
