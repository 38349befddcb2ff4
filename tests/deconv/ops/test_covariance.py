"""Mean and covariance of patches against numpy and plain autograd, in float64."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from deconv.ops import covariance, gathering
from deconv.ops.blocks import Blocks, transform_along
from deconv.ops.covariance import mean_and_covariance, second_moment
from deconv.ops.gathering import SMALL, select_pixels
from deconv.ops.gathering import gather as gather_by
from deconv.ops.patches import Patches, PatchGrid, PatchSubset
from tests.pairwise import pairwise

GRID = PatchGrid((3, 2), (2, 1), (1, 2), (1, 0, 2, 1))
SIZE = (7, 6)
SAMPLINGS = {"all": GRID, "some": PatchSubset(GRID, 3)}
INTERLEAVED = Blocks(1, 4, 2, 6, 1, True)
GEOMETRY = (3, 2), (1, 2)  # kernel and dilation of GRID
AXES = ["joint", "channel", "pixel"]
LAYOUTS = {"interleaved": 1, "contiguous": 12}


@pytest.fixture(autouse=True, params=["CPU", "GPU"])
def operations(request, monkeypatch):
    """Run each test by the operations of either device."""
    for module in (covariance, gathering):
        monkeypatch.setattr(module, "saves_launches", lambda device: request.param == "GPU")


def gather(x, sampling):
    return gather_by(x, sampling, select_pixels(x, sampling))


def measure_patches(x, sampling, blocks, axis, before=None):
    """Return images, centre, covariance and, of a subset without `before`, the mean of all."""
    stats = mean_and_covariance(Patches(x, sampling), blocks, axis, before)
    means = () if stats.mean is stats.centre else (stats.mean,)
    return stats.images, stats.centre, stats.cov, *means


def images(n=9):
    torch.manual_seed(0)
    return torch.randn(n, 4, *SIZE, dtype=torch.float64).cumsum(-1) + 5


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_large_images_have_the_same_statistics(sampling):
    torch.manual_seed(0)
    x = torch.randn(5, 4, 13, 14, dtype=torch.float64).cumsum(-2).requires_grad_()
    assert x[0, 0].numel() > SMALL
    sampling, blocks = SAMPLINGS[sampling], INTERLEAVED
    found = measure_patches(x, sampling, blocks, "joint")[1:3]
    rows = F.unfold(F.pad(x, GRID.padding), *GEOMETRY, stride=GRID.stride).transpose(1, 2)
    if sampling is GRID:
        rows = rows.flatten(0, 1)
    else:
        numbers = sampling.choose(5, (13, 14), x.device)
        rows = torch.cat([rows[n, numbers[n]] for n in range(5)])
    vectors = (rows - rows.mean(0)).unflatten(1, (12, 2))
    expected = rows.mean(0), torch.einsum("mdn,men->de", vectors, vectors)[None] / len(rows) / 2
    torch.testing.assert_close(found, expected)
    weights = [torch.randn_like(each) for each in found]
    pairs = (zip(each, weights, strict=True) for each in (found, expected))
    both = [sum((a * b).sum() for a, b in pair) for pair in pairs]
    grads = [torch.autograd.grad(loss, x, retain_graph=True)[0] for loss in both]
    torch.testing.assert_close(*grads)


def plain(x, sampling, blocks, axis, before=None):
    """Compute the same from all patches at once, by autograd."""
    rows = gather(x, sampling).transpose(1, 2).flatten(0, 1)  # M C*T
    mean = rows.mean(0)
    maps = (rows - mean)[:, :, None]
    if before is not None:
        maps = transform_along(before[0], maps, before[1], blocks)
    vectors = blocks.to_vectors(axis, maps).unflatten(1, (blocks.matrices, -1))
    cov = torch.einsum("rgdl,rgel->gde", vectors, vectors) / (len(vectors) * vectors.shape[3])
    return mean, cov


@pytest.mark.parametrize(
    ("part", "kept", "sampling", "axis", "layout", "shared"),  # part, kept: bytes; 1 is one image
    pairwise(
        [1, 10**9],
        [0, 10**9],
        [*SAMPLINGS],
        ["joint", "channel", "pixel"],
        [*LAYOUTS],
        [True, False],
    ),
)
def test_equals_all_patches_at_once(monkeypatch, part, kept, sampling, axis, layout, shared):
    for device in ("", "CPU_"):
        monkeypatch.setattr(covariance, f"{device}CHUNK", part)
        monkeypatch.setattr(covariance, f"{device}KEPT", kept)
    unit = LAYOUTS[layout] if axis == "joint" or layout == "contiguous" else 6
    blocks = Blocks(1, 4, 2, 6, unit, shared)
    x = images().requires_grad_()
    before = None
    if axis == "pixel":
        matrix = torch.randn(blocks.matrices, 2, 2, dtype=torch.float64, requires_grad=True)
        before = "channel", matrix
    wanted = [x] if before is None else [x, matrix]
    passed, mean, cov, *_ = measure_patches(x, SAMPLINGS[sampling], blocks, axis, before)
    expected = plain(x, SAMPLINGS[sampling], blocks, axis, before)
    torch.testing.assert_close((mean, cov), expected)
    a, b, c = torch.randn_like(mean), torch.randn_like(cov), torch.randn_like(x)
    found = torch.autograd.grad((mean * a).sum() + (cov * b).sum() + (passed * c).sum(), wanted)
    loss = (expected[0] * a).sum() + (expected[1] * b).sum() + (x * c).sum()
    torch.testing.assert_close(found, torch.autograd.grad(loss, wanted))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_of_few_patches_comes_the_mean_of_all(dtype):
    x = images().to(dtype).requires_grad_()
    passed, _, _, mean = measure_patches(x, SAMPLINGS["some"], INTERLEAVED, "joint")
    expected = gather(x, GRID).mean((0, 2))
    assert mean.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(mean, expected)
    a, b = torch.randn_like(mean), torch.randn_like(x)
    found = torch.autograd.grad((mean * a).sum() + (passed * b).sum(), x)
    torch.testing.assert_close(found, torch.autograd.grad((expected * a).sum() + (x * b).sum(), x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_channels_last_images_have_the_same_statistics_and_gradients(sampling, dtype):
    x = images().to(dtype)
    last = x.to(memory_format=torch.channels_last)
    results = []
    for inputs in (x, last):
        inputs.requires_grad_()
        maps, *found = measure_patches(inputs, SAMPLINGS[sampling], INTERLEAVED, "joint")
        loss = sum((each * torch.arange(each.numel()).view_as(each)).sum() for each in found)
        (grad,) = torch.autograd.grad(loss + maps.square().sum(), inputs)
        assert gathering.memory_order(grad) is gathering.memory_order(inputs)
        results.append([*found, grad])
    tolerance = {"rtol": 1e-2, "atol": 0.1} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(results[1], results[0], **tolerance)


def test_equals_numpy_for_every_group():
    x = images()
    blocks = Blocks(2, 2, 2, 6, 12, True)
    _, mean, cov = measure_patches(x, SAMPLINGS["all"], blocks, "joint")
    for g, rows in enumerate(gather(x, GRID).transpose(0, 1).flatten(1).chunk(2)):
        np.testing.assert_allclose(mean[12 * g : 12 * g + 12], rows.mean(1))
        np.testing.assert_allclose(cov[g], np.cov(rows.numpy(), bias=True), atol=1e-12)


def test_gradient_matches_finite_differences():
    blocks = Blocks(1, 4, 2, 6, 1, True)

    def measure(x, matrix):
        passed, mean, cov = measure_patches(x, SAMPLINGS["all"], blocks, "joint")
        other = measure_patches(passed, SAMPLINGS["all"], blocks, "joint", ("joint", matrix))
        return mean, cov, other[2]

    matrix = torch.randn(1, 12, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(measure, (images(3).requires_grad_(), matrix))


def test_float32_survives_an_offset_much_larger_than_the_spread():
    x, blocks = torch.randn(400, 3, 3, 3) + 3000, Blocks(1, 3, 3, 1, 3, True)
    window = PatchGrid((1, 1), (1, 1), (1, 1), (0, 0, 0, 0))
    _, _, cov = measure_patches(x, window, blocks, "joint")
    _, _, exact = measure_patches(x.double(), window, blocks, "joint")
    torch.testing.assert_close(cov, exact.float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("statistic", [0, 1])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_statistic_that_is_used_alone_has_its_own_gradient(sampling, statistic):
    x, sampling = images().requires_grad_(), SAMPLINGS[sampling]
    found = measure_patches(x, sampling, INTERLEAVED, "joint")[1 + statistic]
    expected = plain(x, sampling, INTERLEAVED, "joint")[statistic]
    slope = torch.randn_like(found)
    grads = [torch.autograd.grad(each, x, slope)[0] for each in (found, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_gradient_known_to_be_symmetric_has_the_same_effect(sampling):
    x = images().requires_grad_()
    slope = torch.randn(1, 12, 12, dtype=x.dtype)
    grads = []
    for known in (False, True):
        patches = Patches(x, SAMPLINGS[sampling])
        stats = mean_and_covariance(patches, INTERLEAVED, symmetric_grad=known)
        grads += torch.autograd.grad(stats.cov, x, slope + slope.mT)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_no_patches_have_mean_and_covariance_zero(sampling):
    x, blocks = images(0).requires_grad_(), Blocks(1, 4, 2, 6, 1, True)
    passed, *found = measure_patches(x, SAMPLINGS[sampling], blocks, "joint")
    assert found[0].shape == (24,) and not any(each.any() for each in found)
    sum(each.sum() for each in (passed, *found)).backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_gradient_that_shares_its_memory_is_not_written_into(sampling):
    x = images().requires_grad_()
    grads = []
    for weight in (torch.ones((), dtype=x.dtype), torch.ones_like(x)):  # expanded, and whole
        passed, _, cov, *_ = measure_patches(x, SAMPLINGS[sampling], INTERLEAVED, "joint")
        grads += torch.autograd.grad((passed * weight).sum() + cov.sum(), x)
    torch.testing.assert_close(*grads)
    passed, _, cov, *_ = measure_patches(x, SAMPLINGS[sampling], INTERLEAVED, "joint")
    torch.testing.assert_close(torch.autograd.grad(passed.sum() + cov.sum(), x)[0], grads[0])


def test_second_moment_is_the_mean_of_outer_products():
    maps, blocks = torch.randn(3, 24, 5, dtype=torch.float64), Blocks(1, 4, 2, 6, 12, False)
    vectors = maps.unflatten(1, (2, 12)).transpose(0, 1).transpose(1, 2).flatten(2)  # G d M
    expected = torch.stack([v @ v.T / 15 for v in vectors])
    torch.testing.assert_close(second_moment(maps, "joint", blocks), expected)
