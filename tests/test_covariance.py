"""Mean and covariance against numpy, in float64."""

import numpy as np
import torch

from deconv.covariance import centre, covariance


def test_equals_numpy_for_every_group():
    maps = torch.randn(5, 3 * 7, 10, dtype=torch.float64) + 5
    mean, centred = centre(maps)
    cov = covariance(centred, 3, eps=0.01)
    for g, x in enumerate(maps.transpose(0, 1).flatten(1).chunk(3)):
        np.testing.assert_allclose(mean[0, 7 * g : 7 * g + 7, 0], x.mean(1))
        expected = np.cov(x.numpy(), bias=True) + 0.01 * np.eye(7)
        np.testing.assert_allclose(cov[g], expected, atol=1e-12)


def test_float32_survives_an_offset_much_larger_than_the_spread():
    maps = torch.randn(4000, 3, 1) + 3000
    cov = covariance(centre(maps)[1], 1, eps=1e-6)
    exact = covariance(centre(maps.double())[1], 1, eps=1e-6)
    torch.testing.assert_close(cov, exact.float(), rtol=1e-3, atol=1e-3)


def test_gradient_matches_finite_differences():
    maps = torch.randn(4, 6, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m: covariance(centre(m)[1], 2, 0.1), maps)
    assert torch.autograd.gradcheck(lambda m: centre(m)[0], maps)


def test_no_patches_have_mean_zero_and_covariance_eps():
    mean, centred = centre(torch.empty(0, 12, 5))
    assert mean.shape == (1, 12, 1) and not mean.any()
    torch.testing.assert_close(covariance(centred, 3, 0.5), 0.5 * torch.eye(4).expand(3, 4, 4))
