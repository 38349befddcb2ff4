"""The two products against einsum, whatever routine they choose."""

import itertools

import pytest
import torch

from deconv.products import SHORT, outer_products, transform

SHAPES = list(itertools.product((1, 3), (0, 1, 5), (1, 2, SHORT)))  # groups, R, L


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("groups", "count", "length"), SHAPES)
def test_both_equal_einsum(groups, count, length, dtype):
    left, right = torch.randn(2, count, groups * 4, length, dtype=dtype)
    matrices = torch.randn(groups, 4, 4, dtype=dtype)
    u, v = (x.unflatten(1, (groups, 4)) for x in (left, right))
    expected = torch.einsum("gde,rgel->rgdl", matrices, u).flatten(1, 2)
    torch.testing.assert_close(transform(matrices, left), expected)
    expected = torch.einsum("rgdl,rgel->gde", u, v)
    torch.testing.assert_close(outer_products(left, right, groups), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("groups", "length"), list(itertools.product((1, 3), (1, 2, SHORT))))
def test_gradients_match_finite_differences(groups, length):
    make = lambda *shape: torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    matrices, maps = make(groups, 2, 2), make(2, groups * 2, length)
    assert torch.autograd.gradcheck(transform, (matrices, maps))
    assert torch.autograd.gradgradcheck(transform, (matrices, maps))
    assert torch.autograd.gradcheck(lambda x: outer_products(x, x.cos(), groups), maps)
