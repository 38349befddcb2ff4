"""Transposed convolutions against brute force on the image with zeros inserted."""

import pytest
import torch
from torch import nn

import deconv
from deconv import FastDeconvTranspose2d
from tests.oracle import TRANSPOSED, brute_force_joint, make_exact, make_maps, spread_out
from tests.pairwise import loop_over, pairwise


@pytest.fixture(autouse=True)
def _double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("case", "kind", "mode"),  # step of mode 5: 2 would see one phase of two
    pairwise(
        [
            (dict(kernel_size=3, padding=1), 2),
            (dict(kernel_size=4, stride=2, padding=1), 3),
            (dict(kernel_size=3, stride=2, padding=1, output_padding=1, groups=2, bias=False), 3),
            (dict(kernel_size=2, stride=3, dilation=2, output_padding=2), 2),
            (dict(kernel_size=2, stride=2, groups=4), 3),
        ],
        TRANSPOSED,
        [4, 5],
    ),
)
def test_transposed_ones_whiten_the_map_with_zeros_in_between(case, kind, mode):
    geometry, step = case
    dims = 1 + TRANSPOSED.index(kind)
    layer, x = make_exact(kind, 4, 8, mode=mode, sampling_stride=2, **geometry), make_maps(dims)
    y = layer(x)
    assert y.shape == kind.forward(layer, x).shape
    steps = (1 if mode == 4 else step,) * dims
    torch.testing.assert_close(y, brute_force_joint(layer, x, steps), rtol=1e-7, atol=1e-7)


@loop_over("rows_per_feature", [0, 1])
@loop_over("mode", [1, 2, 3, 5])
def test_a_transposed_layer_is_that_of_the_wider_map(mode, rows_per_feature):
    options = dict(mode=mode, block=2, rows_per_feature=rows_per_feature)
    up = make_exact(nn.ConvTranspose2d, 4, 6, 4, stride=2, padding=3, **options)  # no zeros outside
    flat = make_exact(nn.Conv2d, 4, 6, 4, **options)
    flat.weight.data, flat.bias.data = up.to_conv_layout(up.weight).detach(), up.bias.detach()
    x = make_maps(2)
    torch.testing.assert_close(up(x), flat(spread_out(x, up)))


def test_outputs_of_a_transposed_layer_are_white_over_all_phases():
    up = make_exact(nn.ConvTranspose2d, 4, 36, 3, stride=2, mode=4, eps=1e-9)
    up.n_iter = 40  # more than float32 could bear
    up.weight.data = up.to_conv_layout(torch.eye(36).reshape(36, 4, 3, 3))
    up.bias.data.zero_()
    rows = up(make_maps(2, 40)).movedim(1, 0).flatten(1)
    torch.testing.assert_close(rows.mean(1), torch.zeros(36), atol=1e-7, rtol=0)
    torch.testing.assert_close(rows @ rows.T / rows.shape[1], torch.eye(36), atol=1e-4, rtol=0)


def test_the_size_of_the_output_can_be_asked_for():
    layer = make_exact(nn.ConvTranspose2d, 4, 2, 3, stride=2)
    x = make_maps(2)
    for size in ([14, 15], [5, 2, 14, 15]):
        assert layer(x, output_size=size).shape == (5, 2, 14, 15)
    assert layer(x[0], output_size=[2, 14, 15]).shape == (2, 14, 15)
    with pytest.raises(ValueError, match="output size"):
        layer(x, output_size=[90, 90])


def test_output_padding_may_be_a_list_as_torch_takes_it():
    layer = FastDeconvTranspose2d(3, 4, 3, stride=2, output_padding=[1, 0])
    like = nn.ConvTranspose2d(3, 4, 3, stride=2, output_padding=[1, 0])
    x = torch.randn(2, 3, 5, 6)
    assert layer(x).shape == like(x).shape


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(padding_mode="reflect"), "zeros.*FastDeconvTranspose2d"),
        (dict(mode=9), "mode.*9"),
    ],
)
def test_bad_arguments_of_transposed_layers_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        deconv.FastDeconvTranspose2d(4, 8, 3, **given)
