"""The root by resolvents against the iteration that it follows, in float64."""

import pytest
import torch

from deconv.ops.inverse_sqrt import (
    MAX_STEPS,
    inverse_sqrt,
    newton_schulz,
    newton_schulz_response,
)
from deconv.ops.resolvent import TERMS
from scripts.dev import fit_resolvent
from tests.matrices import covariances, follow
from tests.pairwise import loop_over


def root(cov, n_iter=5, eps=0.0):
    return inverse_sqrt(cov, n_iter, "resolvent", eps)


def test_every_direction_is_within_three_quarters_of_a_percent_of_the_iteration():
    for n_iter in range(1, MAX_STEPS + 1):
        x = torch.cat([torch.zeros(1), torch.logspace(-15, 0, 5000), torch.linspace(0, 1, 5000)])
        x = x.double()
        assert (follow(x, n_iter) / newton_schulz_response(x, n_iter) - 1).abs().max() < 0.0075


@pytest.mark.parametrize("n_iter", [1, 5, 9, 15])
def test_is_the_sum_of_its_terms_and_near_the_iteration(n_iter):
    A = covariances(3, 20)
    values, basis = torch.linalg.eigh(A)
    norm = torch.linalg.matrix_norm(A)[:, None]
    exact = (basis * (follow(values / norm, n_iter) / norm.sqrt())[:, None]) @ basis.mT
    D = root(A, n_iter)
    torch.testing.assert_close(D, exact)
    near = newton_schulz(A, n_iter)
    assert torch.linalg.matrix_norm(D - near, ord=2).lt(0.0075 * near.norm(dim=(1, 2))).all()
    torch.testing.assert_close(root(A - 1e-5 * torch.eye(20), n_iter, eps=1e-5), D)


@pytest.mark.parametrize("n_iter", [1, 2, 5, 9, 15])
def test_gradient_matches_finite_differences(n_iter):
    A = covariances(2, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda a: root((a + a.mT) / 2, n_iter, eps=0.1), A)


@pytest.mark.parametrize("n_iter", [5, 15])
def test_float32_is_exact_for_the_worst_covariances(n_iter):
    A = covariances(1, 576, eps=1e-12)
    exact = root(A, n_iter)
    assert (root(A.float(), n_iter) - exact).abs().max() < 5e-5 * exact.abs().max()


@loop_over("n_iter", [1, 5, 9, 15])
def test_from_fewer_rows_than_features_is_the_sum_of_its_terms_of_the_eigenvalues(n_iter):
    rows = torch.randn(2, 6, 20, dtype=torch.float64) * torch.logspace(1, -2, 20)
    cov, eps = rows.mT @ rows / 6, 1e-3
    values, basis = torch.linalg.eigh(cov + eps * torch.eye(20))
    norm = values.norm(dim=1)[:, None]
    exact = (basis * (follow(values / norm, n_iter) / norm.sqrt())[:, None]) @ basis.mT
    found = inverse_sqrt(cov, n_iter, "resolvent", eps, rows)
    torch.testing.assert_close(found, exact)
    single = inverse_sqrt(cov.float(), n_iter, "resolvent", eps, rows.float())
    assert (single - exact).abs().max() < 5e-5 * exact.abs().max()


def test_from_rows_has_the_gradient_of_the_covariance():
    rows = torch.randn(2, 3, 8, dtype=torch.float64)
    cov, weight = rows.mT @ rows / 3, torch.randn(2, 8, 8, dtype=torch.float64)
    gradients = []
    for given in (None, rows):
        source = cov.clone().requires_grad_()
        D = inverse_sqrt(source, 5, "resolvent", 0.1, given)
        gradients.append(torch.autograd.grad((D * weight).sum(), source)[0])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_matrix_that_is_not_finite_gives_nan_and_no_error(bad):
    A = covariances(2, 3)
    A[0, 1, 1] = bad
    D = root(A)
    assert D[0].isnan().all() and D[1].isfinite().all()


def test_an_infinite_norm_gives_nan_and_not_zero():
    assert root(torch.inf * torch.eye(3)[None]).isnan().all()
    cov = 1e30 * torch.eye(3)[None]  # whose squares overflow
    torch.testing.assert_close(root(cov) * 1e15, (root(cov.double()) * 1e15).float())


@pytest.mark.parametrize("n_iter", [1, 3])
def test_the_table_is_what_the_script_finds(n_iter, monkeypatch, capsys):
    monkeypatch.setattr(fit_resolvent, "MAX_STEPS", n_iter)
    fit_resolvent.main()
    line = capsys.readouterr().out.splitlines()[-1]
    number, found = line.partition("  #")[0].rstrip(",").split(": Terms")
    assert (int(number), eval(found)) == (n_iter, tuple(TERMS[n_iter]))


def test_more_steps_than_the_table_has_are_refused():
    with pytest.raises(ValueError, match="at most 15 for resolvents, got 16"):
        root(covariances(1, 3), 16)
