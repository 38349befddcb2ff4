"""The two products against einsum, for every routine."""

import pytest
import torch

from deconv.ops import matmul
from deconv.ops.matmul import WIDE, outer_products, transform
from tests.pairwise import pairwise

SHAPES = pairwise(
    (1, 3), (0, 1, 5), (4, WIDE), (1, 2, 16), (torch.float32, torch.float64), (False, True)
)


@pytest.mark.parametrize(("groups", "count", "side", "length", "dtype", "convolves"), SHAPES)
def test_both_equal_einsum(groups, count, side, length, dtype, convolves, monkeypatch):
    monkeypatch.setattr(matmul, "CONVOLVES", convolves)
    left, right = torch.randn(2, count, groups * side, length, dtype=dtype)
    matrices = torch.randn(groups, side, side, dtype=dtype)
    u, v = (x.unflatten(1, (groups, side)) for x in (left, right))
    expected = torch.einsum("gde,rgel->rgdl", matrices, u).flatten(1, 2)
    torch.testing.assert_close(transform(matrices, left), expected, rtol=1e-4, atol=1e-4)
    expected = torch.einsum("rgdl,rgel->gde", u, v)
    for few in (False, True):
        monkeypatch.setattr(matmul, "saves_launches", lambda device, few=few: few)
        found = outer_products(left, right, groups)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("groups", "convolves"), pairwise((1, 2), (False, True)))
def test_a_wide_product_with_itself_equals_einsum(groups, convolves, monkeypatch):
    monkeypatch.setattr(matmul, "CONVOLVES", convolves)
    side = WIDE + groups
    maps = torch.randn(3, groups * side, 5, dtype=torch.float64, requires_grad=True)
    vectors = maps.unflatten(1, (groups, side))
    expected = torch.einsum("rgdl,rgel->gde", vectors, vectors) / 7
    product = outer_products(maps, maps, groups, 1 / 7)
    torch.testing.assert_close(product, expected)
    weights = torch.randn_like(product)
    found, known = (torch.autograd.grad((p * weights).sum(), maps)[0] for p in (product, expected))
    torch.testing.assert_close(found, known)


@pytest.mark.parametrize(("groups", "length"), pairwise((1, 3), (1, 2, 16)))
def test_gradients_match_finite_differences(groups, length):
    make = lambda *shape: torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    matrices, maps = make(groups, 2, 2), make(2, groups * 2, length)
    assert torch.autograd.gradcheck(transform, (matrices, maps))
    assert torch.autograd.gradgradcheck(transform, (matrices, maps))
    assert torch.autograd.gradcheck(lambda x: outer_products(x, x.cos(), groups), maps)
