"""deconv.whiteness: against numbers that are known, and on networks."""

import math

import pytest
import torch
from torch import nn

from deconv import Delinear, FastDeconv, FastDeconv1d, FastDeconvTranspose2d, whiteness


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def of_variances(values, count=4096):
    """Rows with exactly these variances in turned directions, and means that are not 0."""
    rows = torch.linalg.qr(torch.randn(count, len(values), dtype=torch.float64)).Q
    rows = torch.linalg.qr(rows - rows.mean(0)).Q * count**0.5
    basis = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64)).Q
    return rows * torch.tensor(values).sqrt() @ basis + 3


def test_figures_are_those_of_known_eigenvalues():
    values = [4.0, 2.0, 1.0, 0.5, 1e-3, 1e-3]
    x = of_variances(values)
    layer = Delinear(6, 2, eps=1e-3, n_iter=15, dtype=torch.float64)
    layer(x)
    (row,) = whiteness(layer, x)
    assert (row.name, row.features, row.patches) == ("", 6, 4096)
    torch.testing.assert_close(row.spectrum, torch.tensor([values[::-1]]).double())
    assert row.before == pytest.approx(sum(values) ** 2 / 6 / sum(v * v for v in values))
    assert row.condition == pytest.approx(4.001 / 0.002)
    after = [1, 1, 1, 1, 0.5, 0.5]  # eps is as large as the small ones
    assert row.after == pytest.approx(sum(after) ** 2 / 6 / sum(v * v for v in after), abs=2e-3)


@pytest.mark.parametrize("n_iter", [1, 3, 5])
def test_directions_under_the_floor_are_counted(n_iter):
    floor = 1.5 ** (-2 * n_iter)
    values = [1.0, floor * 1.2, floor * 0.6, floor * 0.3]
    x = of_variances(values)
    layer = Delinear(4, 2, eps=1e-9, n_iter=n_iter, dtype=torch.float64)
    (row,) = whiteness(layer, x)
    norm = sum(v * v for v in values) ** 0.5
    assert row.under_floor == sum(v < floor * norm for v in values) / 4 > 0


@pytest.mark.parametrize("mode", [1, 2, 3, 5])
def test_after_is_the_covariance_of_the_whitened_patches(mode):
    # With W = I the outputs of a layer with one block are the whitened patches themselves.
    side = 1 if mode == 3 else 2
    everything = dict(sampling_stride=1, rows_per_feature=0)
    layer = FastDeconv(3, 3 * side**2, side, mode=mode, block=3, **everything).double()
    features = 3 * side**2
    layer.weight.data = torch.eye(features).reshape(features, 3, side, side).double()
    x = torch.randn(9, 3, 8, 8).double()
    x = x + x.roll(1, -1) + x[:, [1, 2, 0]]
    layer(x)
    (row,) = whiteness(layer, x)
    rows = layer.eval()(x).movedim(1, -1).flatten(0, -2)
    values = torch.linalg.eigvalsh(torch.cov(rows.T, correction=0))
    white = values.sum() ** 2 / features / values.square().sum()
    assert row.after == pytest.approx(white.item(), abs=1e-9) and row.after > row.before


def make_network():
    middle = FastDeconv(4, 4, 3, padding=1, groups=2, shared=False, padding_mode="reflect")
    layers = [FastDeconv(3, 4, 3, rows_per_feature=1), nn.ReLU(), nn.Dropout(), middle, middle]
    layers += [FastDeconvTranspose2d(4, 4, 2, 2), nn.AvgPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, Delinear(4 * 36, 2, block=12))


def test_a_network_is_left_as_it_is_and_told_layer_by_layer():
    model, x = make_network(), torch.randn(16, 3, 8, 8)
    model(x)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    rows = whiteness(model, x)
    assert [row.name for row in rows] == ["0", "3", "5", "8"]
    assert all(row.after > row.before and row.condition > 1 for row in rows)
    assert [len(row.spectrum) for row in rows] == [1, 2, 1, 1]  # two groups of one block each
    assert all(module.training for module in model.modules())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert not any(module._forward_pre_hooks for module in model.modules())
    header, *lines = str(rows).splitlines()
    assert header.split()[:3] == ["layer", "features", "patches"] and len(lines) == 4
    assert lines[0].split()[:3] == ["0", "27", "32"] and lines[0].endswith("%")
    assert rows.scalars()["after/3"] == rows[1].after and len(rows.scalars()) == 16


def test_a_layer_without_running_statistics_is_judged_by_its_batch():
    x = torch.randn(9, 4, 30) + torch.randn(9, 1, 30)
    tracked, other = (FastDeconv1d(4, 2, 3, track_running_stats=track) for track in (True, False))
    tracked(x)
    assert whiteness(tracked, x)[0] == whiteness(other, x)[0]
    assert whiteness(other, x[0])[0].patches == 10  # one image without a batch


def test_constant_input_is_white_and_what_is_not_finite_is_not_a_number():
    (row,) = whiteness(FastDeconv(2, 2, 1), torch.ones(3, 2, 5, 5))
    assert (row.before, row.after, row.condition) == (1, 1, 1)
    (row,) = whiteness(FastDeconv(2, 2, 1), torch.full((3, 2, 5, 5), torch.inf))
    assert math.isnan(row.before) and math.isnan(row.after) and math.isnan(row.condition)
    assert math.isnan(row.under_floor)
    assert whiteness(nn.Conv2d(2, 2, 1), torch.ones(3, 2, 5, 5)) == ()


def test_covariances_of_low_rank_are_judged():
    layer = FastDeconv(256, 256, 3, padding=1, groups=16)  # fails to converge in float32
    (row,) = whiteness(layer, torch.randn(8, 256, 1, 1))
    assert row.error == "" and math.isfinite(row.condition)
    assert ((row.spectrum > 1e-6).sum(-1) == 7).all()  # 8 rows with mean 0


def test_a_layer_that_cannot_be_judged_is_reported_in_its_row():
    model, x = (
        nn.Sequential(FastDeconv(3, 4, 3), nn.ReLU(), FastDeconv(4, 2, 3)),
        torch.rand(9, 3, 8, 8),
    )
    kept = model.state_dict()
    model[0].choose_patches = lambda x: (_ for _ in ()).throw(RuntimeError("no patches"))
    bad, good = rows = whiteness(model, x)
    assert bad.error == "RuntimeError: no patches" and good.error == "" and good.before > 0
    assert all(math.isnan(v) for v in (bad.before, bad.after, bad.condition, bad.under_floor))
    assert bad.spectrum.shape == (1, 27) and bad.covariances[0].shape == (1, 27, 27)
    assert str(rows).endswith("\n0: RuntimeError: no patches")
    assert all(layer.sync_stats for layer in (model[0], model[2])) and "before/0" in rows.scalars()
    torch.testing.assert_close(dict(model.state_dict()), dict(kept), rtol=0, atol=0)
    assert "no patches" in whiteness(FastDeconv(3, 4, 3), x[:0])[0].error


def test_keywords_reach_a_layer():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = FastDeconv(3, 4, 3)

        def forward(self, x):
            return self.layer(input=x)

    assert whiteness(Keyword(), torch.rand(9, 3, 8, 8))[0].patches > 0
