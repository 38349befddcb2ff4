"""The Cholesky factor's root against torch's own inverse and factor, in float64."""

import pytest
import torch

from deconv.ops.cholesky import inverse_cholesky
from tests.matrices import covariances


@pytest.mark.parametrize("n_iter", [1, 5, 15])
def test_is_the_inverse_factor_of_the_matrix_and_its_floor(n_iter):
    A = covariances(3, 20)
    floor = torch.linalg.matrix_norm(A, keepdim=True) / 1.5 ** (2 * n_iter)
    factor = torch.linalg.cholesky(A + floor * torch.eye(20))
    D = inverse_cholesky(A, n_iter)
    torch.testing.assert_close(D @ factor, torch.eye(20, dtype=D.dtype).expand(3, 20, 20))
    assert not D.triu(1).any()
    identity = torch.eye(20, dtype=A.dtype)
    torch.testing.assert_close(inverse_cholesky(A - 1e-5 * identity, n_iter, eps=1e-5), D)


def test_amplifies_no_direction_more_than_as_many_steps_of_the_iteration():
    A = covariances(1, 30, eps=1e-9)[0]
    amplification = torch.linalg.matrix_norm(inverse_cholesky(A[None], 5)[0], ord=2)
    assert 0.9 < amplification * A.norm().sqrt() / 1.5**5 < 1


def test_whitens_what_lies_above_the_floor():
    A = covariances(1, 6, eps=0.2)[0]
    D = inverse_cholesky(A[None], 15)[0]
    torch.testing.assert_close(D @ A @ D.T, torch.eye(6, dtype=D.dtype), rtol=0, atol=1e-4)


@pytest.mark.parametrize("n_iter", [1, 5])
def test_gradient_matches_finite_differences(n_iter):
    A = covariances(2, 5).requires_grad_()
    root = lambda a: inverse_cholesky((a + a.mT) / 2, n_iter, eps=0.1).tril()
    assert torch.autograd.gradcheck(root, A)


def test_float32_is_exact_for_the_worst_covariances():
    A = covariances(1, 576, eps=1e-12)
    exact = inverse_cholesky(A)
    error = (inverse_cholesky(A.float()) - exact).abs().max()
    assert error < 5e-5 * exact.abs().max()


def test_a_matrix_that_is_not_finite_gives_nan_and_no_error():
    A = covariances(2, 3)
    A[0, 1, 1] = torch.nan
    D = inverse_cholesky(A)
    assert D[0].isnan().any() and D[1].isfinite().all()


def test_an_infinite_matrix_of_one_number_gives_nan_and_not_zero():
    assert inverse_cholesky(torch.full((1, 1, 1), torch.inf)).isnan().all()
