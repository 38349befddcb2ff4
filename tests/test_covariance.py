"""Mean and covariance against numpy, in float64."""

import numpy as np
import torch

from deconv.covariance import centre, covariance


def test_equals_numpy_for_every_block_of_its_own():
    rows = torch.randn(3, 1, 50, 7, dtype=torch.float64) + 5
    mean, centred = centre(rows)
    cov = covariance(centred.flatten(1, 2), eps=0.01)
    for g in range(3):
        x = rows[g, 0].numpy()
        np.testing.assert_allclose(mean[g, 0, 0], x.mean(0))
        expected = np.cov(x, rowvar=False, bias=True) + 0.01 * np.eye(7)
        np.testing.assert_allclose(cov[g], expected, atol=1e-12)


def test_blocks_that_share_pool_their_covariances_around_means_of_their_own():
    rows = torch.randn(1, 4, 50, 7, dtype=torch.float64)
    rows += 100 * torch.arange(4).reshape(4, 1, 1)
    _, centred = centre(rows)
    parts = [np.cov(rows[0, s].numpy(), rowvar=False, bias=True) for s in range(4)]
    np.testing.assert_allclose(
        covariance(centred.flatten(1, 2), 0.01)[0],
        np.mean(parts, axis=0) + 0.01 * np.eye(7),
        atol=1e-11,
    )


def test_float32_survives_an_offset_much_larger_than_the_spread():
    rows = torch.randn(1, 1, 4000, 3) + 3000
    cov = covariance(centre(rows)[1].flatten(1, 2), eps=1e-6)[0]
    exact = covariance(centre(rows.double())[1].flatten(1, 2), eps=1e-6)[0]
    torch.testing.assert_close(cov, exact.float(), rtol=1e-3, atol=1e-3)


def test_gradient_matches_finite_differences():
    rows = torch.randn(2, 2, 5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda r: covariance(centre(r)[1].flatten(1, 2), 0.1), rows)


def test_no_rows_have_mean_zero_and_covariance_eps():
    mean, centred = centre(torch.empty(2, 3, 0, 4))
    assert mean.shape == (2, 3, 1, 4) and not mean.any()
    cov = covariance(centred.flatten(1, 2), eps=0.5)
    torch.testing.assert_close(cov, 0.5 * torch.eye(4).expand(2, 4, 4))
