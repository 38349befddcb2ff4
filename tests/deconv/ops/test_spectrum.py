"""The iteration by eigenvalues against the iteration itself, in float64: values and gradients."""

import pytest
import torch

from deconv.ops.inverse_sqrt import newton_schulz, newton_schulz_from_rows
from deconv.ops.spectrum import RootOfMatrix, RootOfRows, differences, differences_to_last, respond


def random(*shape):
    return torch.randn(shape, dtype=torch.float64)


def assert_same(function, expected, x):
    """Values and gradients of two functions of x."""
    D, exact = function(x), expected(x)
    torch.testing.assert_close(D, exact)
    weight = torch.randn_like(exact)
    gradients = [torch.autograd.grad((root * weight).sum(), x)[0] for root in (D, exact)]
    torch.testing.assert_close(*gradients, rtol=1e-7, atol=1e-9)


def symmetric(function, n_iter):
    return lambda a: function((a + a.mT) / 2, n_iter)


@pytest.mark.parametrize("n_iter", [1, 2, 5, 10])
@pytest.mark.parametrize(("batch", "side"), [(3, 1), (2, 5), (1, 40)])
def test_matrices_have_the_root_that_the_iteration_gives_them(batch, side, n_iter):
    rows = random(batch, 3 * side, side) * torch.logspace(0, -2, side)
    A = (rows.mT @ rows / (3 * side) + 1e-3 * torch.eye(side)).requires_grad_()
    assert_same(symmetric(RootOfMatrix.apply, n_iter), symmetric(newton_schulz, n_iter), A)


@pytest.mark.parametrize("n_iter", [1, 5])
@pytest.mark.parametrize(("batch", "count", "features"), [(2, 3, 7), (1, 1, 4), (2, 20, 50)])
def test_rows_have_the_root_that_the_iteration_gives_them(batch, count, features, n_iter):
    rows = random(batch, count, features)
    rows = (rows - rows.mean(1, keepdim=True) if count > 1 else rows).requires_grad_()
    assert_same(
        lambda x: RootOfRows.apply(x, 1e-3, n_iter),
        lambda x: newton_schulz_from_rows(x, 1e-3, n_iter),
        rows,
    )


def test_equal_eigenvalues_do_no_harm():
    A = torch.eye(4, dtype=torch.float64)[None].requires_grad_()
    assert_same(symmetric(RootOfMatrix.apply, 5), symmetric(newton_schulz, 5), A)


def test_gradients_match_finite_differences():
    rows, square = random(2, 3, 5).requires_grad_(), random(2, 4, 4)
    A = (square @ square.mT).requires_grad_()
    assert torch.autograd.gradcheck(symmetric(RootOfMatrix.apply, 5), A)
    assert torch.autograd.gradcheck(lambda x: RootOfRows.apply(x, 0.1, 5), rows)


def test_divided_differences_are_those_of_the_response():
    x = torch.tensor([0.02, 0.3, 0.5, 0.9], dtype=torch.float64)
    z = respond(x, 5)
    first = (z[:, None] - z) / (x[:, None] - x).fill_diagonal_(1)
    inner = differences(x, 5)
    torch.testing.assert_close(inner - torch.diag(inner.diag()), first)
    to_last, second = differences_to_last(x, 5)
    torch.testing.assert_close(to_last, inner[:, -1])
    expected = (inner[:-1, :-1] - inner[:-1, -1:]) / (x[:-1] - x[-1])
    torch.testing.assert_close(second[:-1, :-1], expected)


def test_a_matrix_that_is_not_finite_gives_nan_and_no_error():
    A = torch.eye(3, dtype=torch.float64).repeat(2, 1, 1)
    A[0, 1, 1] = torch.nan
    D = RootOfMatrix.apply(A, 5)
    assert D[0].isnan().any() and D[1].isfinite().all()
    rows = random(1, 2, 5)
    rows[0, 0, 0] = torch.inf
    assert RootOfRows.apply(rows, 0.1, 5).isnan().any()
