"""Delinear against FastDeconv, the formula and its own statistics."""

import pytest
import torch

import deconv.whitening
from deconv import Delinear, FastDeconv
from deconv.ops.inverse_sqrt import MAX_STEPS_FROM_ROWS, ROOTS, inverse_sqrt
from tests.pairwise import loop_over


@pytest.fixture(autouse=True)
def _double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_delinear_is_the_same_path_as_a_1x1_convolution():
    linear = Delinear(12, 5, block=4)
    conv = FastDeconv(12, 5, 1, block=4, sampling_stride=1, root="resolvent")
    conv.weight.data, conv.bias.data = linear.weight.data[..., None, None], linear.bias.data
    x = torch.randn(30, 12)
    torch.testing.assert_close(linear(x), conv(x[..., None, None]).flatten(1))
    torch.testing.assert_close(linear(x.reshape(5, 6, 12)).flatten(0, 1), linear(x))


@loop_over("root", ROOTS)
def test_fewer_rows_than_features_whiten_as_the_formula_says(root):
    layer, x = Delinear(40, 3, root=root), torch.randn(10, 40)
    off_centre = x - x.mean(0)
    cov = (off_centre.T @ off_centre / 10 + layer.eps * torch.eye(40))[None]
    D = inverse_sqrt(cov, root=root)[0]
    expected = off_centre @ D.mT @ layer.weight.T + layer.bias
    torch.testing.assert_close(layer(x), expected)


def test_the_default_differs_from_the_published_root_by_less_than_a_hundredth():
    default, x = Delinear(64, 10), torch.randn(20, 64) * torch.logspace(0, -2, 64)
    published = Delinear(64, 10, root="newton", bias=False)
    published.weight = default.weight
    expected = published(x)
    error = default(x) - default.bias - expected
    assert 0 < error.norm() < 0.0075 * expected.norm()


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
    for root in ROOTS:
        for n_iter in (MAX_STEPS_FROM_ROWS, MAX_STEPS_FROM_ROWS + 1):
            before = len(gathered)
            Delinear(40, 2, n_iter=n_iter, root=root)(torch.randn(7, 40))
            uses = root == "resolvent" or (root == "newton" and n_iter == MAX_STEPS_FROM_ROWS)
            assert len(gathered) - before == uses, (root, n_iter)


def test_input_of_other_features_is_refused_before_it_counts():
    layer = Delinear(8, 2)
    with pytest.raises(ValueError, match=r"8 features, got shape \(4, 6\)"):
        layer(torch.randn(4, 6))
    assert layer.num_batches_tracked == 0
