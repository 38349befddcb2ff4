"""D in evaluation: computed once for unchanged statistics, anew after any edit."""

from copy import deepcopy

import pytest
import torch

import deconv.whitening
from deconv import FastDeconv
from tests.pairwise import loop_over


def make_layer(**options):
    torch.manual_seed(0)
    layer = FastDeconv(3, 4, 3, **options)
    layer(torch.randn(4, 3, 9, 9))
    return layer.eval()


@pytest.fixture
def roots(monkeypatch):
    """Return a list that grows with each inverse root."""
    computed, inverse_sqrt = [], deconv.whitening.inverse_sqrt

    def count(*args):
        computed.append(args)
        return inverse_sqrt(*args)

    monkeypatch.setattr(deconv.whitening, "inverse_sqrt", count)
    return computed


def test_evaluation_computes_each_root_once(roots):
    layer, x = make_layer(mode=1), torch.randn(2, 3, 9, 9)
    del roots[:]
    first = layer(x)
    assert len(roots) == 2  # of two axes
    for _ in range(3):
        assert torch.equal(layer(x), first)
    with torch.inference_mode():
        assert torch.equal(layer(x), first)
    assert len(roots) == 2


EDITS = {
    "data": lambda layer: layer.running_cov_joint.data.mul_(2),
    "numpy": lambda layer: layer.running_cov_joint.numpy().__imul__(2),
    "copy": lambda layer: layer.running_cov_joint.copy_(2 * layer.running_cov_joint),
    "new buffer": lambda layer: setattr(layer, "running_cov_joint", 2 * layer.running_cov_joint),
    "one number": lambda layer: layer.running_cov_joint[0, 0, 0].add_(1e-3),
    "state_dict": lambda layer: layer.load_state_dict(
        {name: 2 * value for name, value in layer.state_dict().items()}
    ),
    "steps": lambda layer: setattr(layer, "n_iter", 3),
    "root": lambda layer: setattr(layer, "root", "newton"),
    "eps": lambda layer: setattr(layer, "eps", 0.5),
    "reset": lambda layer: layer.reset_running_stats(),
    "count": lambda layer: layer.num_batches_tracked.data.zero_(),
    "training": lambda layer: layer.train()(torch.randn(4, 3, 9, 9)),
}


@loop_over("edit", EDITS)
def test_any_edit_is_noticed(edit):
    layer, x = make_layer(), torch.randn(2, 3, 9, 9)
    before = layer(x)
    EDITS[edit](layer)
    layer.eval()
    found = layer(x)
    assert not torch.equal(found, before)
    assert torch.equal(found, deepcopy(layer)(x))  # a copy has computed nothing yet


def test_what_inference_mode_has_computed_serves_a_backward():
    layer, x = make_layer(), torch.randn(2, 3, 9, 9)
    with torch.inference_mode():
        layer(x)
    layer(x).sum().backward()
    assert layer.weight.grad.isfinite().all()


def test_half_and_double_layers_evaluate_as_fresh_ones():
    layer, x = make_layer(), torch.randn(2, 3, 9, 9)
    layer(x)
    assert torch.equal(layer.double()(x.double()), deepcopy(layer)(x.double()))
    assert torch.equal(layer.half()(x.half()), deepcopy(layer)(x.half()))
