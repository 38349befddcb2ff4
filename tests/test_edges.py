"""Inputs at the edge of what a layer can be given: finite, or not finite and so noticed."""

import pytest
import torch

from deconv import Delinear, FastDeconv

BLOCK = 8


def learn(layer, x):
    """Output and gradients of a step in training, then the output in evaluation."""
    x = x.clone().requires_grad_()
    y = layer(x)
    y.square().mean().backward()
    return [y, x.grad, layer.weight.grad, layer.eval()(x)]


def make_layer(mode):
    torch.manual_seed(0)
    return (
        FastDeconv(8, 4, 3, padding=1, mode=mode, block=BLOCK)
        if mode
        else Delinear(8, 4, block=BLOCK)
    )


def make_input(mode, count):
    return torch.randn(count, 8, 6, 6) if mode else torch.randn(count, 8)


@pytest.mark.parametrize("mode", [0, 1, 2, 3, 4, 5])  # 0: the fully connected layer
@pytest.mark.parametrize("count", range(1, BLOCK + 2))
def test_batches_of_every_size_around_the_block(mode, count):
    assert all(v.isfinite().all() for v in learn(make_layer(mode), make_input(mode, count)))


@pytest.mark.parametrize("mode", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda x: torch.ones_like(x), id="constant"),
        pytest.param(lambda x: torch.zeros_like(x), id="zero"),
        pytest.param(lambda x: x[:1].expand_as(x), id="one picture again and again"),
        pytest.param(lambda x: x * 1e-30, id="tiny"),
        pytest.param(lambda x: x * 1e6, id="large"),
        pytest.param(lambda x: x + 1e4, id="far from zero"),
        pytest.param(lambda x: x[:, :1].expand_as(x), id="channels alike"),
        pytest.param(lambda x: x * 10.0 ** torch.arange(-4, 4)[:, None, None], id="uneven scales"),
    ],
)
def test_inputs_of_every_scale_and_rank(mode, change):
    x = make_input(mode or 3, 8)
    x = change(x) if mode else change(x).mean((2, 3))
    assert all(v.isfinite().all() for v in learn(make_layer(mode), x))


@pytest.mark.parametrize("mode", [0, 1, 2, 3, 4, 5])
def test_squares_beyond_float32_leave_running_statistics_alone(mode):
    """Where the output is not finite, a run ends with an error that names the layer."""
    layer = make_layer(mode)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    y = layer(make_input(mode, 8) * 1e30)
    after = dict(layer.named_buffers())
    assert all(buffer.isfinite().all() for buffer in after.values())
    if not y.isfinite().all():
        assert all(torch.equal(after[name], buffer) for name, buffer in before.items())
