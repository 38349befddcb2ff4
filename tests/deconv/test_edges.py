"""Extreme inputs: results are finite, or the running statistics skip the batch."""

from copy import deepcopy

import pytest
import torch

from deconv import Delinear, FastDeconv, FastDeconvTranspose2d, whiteness
from deconv.ops.inverse_sqrt import ROOTS
from tests.pairwise import loop_over, pairwise

BLOCK = 8
MODES = [0, 1, 2, 3, 4, 5]  # 0: the fully connected layer


def learn(layer, x):
    """Return output and gradients of a training step, then the output in evaluation."""
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


@loop_over("count", range(1, BLOCK + 2))
def test_batches_of_every_size_around_the_block(count):
    for mode in MODES:
        values = learn(make_layer(mode), make_input(mode, count))
        assert all(v.isfinite().all() for v in values), mode


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda x: torch.ones_like(x), id="constant"),
        pytest.param(lambda x: torch.zeros_like(x), id="zero"),
        pytest.param(lambda x: x[:1].expand_as(x), id="one image again and again"),
        pytest.param(lambda x: x * 1e-30, id="tiny"),
        pytest.param(lambda x: x * 1e6, id="large"),
        pytest.param(lambda x: x * 1e10, id="squares of variances overflow"),
        pytest.param(lambda x: x + 1e4, id="far from zero"),
        pytest.param(lambda x: x[:, :1].expand_as(x), id="channels alike"),
        pytest.param(lambda x: x * 10.0 ** torch.arange(-4, 4)[:, None, None], id="uneven scales"),
    ],
)
def test_inputs_of_every_scale_and_rank(change):
    for mode in MODES:
        x = make_input(mode or 3, 8)
        x = change(x) if mode else change(x).mean((2, 3))
        assert all(v.isfinite().all() for v in learn(make_layer(mode), x)), mode


@loop_over("mode", MODES)
def test_squares_beyond_float32_leave_running_statistics_alone(mode):
    """Expect a run to end with an error that names the layer if the output is not finite."""
    layer = make_layer(mode)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    y = layer(make_input(mode, 8) * 1e30)
    after = dict(layer.named_buffers())
    assert all(buffer.isfinite().all() for buffer in after.values())
    if not y.isfinite().all():
        assert all(torch.equal(after[name], buffer) for name, buffer in before.items())


def test_a_covariance_that_overflows_over_few_rows_leaves_running_statistics_alone():
    layer = Delinear(512, 6)
    for scale in (1e18, 2e18, 4e18, 8e18):  # squares of the rows overflow later
        layer(scale * torch.randn(64, 512))
        assert all(buffer.isfinite().all() for buffer in layer.buffers()), scale


# Patches of 2 x 2 pixels at every sixth pixel: most pixels enter no patch, or the mean alone.
SAMPLINGS = {
    "grid": dict(rows_per_feature=0),
    "subset": dict(rows_per_feature=0.1, block=1, shared=False),
    "newton": dict(rows_per_feature=0, root="newton"),
    "resolvent": dict(rows_per_feature=0, root="resolvent"),
    "pixels": dict(mode=3),
    "two axes": dict(mode=1, rows_per_feature=1),
    "other kind": dict(rows_per_feature=1),
}


@loop_over(
    ("poison", "look", "side"),  # a small image and a large one, see `patches.SMALL`
    pairwise([float("nan"), float("inf"), -float("inf"), 1e30], [*SAMPLINGS], [7, 13]),
)
def test_no_pixel_anywhere_gets_what_is_not_finite_into_running_statistics(poison, look, side):
    kind = FastDeconvTranspose2d if look == "other kind" else FastDeconv
    layer = kind(4, 3, 2, stride=2, **SAMPLINGS[look])
    torch.nn.init.zeros_(layer.weight)  # which a sum of products must not hide behind
    good = torch.randn(2, 4, side, side)
    layer(good)
    for row in range(side):
        bad = good.clone()
        bad[1, 2, row, row // 2] = poison
        before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
        layer(bad)
        after = dict(layer.named_buffers())
        assert all(buffer.isfinite().all() for buffer in after.values())
        counted = after["num_batches_tracked"] > before["num_batches_tracked"]
        moved = not all(torch.equal(after[name], before[name]) for name in before)
        assert counted == moved
    layer(good)
    assert layer.num_batches_tracked > before["num_batches_tracked"]


@loop_over(("root", "scale"), [(root, scale) for root in ROOTS for scale in (1e10, 1e16)])
def test_variances_whose_squares_overflow_whiten_as_in_float64(root, scale):
    layer, x = FastDeconv(4, 6, 3, root=root), scale * torch.randn(8, 4, 9, 9)
    exact = deepcopy(layer).double()
    torch.testing.assert_close(layer(x), exact(x.double()).float(), rtol=1e-4, atol=1e-4)
    head, x = Delinear(64, 6), scale * torch.randn(8, 64)  # fewer rows than features
    exact = deepcopy(head).double()
    torch.testing.assert_close(head(x), exact(x.double()).float(), rtol=1e-4, atol=1e-4)


def test_an_input_that_is_refused_stays_out_of_the_running_statistics():
    refused = [
        (FastDeconv(3, 4, 3), torch.randn(2, 3, 8, 8).double(), "torch.float64 and the layer"),
        (FastDeconv(3, 4, 3), torch.ones(2, 3, 8, 8, dtype=torch.uint8), "torch.uint8 and"),
        (Delinear(3, 4), torch.randn(5, 3).half(), "torch.float16 and the layer is torch.float32"),
    ]
    for layer, x, message in refused:
        with pytest.raises(ValueError, match=message):
            layer(x)
        assert layer.num_batches_tracked == 0
    layer = FastDeconv(3, 4, 3)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=r"torch\.float64"):
        layer(torch.randn(2, 3, 8, 8).double())  # autocast casts no float64
    assert layer.num_batches_tracked == 0
    up = FastDeconvTranspose2d(3, 4, 3, stride=2)
    with pytest.raises(ValueError, match="output size"):
        up(torch.randn(2, 3, 4, 4), output_size=[50, 50])
    assert up.num_batches_tracked == 0


def test_momentum_none_averages_all_batches_as_batchnorm_does():
    batches = torch.randn(3, 20, 5)
    layer, norm = Delinear(5, 2, momentum=None), torch.nn.BatchNorm1d(5, momentum=None)
    for x in batches:
        layer(x), norm(x)
    torch.testing.assert_close(layer.running_mean, norm.running_mean)


def test_a_default_device_leaves_an_explicit_one_alone():
    with torch.device("meta"):
        layer = FastDeconv(3, 4, 3, device="cpu")
        separable = FastDeconv(3, 4, 3, mode=1, device="cpu")
        images = torch.rand(2, 3, 9, 9, device="cpu")
        assert layer.whitening_kernels().device.type == "cpu"
        assert not whiteness(separable, images)[0].error
    assert {value.device.type for value in layer.state_dict().values()} == {"cpu"}
