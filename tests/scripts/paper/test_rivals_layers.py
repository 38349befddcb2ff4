"""Layers of the rivals against their published rules, computed apart in float64."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from deconv import fuse
from scripts.paper.rivals_layers.decorrelation import (
    DecorrelatedConv2d,
    DecorrelatedLinear,
    decorrelate,
)
from scripts.paper.rivals_layers.iter_norm import IterNorm
from scripts.paper.rivals_layers.output_norm import NormalizedDeconv
from scripts.paper.rivals_layers.weight_standardization import GAINS, StandardizedConv2d
from tests.pairwise import loop_over


def correlated_images(count, channels, side=6):
    """Return images whose channels and pixels are correlated, in float64."""
    mix = torch.eye(channels) + 0.4 * torch.randn(channels, channels)
    images = torch.randn(count, channels, side, side).cumsum(2) + torch.randn(channels, 1, 1)
    return torch.einsum("dc,nchw->ndhw", mix, images).double()


def iterate_by_eigenvalues(rows, steps, eps):
    """Whiten centred rows (M, d): Newton's iteration acts on each eigenvalue alone."""
    cov = rows.mT @ rows / len(rows) + eps * torch.eye(rows.shape[1], dtype=rows.dtype)
    values, vectors = torch.linalg.eigh(cov)
    response = []
    for value in (values / values.sum()).tolist():
        p = 1.0
        for _ in range(steps):
            p = 1.5 * p - 0.5 * p**3 * value
        response.append(p)
    whiten = vectors @ torch.diag(torch.tensor(response).to(rows)) @ vectors.mT
    return whiten / values.sum().sqrt()


def test_iter_norm_whitens_each_group_as_published_and_keeps_running_averages():
    torch.manual_seed(0)
    norm = IterNorm(6, group=3).double()
    with torch.no_grad():
        norm.weight.copy_(torch.rand(6) + 0.5)
        norm.bias.copy_(torch.randn(6))
    mean, whiten = torch.zeros(6).double(), torch.eye(3).double().repeat(2, 1, 1)
    batches = [correlated_images(5, 6) for _ in range(2)]
    for x in batches:
        rows, expected = x.permute(0, 2, 3, 1).reshape(-1, 6), torch.empty(5 * 36, 6).double()
        for group, part in enumerate((slice(0, 3), slice(3, 6))):
            centred = rows[:, part] - rows[:, part].mean(0)
            D = iterate_by_eigenvalues(centred, 5, 1e-5)
            expected[:, part] = centred @ D
            whiten[group] = 0.9 * whiten[group] + 0.1 * D
        mean = 0.9 * mean + 0.1 * rows.mean(0)
        expected = expected * norm.weight + norm.bias
        torch.testing.assert_close(norm(x).permute(0, 2, 3, 1).reshape(-1, 6), expected)
    rows = batches[0].permute(0, 2, 3, 1).reshape(-1, 6) - mean
    rows = torch.cat([rows[:, :3] @ whiten[0], rows[:, 3:] @ whiten[1]], 1)
    found = norm.eval()(batches[0]).permute(0, 2, 3, 1).reshape(-1, 6)
    torch.testing.assert_close(found, rows * norm.weight + norm.bias)


def test_iter_norm_has_the_gradient_of_its_function_and_groups_of_64():
    torch.manual_seed(0)
    norm, x = IterNorm(4, group=2).double(), correlated_images(3, 4, side=2).requires_grad_()
    assert torch.autograd.gradcheck(norm, x)
    assert IterNorm(128).running_whiten.shape == (2, 64, 64)
    assert IterNorm(24).running_whiten.shape == (1, 24, 24)
    with pytest.raises(ValueError, match="multiple of group 64, got 96"):
        IterNorm(96)


@loop_over("activation", GAINS)
def test_standardized_filters_keep_the_variance_behind_an_activation(activation):
    x = torch.linspace(-12, 12, 200_001).double()
    density = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
    y = x if activation == "identity" else getattr(F, activation)(x)
    moments = [torch.trapezoid(y**power * density, x) for power in (1, 2)]
    assert GAINS[activation] == pytest.approx((moments[1] - moments[0] ** 2).rsqrt().item())
    conv = StandardizedConv2d(16, 8, 3, padding=1, activation=activation).double()
    with torch.no_grad():
        conv.gain.copy_(torch.rand(8, 1, 1, 1) + 0.5)
    images = torch.randn(4, 16, 5, 5).double()
    for index, row in enumerate(conv.weight.detach().flatten(1)):
        standard = (row - row.mean()) / ((row - row.mean()).square().mean() * len(row)).sqrt()
        kernel = GAINS[activation] * conv.gain[index] * standard.reshape(1, 16, 3, 3)
        expected = F.conv2d(images, kernel, conv.bias[index : index + 1], padding=1)
        torch.testing.assert_close(conv(images)[:, index : index + 1], expected)


def list_patches(x, side, stride, padding):
    """Return all patches of x as rows, one after the other."""
    padded, rows = F.pad(x, [padding] * 4), []
    for image in padded:
        for top in range(0, image.shape[1] - side + 1, stride):
            for left in range(0, image.shape[2] - side + 1, stride):
                rows.append(image[:, top : top + side, left : left + side].flatten())
    return torch.stack(rows)


def update_by_hand(R, rows, rate, balance):
    """Apply the published rule to rows (M, F), sample by sample."""
    C, V = torch.zeros_like(R), torch.zeros_like(R)
    for z in rows @ R.mT:
        outer = torch.outer(z, z)
        C += (outer - torch.diag(outer.diag())) / len(rows)
        V += (torch.diag(outer.diag()) - torch.eye(len(z)).to(R)) / len(rows)
    return R - rate * ((1 - balance) * C @ R + balance * V @ R)


