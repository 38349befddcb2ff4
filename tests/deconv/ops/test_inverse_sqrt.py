"""The iteration against eigenvalues in float64."""

import pytest
import torch

from deconv.ops.inverse_sqrt import (
    ROOTS,
    inverse_sqrt,
    newton_schulz,
    newton_schulz_response,
)


def random_spd(batch, side, low=1e-1, seed=0):
    """Symmetric matrices with known eigenvalues between `low` and 1, float64."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(batch, side, side, generator=generator, dtype=torch.float64)
    basis, _ = torch.linalg.qr(noise)
    values = torch.logspace(0, torch.tensor(low).log10().item(), side, dtype=torch.float64)
    return basis @ torch.diag(values) @ basis.mT


def exact(A):
    values, basis = torch.linalg.eigh(A)
    return basis @ torch.diag_embed(values.rsqrt()) @ basis.mT


def response(values, n_iter):
    """Apply the recursion to eigenvalues."""
    norm = values.norm()
    y, z = values / norm, torch.ones_like(values)
    for _ in range(n_iter):
        t = (3 - z * y) / 2
        y, z = y * t, t * z
    return z / norm.sqrt()


@pytest.mark.parametrize("side", [1, 2, 9, 144])
def test_converges_to_the_exact_root(side):
    A = random_spd(3, side)
    torch.testing.assert_close(inverse_sqrt(A, n_iter=20), exact(A), rtol=1e-9, atol=1e-9)
    more = A + 0.3 * torch.eye(side, dtype=A.dtype)
    torch.testing.assert_close(inverse_sqrt(A, 20, eps=0.3), exact(more), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("n_iter", [1, 2, 5])
def test_each_step_acts_on_eigenvalues_as_the_scalar_recursion(n_iter):
    A = random_spd(1, 12, low=1e-4)
    values, basis = torch.linalg.eigh(A[0])
    expected = basis @ torch.diag(response(values, n_iter)) @ basis.mT
    torch.testing.assert_close(inverse_sqrt(A, n_iter)[0], expected)


def test_five_steps_leave_the_documented_soft_floor():
    # Output standard deviation by eigenvalue relative to the Frobenius norm, as published.
    shares = torch.tensor([0.1, 0.05, 0.02, 0.01, 1e-3], dtype=torch.float64)
    big = (1 - shares.square().sum()).sqrt()
    values = torch.cat([big[None], shares])
    D = inverse_sqrt(torch.diag(values)[None], 5)[0]
    std = torch.diag(D)[1:] * shares.sqrt()
    expected = torch.tensor([0.997, 0.967, 0.82, 0.66, 0.24], dtype=torch.float64)
    torch.testing.assert_close(std, expected, rtol=0, atol=6e-3)


def test_result_is_symmetric_and_independent_of_scale():
    A = random_spd(2, 30, low=1e-3)
    D = inverse_sqrt(A, 5)
    torch.testing.assert_close(D, D.mT)
    torch.testing.assert_close(inverse_sqrt(1e8 * A, 5), 1e-4 * D)


def test_gradient_matches_finite_differences():
    A = random_spd(2, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda a: inverse_sqrt((a + a.mT) / 2, 5), A)


@pytest.mark.parametrize("root", ROOTS)
def test_every_root_returns_a_symmetric_gradient(root):
    A = random_spd(2, 4).requires_grad_()
    D = inverse_sqrt(A, 5, root)
    (grad,) = torch.autograd.grad(D, A, torch.randn_like(D))
    torch.testing.assert_close(grad, grad.mT)


def test_refuses_zero_steps():
    with pytest.raises(ValueError, match="n_iter.*0"):
        inverse_sqrt(torch.eye(2)[None], 0)


@pytest.mark.parametrize(("count", "features"), [(1, 3), (5, 12), (20, 8)])
@pytest.mark.parametrize("eps", [1e-2, 1e-5])
def test_from_rows_equals_the_iteration_on_the_covariance(count, features, eps):
    rows = torch.randn(2, count, features, dtype=torch.float64, requires_grad=True)
    cov = rows.mT @ rows / count
    expected, actual = newton_schulz(cov, 5, eps), inverse_sqrt(cov, 5, eps=eps, rows=rows)
    torch.testing.assert_close(actual, expected)
    weight = torch.randn_like(expected)
    gradients = [torch.autograd.grad((D * weight).sum(), rows)[0] for D in (actual, expected)]
    torch.testing.assert_close(*gradients)


def test_from_rows_is_as_exact_in_float32_as_the_iteration():
    rows = torch.randn(1, 64, 512) * torch.logspace(0, -3, 512)
    cov = rows.mT @ rows / 64
    exact = inverse_sqrt(cov.double(), eps=1e-5, rows=rows.double())
    error = (inverse_sqrt(cov, eps=1e-5, rows=rows) - exact).abs().max()
    assert error < 1e-5 * exact.abs().max()


@pytest.mark.parametrize(("count", "features"), [(2, 16), (31, 64), (32, 256)])
def test_few_rows_whiten_within_a_hundredth_in_float32_after_any_number_of_steps(count, features):
    rows = torch.randn(1, count, features, dtype=torch.float64) * torch.logspace(1, -1, features)
    rows = (rows - rows.mean(1, keepdim=True)).float()
    cov, exact_rows = rows.mT @ rows / count, rows.double()
    for n_iter in range(1, 16):
        D = newton_schulz(exact_rows.mT @ exact_rows / count, n_iter, 1e-5)
        found = inverse_sqrt(cov, n_iter, eps=1e-5, rows=rows).double()
        errors = (found - D).norm() / D.norm(), (exact_rows @ (found - D)).norm()
        assert max(errors[0], errors[1] / (exact_rows @ D).norm()) < 1e-2, n_iter


def test_the_response_is_that_of_the_scalar_recursion():
    values = torch.tensor([0.9, 0.4, 0.1, 1e-3], dtype=torch.float64)
    norm = values.norm()
    found = newton_schulz_response(values / norm, 5) / norm.sqrt()
    torch.testing.assert_close(found, response(values, 5))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_matrix_whose_norm_is_not_finite_gives_nan_and_no_error(bad):
    A = torch.eye(3, dtype=torch.float64).repeat(2, 1, 1)
    A[0, 1, 1] = bad
    D = inverse_sqrt(A, 5)
    assert D[0].isnan().any() and D[1].isfinite().all()
    rows = torch.ones(1, 2, 5, dtype=torch.float64)
    rows[0, 0, 0] = bad
    assert inverse_sqrt(A, 5, eps=0.1, rows=rows).isnan().any()
