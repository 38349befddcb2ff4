"""State dicts of earlier versions are taken up."""

import pytest
import torch

from deconv import Delinear, FastDeconv
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


@pytest.mark.parametrize("mode", [1, 5])
@pytest.mark.parametrize("root", ROOTS)
def test_a_state_with_averages_of_whitening_matrices_evaluates_as_it_did(mode, root):
    torch.manual_seed(0)
    x = torch.randn(16, 4, 9, 9)
    layer = FastDeconv(4, 3, 3, mode=mode, root=root, block=4)
    layer(x)
    expected, state = layer.eval()(x), layer.state_dict()
    for axis, whiten in layer._running_whitening()[1].items():
        del state[f"running_cov_{axis}"]
        state[f"running_{axis}"] = whiten
    keys = list(state)
    again = FastDeconv(4, 3, 3, mode=mode, root=root, block=4)
    again.load_state_dict(state)
    torch.testing.assert_close(again.eval()(x), expected, rtol=1e-3, atol=1e-4)
    assert list(state) == keys  # the caller's is left as it is


def test_a_state_of_a_layer_that_has_seen_nothing_is_the_plain_layer():
    layer = Delinear(6, 2, block=6)
    state = layer.state_dict()
    state["running_joint"] = state.pop("running_cov_joint")
    again = Delinear(6, 2, block=6)
    again.load_state_dict(state)
    x = torch.randn(5, 6)
    torch.testing.assert_close(again.eval()(x), torch.nn.functional.linear(x, *layer.parameters()))
