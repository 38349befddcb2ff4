"""Published layers and their checkpoints."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import deconv
from deconv import PUBLISHED, FastDeconv, whiteness
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


def test_published_numerics_whiten_images_in_0_to_1_more():
    def median(n_iter, **options):
        layer = FastDeconv(3, 8, 3, padding=1, n_iter=n_iter, **options)
        layer(images)
        (row,) = whiteness(layer, images)
        return torch.linalg.eigvalsh(row.covariances[1]).median()

    torch.manual_seed(0)  # colours that differ little, as in photographs
    noise = torch.randn(64, 1, 38, 38) + 0.2 * torch.randn(64, 3, 38, 38)
    images = (0.5 + F.avg_pool2d(noise, 7, stride=1)).clamp(0, 1)
    assert median(5, **PUBLISHED) > 1.2 * median(5)
    assert median(15, **PUBLISHED) > 0.9 and median(15) < 0.3


def test_published_numerics_fit_all_that_takes_keywords_of_a_layer():
    model = nn.Sequential(nn.Conv2d(80, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 2))
    assert "FastDeconv" in str(deconv.plan(model, **PUBLISHED))
    for layer in (
        deconv.convert(model, **PUBLISHED)[0],
        deconv.FastDeconv1d(80, 8, 3, **PUBLISHED),
    ):
        assert (layer.eps, layer.block, layer.root) == (1e-5, 64, "newton")
        assert layer.rows_per_feature == 0 and layer.layout == "interleaved" and layer.shared
