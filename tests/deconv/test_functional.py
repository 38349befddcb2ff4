"""Layers under torch.func, torch.utils.checkpoint, copy and pickle."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint

from deconv import (
    Delinear,
    FastDeconv,
    FastDeconv1d,
    FastDeconv3d,
    FastDeconvTranspose1d,
    FastDeconvTranspose2d,
    FastDeconvTranspose3d,
    fuse,
    recalibrate,
)
from deconv.conv import ROOTS
from tests.pairwise import loop_over

FEW_ROWS = dict(block=2, rows_per_feature=1)  # some of the patches, see PatchSubset

LAYERS = {
    "joint": lambda **more: FastDeconv(4, 3, 3, padding=1, block=2, **more),
    "separable": lambda **more: FastDeconv(4, 2, 2, mode=1, groups=2, shared=False, **more),
    "newton": lambda **more: FastDeconv(4, 3, 2, root="newton", **more),
    "resolvent": lambda **more: FastDeconv(4, 3, 2, root="resolvent", **more),
    "small map": lambda **more: FastDeconv(4, 64, 3, padding=1, mode=3, block=2, **more),
    "line": lambda **more: FastDeconv1d(4, 3, 2, **FEW_ROWS, **more),
    "volume": lambda **more: FastDeconv3d(4, 2, 2, groups=2, **FEW_ROWS, **more),
    "transposed": lambda **more: FastDeconvTranspose1d(4, 3, 4, stride=2, **more),
    "up": lambda **more: FastDeconvTranspose2d(4, 4, 3, 2, groups=4, **FEW_ROWS, **more),
    "volume up": lambda **more: FastDeconvTranspose3d(4, 2, 2, mode=1, bias=False, **more),
    "linear": lambda **more: Delinear(6, 3, **more),
}
SHAPES = {
    "line": (5, 4, 20),
    "volume": (5, 4, 6, 5, 4),
    "transposed": (5, 4, 6),
    "volume up": (3, 4, 3, 2, 3),
    "linear": (7, 6),
}


AGAIN = [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), "state_dict"]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make(name, **options):
    """Return a layer that has seen a batch, and another batch."""
    layer, shape = LAYERS[name](dtype=torch.float64, **options), SHAPES.get(name, (5, 4, 6, 6))
    layer(torch.randn(shape, dtype=torch.float64) + 1)
    return layer, torch.randn(shape, dtype=torch.float64)


@loop_over("name", LAYERS)
def test_vmap_over_a_layer_in_evaluation(name):
    layer, x = make(name)
    x = torch.stack([x, x + 1, 2 * x])
    expected = torch.stack([layer.eval()(part) for part in x])
    torch.testing.assert_close(vmap(layer)(x), expected)


@loop_over("name", LAYERS)
def test_an_ensemble_of_layers_runs_as_one(name):
    members = [make(name)[0].eval() for _ in range(3)]
    _, x = make(name)
    state = stack_module_state(members)
    base = copy.deepcopy(members[0]).to("meta")

    def run(parameters, buffers):
        return functional_call(base, (parameters, buffers), (x,))

    expected = torch.stack([member(x) for member in members])
    torch.testing.assert_close(vmap(run)(*state), expected)


@loop_over("name", LAYERS)
def test_gradients_of_each_sample_in_evaluation(name):
    layer, x = make(name)
    parameters = {key: p.detach() for key, p in layer.eval().named_parameters()}

    def loss(parameters, sample):
        return functional_call(layer, parameters, (sample[None],)).square().mean()

    given = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for number, sample in enumerate(x):
        layer.zero_grad()
        layer(sample[None]).square().mean().backward()
        for key, p in layer.named_parameters():
            torch.testing.assert_close(given[key][number], p.grad)


def test_functional_call_in_training_uses_what_it_is_given():
    layer, x = make("joint")
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    before = copy.deepcopy(layer.state_dict())
    expected = copy.deepcopy(layer)(x)
    torch.testing.assert_close(functional_call(layer, state, (x,)), expected)
    torch.testing.assert_close(dict(layer.state_dict()), dict(before), rtol=0, atol=0)
    assert state["num_batches_tracked"] == 2


def test_transforms_in_training_are_refused_with_the_way_out():
    layer, x = make("joint")
    layer.train()
    for transformed in (vmap(layer), grad(lambda x: layer(x).sum())):
        with pytest.raises(ValueError, match=r"eval\(\).* for FastDeconv\(4, 3"):
            transformed(x)


@loop_over("name", LAYERS)
def test_without_running_statistics_evaluation_uses_the_batch(name):
    layer, x = make(name, track_running_stats=False)
    assert not list(layer.buffers()) and set(layer.state_dict()) == {
        *dict(layer.named_parameters())
    }
    torch.testing.assert_close(layer.eval()(x), layer.train()(x), rtol=0, atol=0)
    layer.reset_running_stats()
    assert "track_running_stats=False" in repr(layer)
    with pytest.raises(ValueError, match="no running statistics"):
        fuse(layer.eval())
    with pytest.raises(ValueError, match="no deconvolution layer"):
        recalibrate(layer, [x])
    assert not list(pickle.loads(pickle.dumps(layer)).buffers())


@loop_over("name", LAYERS)
def test_checkpointing_counts_a_batch_once(name):
    for use_reentrant in (True, False):
        layer, x = make(name)
        plain = copy.deepcopy(layer)
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        plain(inputs[0]).square().sum().backward()
        checkpoint(layer, inputs[1], use_reentrant=use_reentrant).square().sum().backward()
        torch.testing.assert_close(
            dict(layer.state_dict()), dict(plain.state_dict()), rtol=0, atol=0
        )
        assert layer.num_batches_tracked == 2
        torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
        for given, expected in zip(layer.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(given.grad, expected.grad)


@loop_over("name", LAYERS)
def test_two_forwards_and_one_backward(name):
    layer, first = make(name)
    second, alone = 2 * first.flip(0) - 1, []
    for x in (first, second):
        layer.zero_grad()
        layer(x).square().sum().backward()
        alone.append([p.grad.clone() for p in layer.parameters()])
    layer.zero_grad()
    (layer(first).square().sum() + layer(second).square().sum()).backward()
    for p, *parts in zip(layer.parameters(), *alone, strict=True):
        torch.testing.assert_close(p.grad, sum(parts))
    assert layer.num_batches_tracked == 5


@loop_over("name", LAYERS)
def test_copies_do_the_same_and_share_nothing(name):
    for again in AGAIN:
        layer, x = make(name)
        if again == "state_dict":
            twin = LAYERS[name](dtype=torch.float64)
            twin.load_state_dict(layer.state_dict())
        else:
            twin = again(layer)
        torch.testing.assert_close(twin.eval()(x), layer.eval()(x), rtol=0, atol=0)
        before = layer(x)
        twin.train()(x)
        with torch.no_grad():
            twin.weight.zero_()
        torch.testing.assert_close(layer(x), before, rtol=0, atol=0)


@loop_over("root", ROOTS)
def test_a_second_derivative_is_right_or_refused(root):
    options = dict(root=root, rows_per_feature=0, dtype=torch.float64)
    network = nn.Sequential(
        FastDeconv(2, 3, 2, **options), nn.Tanh(), FastDeconv(3, 2, 2, **options)
    )
    x, step = torch.randn(3, 2, 4, 4, dtype=torch.float64), 1e-5

    def slope(name, w):
        loss = functional_call(network, {name: w}, (x,)).pow(2).sum()
        return torch.autograd.grad(loss, w, create_graph=True)[0]

    network(x)
    for name, training in ("2.weight", True), ("0.weight", True), ("0.weight", False):
        network.train(training)
        w = network.get_parameter(name).detach().clone().requires_grad_()
        along = torch.randn_like(w)
        if training and name == "0.weight":
            with pytest.raises(RuntimeError, match="first derivatives only"):
                torch.autograd.grad(slope(name, w), w, along)
            continue
        (found,) = torch.autograd.grad(slope(name, w), w, along)
        expected = (slope(name, w + step * along) - slope(name, w - step * along)) / (2 * step)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-3)
