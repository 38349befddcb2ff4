"""The covariance behind a published whitening matrix."""

import pytest
import torch

from deconv.ops.inverse_sqrt import inverse_sqrt
from deconv.published import covariance_behind

ROOTS = "newton", "cholesky"  # that there were


@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("n_iter", [1, 5, 15])
def test_covariance_behind_is_the_way_back_through_the_root(root, n_iter):
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(2, 12, 12, dtype=torch.float64)).Q
    cov = (basis * torch.logspace(1, -2, 12, dtype=torch.float64)) @ basis.mT
    whiten = inverse_sqrt(cov, n_iter, root, 1e-2)
    found = covariance_behind(whiten, n_iter, root, 1e-2)
    again = inverse_sqrt(found, n_iter, root, 1e-2)
    torch.testing.assert_close(again, whiten, rtol=0, atol=3e-4)
