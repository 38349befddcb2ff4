"""Delinear against FastDeconv, the formula and its own statistics."""

import pytest
import torch

import deconv.whitening
from deconv import Delinear, FastDeconv
from deconv.ops.inverse_sqrt import MAX_STEPS_FROM_ROWS, inverse_sqrt


@pytest.fixture(autouse=True)
def _double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_delinear_is_the_same_path_as_a_1x1_convolution():
    linear = Delinear(12, 5, block=4)
    conv = FastDeconv(12, 5, 1, block=4, sampling_stride=1, root="newton")
    conv.weight.data, conv.bias.data = linear.weight.data[..., None, None], linear.bias.data
    x = torch.randn(30, 12)
    torch.testing.assert_close(linear(x), conv(x[..., None, None]).flatten(1))
    torch.testing.assert_close(linear(x.reshape(5, 6, 12)).flatten(0, 1), linear(x))


def test_fewer_rows_than_features_whiten_as_the_formula_says():
    layer, x = Delinear(40, 3), torch.randn(10, 40)
    off_centre = x - x.mean(0)
    D = inverse_sqrt((off_centre.T @ off_centre / 10 + layer.eps * torch.eye(40))[None])[0]
    torch.testing.assert_close(layer(x), off_centre @ D @ layer.weight.T + layer.bias)


def test_few_rows_leave_the_covariance_that_many_do():
    x = torch.randn(7, 40)
    few, many = Delinear(40, 2, block=40), Delinear(40, 2, block=40)
    few(x), many(x.repeat(12, 1))
    torch.testing.assert_close(few.running_cov_joint, many.running_cov_joint)


def test_rows_are_gathered_only_for_a_root_that_uses_them(monkeypatch):
    gathered, gather = [], deconv.whitening.centre_rows
    monkeypatch.setattr(
        deconv.whitening, "centre_rows", lambda *args: gathered.append(args) or gather(*args)
    )
    for n_iter in (MAX_STEPS_FROM_ROWS, MAX_STEPS_FROM_ROWS + 1):
        Delinear(40, 2, n_iter=n_iter)(torch.randn(7, 40))
    assert len(gathered) == 1


def test_input_of_other_features_is_refused_before_it_counts():
    layer = Delinear(8, 2)
    with pytest.raises(ValueError, match=r"8 features, got shape \(4, 6\)"):
        layer(torch.randn(4, 6))
    assert layer.num_batches_tracked == 0