@loop_over(("kind", "count"), [("conv", 25), ("strided", 12), ("linear", 30), ("wide", 25)])
def test_decorrelation_applies_and_updates_its_matrix_as_published(kind, count):
    options = {"rate": 0.02, "balance": 0.3}
    if kind in ("conv", "strided"):
        stride = 2 if kind == "strided" else 1
        layer = DecorrelatedConv2d(3, 4, 3, padding=1, stride=stride, **options).double()
        x = correlated_images(count, 3)
        patches = lambda x: list_patches(x, 3, stride, 1)
        expected = lambda R: patches(x) @ (layer.weight.flatten(1) @ R).mT + layer.bias
        rows = lambda y: y.permute(0, 2, 3, 1).reshape(-1, 4)
    else:
        layer = DecorrelatedLinear(50 if kind == "wide" else 5, 4, **options).double()
        x = (
            torch.randn(count, layer.in_features).double()
            @ torch.randn(2 * [layer.in_features]).double()
        )
        patches = rows = lambda x: x
        expected = lambda R: x @ R.mT @ layer.weight.mT + layer.bias
    R = torch.eye(len(layer.R)).double()
    for _ in range(2):
        torch.testing.assert_close(rows(layer(x)), expected(R))
        decorrelate(nn.Sequential(layer))
        R = update_by_hand(R, patches(x[: math.ceil(count / 10)]), **options)
        torch.testing.assert_close(layer.R, R)
    decorrelate(layer)  # no batch since the last update
    layer.eval()(x)
    decorrelate(layer)
    torch.testing.assert_close(layer.R, R)


def test_no_gradient_flows_into_the_decorrelation_and_it_decorrelates():
    torch.manual_seed(0)
    layer = DecorrelatedLinear(6, 3, rate=0.02)
    x = torch.randn(5000, 6) @ (torch.eye(6) + 0.5 * torch.randn(6, 6))
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    layer(x).sum().backward()
    assert not layer.R.requires_grad

    def largest_correlation():
        z = x @ layer.R.mT
        moment = (z.mT @ z / z.square().sum(0).outer(z.square().sum(0)).sqrt()).abs()
        return (moment - torch.diag(moment.diag())).max()

    before = largest_correlation()
    for _ in range(300):
        layer(x)
        decorrelate(layer)
    assert largest_correlation() < 0.2 * before


def test_an_output_of_one_block_has_unit_variance():
    torch.manual_seed(0)
    options = {"mode": 4, "block": 3, "padding": 1, "eps": 1e-4, "output_eps": 1e-12}
    conv = NormalizedDeconv(3, 5, 3, **options).double()
    x = correlated_images(40, 3)
    y = conv(x) - conv.bias[:, None, None]
    torch.testing.assert_close(y.var((0, 2, 3), correction=0), torch.ones(5).double())
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(5).double())


def test_the_variance_of_an_output_is_the_sum_over_its_blocks():
    torch.manual_seed(0)
    options = {"mode": 4, "block": 2, "padding": 1, "layout": "contiguous", "momentum": 1.0}
    conv = NormalizedDeconv(6, 4, 3, bias=False, output_eps=0.5, **options).double()
    x = correlated_images(20, 6)
    rows = list_patches(x, 3, 1, 1)
    rows = rows - rows.mean(0)
    blocks = [rows[:, first : first + 18] for first in (0, 18, 36)]
    cov = sum(block.mT @ block for block in blocks) / (3 * len(rows))
    plain = FoldOf(conv)(x)
    for index, row in enumerate(plain.flatten(1)):
        parts = [row[first : first + 18] for first in (0, 18, 36)]
        variance = sum(part @ cov @ part for part in parts)
        expected = (row / (variance + 0.5).sqrt()).reshape(1, 6, 3, 3)
        found = conv(x)[:, index : index + 1]
        torch.testing.assert_close(
            found - found.mean(), (y := F.conv2d(x, expected, padding=1)) - y.mean()
        )
    conv.eval()
    assert not torch.allclose(conv(x), F.conv2d(x, plain, padding=1))
    torch.testing.assert_close(fuse(conv)(x), conv(x))
    for broken in ({"mode": 3}, {"groups": 2}):
        with pytest.raises(ValueError, match=f"{next(iter(broken))} must be"):
            NormalizedDeconv(4, 4, 3, **broken)


class FoldOf:
    """The folded weight W D of a layer, without the normalisation of its outputs."""

    def __init__(self, conv):
        self.conv = conv

    def __call__(self, x):
        return super(NormalizedDeconv, self.conv).fold_whitening(x)[1].detach()


def make_normalized_deconv():
    return NormalizedDeconv(16, 8, 3, padding=1, block=4)


@loop_over(
    "make",
    [
        lambda: IterNorm(16, group=8, momentum=1.0),
        lambda: DecorrelatedConv2d(16, 8, 3, padding=1),
        make_normalized_deconv,
    ],
)
def test_statistics_of_rivals_are_float32_under_autocast(make):
    found = []
    for amp in (False, True):
        torch.manual_seed(0)
        layer = make().train()
        x = correlated_images(20, 16).float().bfloat16()  # equal in both precisions
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            y = layer(x if amp else x.float())
        decorrelate(layer)
        found.append({"y": y.detach().float()} | dict(layer.named_buffers()))
    for name, value in found[0].items():
        tolerance = 2**-7 * found[0]["y"].abs().max().item() if name == "y" else 1e-6
        torch.testing.assert_close(found[1][name], value, rtol=1e-5, atol=tolerance)
