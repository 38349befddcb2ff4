"""The recipe of airbench: optimizer, schedule, augmentation and views, against its rules."""

from argparse import Namespace

import numpy as np
import pytest
import torch
from torch import nn

from models import build_model, make_layers
from scripts.paper.airbench import (
    AlternatingFlip,
    NormalizedMuon,
    SixViews,
    build_optimizer,
    build_scheduler,
    orthogonalize,
)
from tests.pairwise import loop_over
from util.training.resume import Plan


@loop_over("shape", [(6, 20), (20, 6)])
def test_the_quintic_iteration_acts_on_each_singular_value_alone(shape):
    matrix = torch.randn(shape).double()
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    values = values / values.square().sum().sqrt()
    for _ in range(3):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    torch.testing.assert_close(
        orthogonalize(matrix), u @ torch.diag(values) @ v, rtol=1e-5, atol=1e-6
    )


def test_muon_steps_matrices_of_fixed_norm_and_the_rest_as_sgd():
    torch.manual_seed(0)
    conv, bias = nn.Parameter(torch.randn(4, 3, 2, 2)), nn.Parameter(torch.randn(4))
    twin, weight, buffer = nn.Parameter(bias.detach().clone()), conv.detach().clone(), 0
    groups = [{"params": [conv], "matrices": True, "momentum": 0.6}, {"params": [bias], "lr": 0.5}]
    groups[1]["weight_decay"] = 0.1
    muon = NormalizedMuon(groups, lr=0.24)
    sgd = torch.optim.SGD([twin], lr=0.5, momentum=0.85, nesterov=True, weight_decay=0.1)
    for _ in range(3):
        conv.grad, bias.grad = torch.randn_like(conv), torch.randn_like(bias)
        twin.grad = bias.grad.clone()
        muon.step()
        sgd.step()
        buffer = 0.6 * buffer + conv.grad
        update = orthogonalize((conv.grad + 0.6 * buffer).reshape(4, 12)).reshape(4, 3, 2, 2)
        weight = weight * 2 / weight.square().sum().sqrt() - 0.24 * update
        torch.testing.assert_close(conv.detach(), weight)
        torch.testing.assert_close(bias.detach(), twin.detach())


def make_flags(optimizer):
    rates = {"lr": 0.24, "bias_rate": 0.1, "head_rate": 0.5, "weight_decay": 0.01}
    return Namespace(optimizer=optimizer, batch_size=2000, **rates)


@loop_over(
    ("optimizer", "deconv"), [("Muon", False), ("Muon", True), ("SGD", True), ("AdamW", False)]
)
def test_every_learned_parameter_is_stepped_once_at_its_rate(optimizer, deconv):
    model = build_model("airbench", make_layers(deconv=deconv))
    found = build_optimizer(make_flags(optimizer), model)
    rates = {id(p): group["lr"] for group in found.param_groups for p in group["params"]}
    assert len(rates) == sum(len(group["params"]) for group in found.param_groups)
    assert {*rates} == {id(p) for p in model.parameters() if p.requires_grad}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = "conv" if parameter.ndim == 4 else "head" if parameter.ndim == 2 else "bias"
            expected = {"conv": 0.24, "head": 0.5 * 2000, "bias": 0.1 * 2000}[kind]
            assert rates[id(parameter)] == (0.24 if optimizer == "AdamW" else expected), name


def test_rates_fall_linearly_and_that_of_the_first_bias_earlier():
    model = build_model("airbench", make_layers(deconv=False))
    for start in (0, 10):
        optimizer = build_optimizer(make_flags("Muon"), model)
        plan = Plan(epoch_steps=8, total_steps=16, test_batches=1)
        scheduler = build_scheduler(make_flags("Muon"), optimizer, plan, start)
        for step in range(start, 16):
            convs, first, *_, head = (group["lr"] for group in optimizer.param_groups)
            assert convs == pytest.approx(0.24 * (1 - step / 16))
            assert first == pytest.approx(200 * max(0, 1 - step / 6))
            assert head == pytest.approx(1000 * (1 - step / 16))
            optimizer.step()
            scheduler.step()


def test_images_alternate_between_flipped_and_not_and_are_shifted_in_a_mirror():
    images = torch.arange(64 * 3 * 8 * 8).remainder(251).to(torch.uint8).reshape(64, 3, 8, 8)
    augment, index = AlternatingFlip(), np.arange(64)
    seen = [augment(images, 0, np.full(64, epoch), index) for epoch in (1, 2, 3)]
    padded = torch.nn.functional.pad(images.float(), (2, 2, 2, 2), "reflect").to(torch.uint8)
    ways = []
    for epoch in seen:
        places = []
        for number, image in enumerate(epoch):
            views = {
                (flip, top, left): padded[number, :, top : top + 8, left : left + 8].flip(
                    [-1] if flip else []
                )
                for flip in (0, 1)
                for top in range(5)
                for left in range(5)
            }
            places.append(next(key for key, view in views.items() if torch.equal(view, image)))
        ways.append(places)
    flips = [[flip for flip, _, _ in places] for places in ways]
    assert [1 - flip for flip in flips[0]] == flips[1] and flips[0] == flips[2]
    assert 16 < sum(flips[0]) < 48 and len({place[1:] for place in ways[0]}) > 12
    assert ways[0] != ways[2]


def test_six_views_weigh_as_published():
    x, seen = torch.randn(2, 3, 5, 5), []
    views = SixViews(lambda view: seen.append(view) or torch.full((2, 1), 10.0 ** (len(seen) - 1)))
    weighted = views(x)[0, 0].item()
    assert weighted == pytest.approx(0.25 * 11 + 0.125 * 111100)
    assert torch.equal(seen[0], x)
    for number in (0, 2, 4):
        assert torch.equal(seen[number + 1], seen[number].flip(-1))
    assert torch.equal(seen[2][..., 1:, 1:], x[..., :-1, :-1])  # down and right
    assert torch.equal(seen[4][..., :-1, :-1], x[..., 1:, 1:])  # up and left
    assert torch.equal(seen[2][..., 0, 1:], x[..., 1, :-1])
