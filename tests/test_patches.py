"""Sampled patches against loops and torch's own im2col."""

import pytest
import torch
from torch.nn import functional as F

from deconv.patches import Window, gather, sample_patches

SHAPES = [
    # kernel, stride, dilation, size
    ((3, 3), (1, 1), (1, 1), (7, 8)),
    ((3, 3), (3, 3), (1, 1), (9, 10)),
    ((2, 5), (2, 1), (1, 2), (8, 13)),
    ((1, 1), (4, 4), (1, 1), (5, 5)),
    ((4, 2), (6, 9), (2, 1), (11, 9)),
]


@pytest.mark.parametrize(("kernel", "stride", "dilation", "size"), SHAPES)
def test_patches_equal_im2col(kernel, stride, dilation, size):
    x = torch.randn(2, 6, *size, dtype=torch.float64)
    expected = F.unfold(x, kernel, dilation=dilation, stride=stride)  # N C*T L
    actual = gather(x, Window(kernel, stride, dilation, (0, 0, 0, 0)))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_patches_equal_a_loop_over_positions():
    x = torch.arange(2 * 2 * 5 * 6, dtype=torch.float64).reshape(2, 2, 5, 6)
    maps = gather(x, Window((3, 2), (2, 3), (1, 1), (0, 0, 0, 0)))
    expected = [
        picture[:, top : top + 3, left : left + 2].flatten()
        for picture in x
        for top in (0, 2)
        for left in (0, 3)
    ]
    torch.testing.assert_close(maps.transpose(1, 2).flatten(0, 1), torch.stack(expected))


@pytest.mark.parametrize("dims", [1, 3])
def test_other_numbers_of_dimensions(dims):
    x = torch.randn(2, 4, *(6,) * dims)
    maps = gather(x, Window((3,) * dims, (3,) * dims, (1,) * dims, (0, 0) * dims))
    assert maps.shape == (2, 4 * 3**dims, 2**dims)
    torch.testing.assert_close(
        maps[0, :, 0].reshape(4, *(3,) * dims), x[(0, ..., *[slice(3)] * dims)]
    )


def test_channels_last_input_gives_the_same_patches():
    x, window = torch.randn(2, 4, 6, 7), Window((3, 3), (2, 2), (1, 1), (1, 1, 0, 2))
    last = x.to(memory_format=torch.channels_last)
    torch.testing.assert_close(gather(last, window), gather(x, window))


@pytest.mark.parametrize("pictures", [slice(None), slice(1, None, 2)])
@pytest.mark.parametrize("padding", [(0, 0, 0, 0), (1, 2, 3, 0)])
@pytest.mark.parametrize(("kernel", "stride", "dilation", "size"), SHAPES)
def test_gradient_of_the_patches_joins_that_of_the_pictures(
    kernel, stride, dilation, size, padding, pictures
):
    window = Window(kernel, stride, dilation, padding)
    x = torch.randn(2, 6, *size, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: sample_patches(x, window, pictures), x)
    passed, maps = sample_patches(x, window, pictures)
    weight, other = torch.randn_like(maps), torch.randn_like(x)
    (actual,) = torch.autograd.grad((maps * weight).sum() + (passed * other).sum(), x)
    plain = gather(x[pictures], window)
    (expected,) = torch.autograd.grad((plain * weight).sum() + (x * other).sum(), x)
    torch.testing.assert_close(actual, expected)
    assert maps.shape[2] == torch.Size(window.positions(size)).numel()


def test_gradient_can_be_differentiated_again():
    window = Window((3, 3), (2, 2), (1, 1), (1, 1, 1, 1))
    x = torch.randn(2, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: sample_patches(x, window)[1].square(), x)
