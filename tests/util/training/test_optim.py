import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from util.training.optim import (
    SCHEDULES,
    build_criterion,
    build_optimizer,
    build_scheduler,
    milestone_steps,
)


def make_rates(name, *, total=10, start=0, **more):
    """The rates of the steps from `start` on, from an optimizer that starts at 1."""
    optimizer = build_optimizer("SGD", [nn.Parameter(torch.ones(1))], lr=1.0)
    schedule = build_scheduler(
        name, optimizer, total_steps=total, epoch_steps=2, start_step=start, **more
    )
    rates = []
    for _ in range(start, total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates, optimizer.param_groups[0]["lr"]


def test_cosine_falls_from_lr_to_zero_over_the_steps():
    rates, end = make_rates("cosine")
    assert rates == [pytest.approx((1 + math.cos(math.pi * s / 10)) / 2) for s in range(10)]
    assert end == 0


def test_linear_falls_from_lr_to_zero_after_the_warmup():
    rates, end = make_rates("linear")
    assert rates == [pytest.approx(1 - s / 10) for s in range(10)] and end == 0
    rates, end = make_rates("linear", warmup_epochs=1)
    assert rates == [pytest.approx(r) for r in (1 / 3, 2 / 3, *(1 - s / 8 for s in range(8)))]
    assert end == 0


def test_multistep_drops_at_epochs():
    rates, end = make_rates("multistep", milestones=[2, 4], gamma=0.5)
    assert rates == [1] * 4 + [0.5] * 4 + [0.25] * 2
    assert end == 0.25


@pytest.mark.parametrize(
    ("milestones", "steps"),
    [([0.4], [40, 80]), ([0.5], [50]), ([0.25, 0.75], [25, 75]), ([3, 0.5], [30, 50])],
)
def test_milestones_below_one_are_fractions_and_a_single_one_repeats(milestones, steps):
    assert milestone_steps(milestones, total_steps=100, epoch_steps=10) == steps


def test_step_drops_every_so_many_epochs():
    rates, _end = make_rates("step", step_size=2, gamma=0.5)
    assert rates == [1] * 4 + [0.5] * 4 + [0.25] * 2


def test_warming_up_climbs_to_the_rate_before_the_schedule_begins():
    rates, end = make_rates("cosine", warmup_epochs=2)
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5:] == [pytest.approx((1 + math.cos(math.pi * s / 6)) / 2) for s in range(1, 6)]
    assert end == 0
    rates, _ = make_rates("multistep", warmup_epochs=0.5, milestones=[2], gamma=0.5)
    assert rates == [0.5] + [1] * 3 + [0.5] * 6


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_continues_bit_equal_from_any_step(name):
    whole, end = make_rates(name)
    for start in range(1, 10):
        assert make_rates(name, start=start) == (whole[start:], end)


def test_l2_is_half_the_squared_distance_to_one_hot_averaged_over_images():
    logits = torch.tensor([[0.5, 0.0, 1.0], [0.0, 3.0, 2.0]])
    loss = build_criterion("L2", 3)(logits, torch.tensor([2, 1]))
    assert loss.item() == pytest.approx((0.5**2 + 2**2 + 2**2) / 2 / 2)


def test_ce_of_equal_logits_is_log_classes():
    loss = build_criterion("CE", 4)(torch.zeros(2, 4), torch.tensor([0, 3]))
    assert loss.item() == pytest.approx(math.log(4))


def test_losses_of_shares_are_the_shares_of_losses():
    torch.manual_seed(0)
    logits, one, other = torch.randn(5, 4), torch.arange(5) % 4, torch.arange(5) % 3
    shares = 0.75 * F.one_hot(one, 4) + 0.25 * F.one_hot(other, 4)
    for smoothing in (0.0, 0.1):
        loss = build_criterion("CE", 4, smoothing)
        expected = 0.75 * loss(logits, one) + 0.25 * loss(logits, other)
        torch.testing.assert_close(loss(logits, shares), expected)
    loss = build_criterion("L2", 4)
    torch.testing.assert_close(loss(logits, shares), (logits - shares).square().sum() / 10)
    assert loss(logits, F.one_hot(one, 4)) == loss(logits, one)


def test_smoothing_spreads_its_share_over_all_classes():
    logits = torch.tensor([[2.0, 0.0, 1.0]])
    target = torch.tensor([0.8 + 0.2 / 3, 0.2 / 3, 0.2 / 3])
    loss = build_criterion("CE", 3, 0.2)(logits, torch.tensor([0]))
    assert loss.item() == pytest.approx(-(target * logits.log_softmax(1)).sum().item())


def test_optimizers_are_what_they_are_called():
    weights = [nn.Parameter(torch.ones(1))]
    sgd = build_optimizer("SGD", weights, lr=0.1, momentum=0.8, weight_decay=0.01)
    assert (sgd.defaults["momentum"], sgd.defaults["weight_decay"]) == (0.8, 0.01)
    assert not build_optimizer("Adam", weights, lr=0.1).defaults["amsgrad"]
    assert build_optimizer("AMSGrad", weights, lr=0.1).defaults["amsgrad"]
    adamw = build_optimizer("AdamW", weights, lr=0.1, weight_decay=0.01)
    assert (type(adamw), adamw.defaults["weight_decay"]) == (torch.optim.AdamW, 0.01)


def test_unknown_names_are_refused_by_name():
    weights = [nn.Parameter(torch.ones(1))]
    with pytest.raises(ValueError, match="loss.*'hinge'"):
        build_criterion("hinge", 3)
    with pytest.raises(ValueError, match="optimizer.*'Lion'"):
        build_optimizer("Lion", weights, lr=0.1)
    sgd = build_optimizer("SGD", weights, lr=0.1)
    with pytest.raises(ValueError, match="lr_scheduler.*'sine'"):
        build_scheduler("sine", sgd, total_steps=1, epoch_steps=1)
