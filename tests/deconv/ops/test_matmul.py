"""The two products against einsum, whatever routine they choose."""

import itertools
import weakref

import pytest
import torch

from deconv.ops.matmul import LARGE, SHORT, STRIPS, keep_last, outer_products, transform

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


@pytest.mark.parametrize(("groups", "side"), [(1, LARGE), (2, LARGE + 1), (1, LARGE + 5)])
def test_strips_of_a_large_product_with_itself_equal_einsum(groups, side):
    maps = torch.randn(3, groups * side, 5, dtype=torch.float64, requires_grad=True)
    vectors = maps.unflatten(1, (groups, side))
    expected = torch.einsum("rgdl,rgel->gde", vectors, vectors) / 7
    product = outer_products(maps, maps, groups, 1 / 7)
    torch.testing.assert_close(product, expected)
    first = side // STRIPS
    assert torch.equal(product[:, -first:, :first], product[:, :first, -first:].mT)
    weights = torch.randn_like(product)
    found, known = (torch.autograd.grad((p * weights).sum(), maps)[0] for p in (product, expected))
    torch.testing.assert_close(found, known)


@pytest.mark.parametrize(("groups", "length"), list(itertools.product((1, 3), (1, 2, SHORT))))
def test_gradients_match_finite_differences(groups, length):
    make = lambda *shape: torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    matrices, maps = make(groups, 2, 2), make(2, groups * 2, length)
    assert torch.autograd.gradcheck(transform, (matrices, maps))
    assert torch.autograd.gradgradcheck(transform, (matrices, maps))
    assert torch.autograd.gradcheck(lambda x: outer_products(x, x.cos(), groups), maps)


@pytest.mark.parametrize("length", [1, SHORT])
def test_outer_products_come_as_they_were_made_and_not_written_into(monkeypatch, length):
    """Compiled by PyTorch 2.11 they would lose their gradient."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    x = torch.randn(2, 12, length, requires_grad=True)
    assert outer_products(x, x, 3, 0.5)._version == 0


def test_what_a_cuda_graph_reads_is_kept_for_good_and_all_else_until_it_is_crowded_out(monkeypatch):
    capturing, gpu = [False], torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    find = keep_last(1, lambda size, device: torch.zeros(size))  # a GPU in name alone
    known = weakref.ref(find(1, device=gpu))
    assert known() is find(1, device=gpu)
    find(2, device=gpu)
    assert known() is None
    capturing[0] = True
    recorded = weakref.ref(find(1, device=gpu))
    find(2, device=gpu)
    assert recorded() is not None
