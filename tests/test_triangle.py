"""Products in strips against the whole ones, in float64."""

import pytest
import torch

from deconv import triangle
from deconv.triangle import gram, times_lower

SIZES = [3, 8, 9, 13]  # below two strips of 4, two, a wider last one, three


@pytest.fixture(autouse=True)
def _narrow(monkeypatch):
    monkeypatch.setattr(triangle, "STRIP", 4)


def random(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("size", SIZES)
def test_gram_is_the_product_with_itself(size):
    rows = random(2, 5, size)
    torch.testing.assert_close(gram(rows), rows.mT @ rows)
    across = random(2, size, 5).mT  # features outermost in memory
    torch.testing.assert_close(gram(across), across.mT @ across)


@pytest.mark.parametrize("size", SIZES)
def test_product_with_a_lower_triangle_and_its_gradients(size):
    rows, square = random(2, 5, size), random(2, size, size)
    torch.testing.assert_close(times_lower(rows, square.tril()), rows @ square.tril())
    assert torch.autograd.gradcheck(lambda x, m: times_lower(x, m.tril()), (rows, square))
