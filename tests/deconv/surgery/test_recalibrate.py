"""deconv.recalibrate: the plain mean of what each batch has, and nothing else changes."""

import copy

import pytest
import torch
from torch import nn

from deconv import Delinear, FastDeconv, recalibrate
from tests.pairwise import loop_over


def network():
    torch.manual_seed(0)
    layers = [FastDeconv(3, 4, 3), nn.Dropout(0.9), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*layers, nn.Flatten(), Delinear(4, 2))


def batches(count=3):
    return list(torch.randn(count, 8, 3, 7, 7, generator=torch.Generator().manual_seed(1)))


@loop_over("tuples", [False, True])
def test_statistics_are_the_mean_over_batches(tuples):
    model, data = network(), batches()
    model(10 * data[0])  # to be forgotten
    means = []
    for x in data:
        fresh = copy.deepcopy(model[0]).train()
        fresh.reset_running_stats()
        fresh(x)
        means.append(torch.cat([fresh.running_mean, fresh.running_cov_joint.flatten()]))
    given = [(x, torch.zeros(8)) for x in data] if tuples else data
    assert recalibrate(model, given) == 3
    now = torch.cat([model[0].running_mean, model[0].running_cov_joint.flatten()])
    torch.testing.assert_close(now, torch.stack(means).mean(0), rtol=1e-5, atol=1e-6)
    assert model[0].num_batches_tracked == 3


def test_nothing_else_changes():
    model = network()
    model(batches(1)[0])
    model[1].eval()
    model[5].momentum = 0.3
    before, flags = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    assert recalibrate(model, batches(), limit=2) == 2
    assert [m.training for m in model.modules()] == flags
    assert (model[0].momentum, model[5].momentum) == (0.1, 0.3)
    moved = {
        name for name, value in model.state_dict().items() if not torch.equal(value, before[name])
    }
    expected = {f"{i}.{name}" for i in (0, 5) for name in ("running_mean", "running_cov_joint")}
    assert moved == expected | {"0.num_batches_tracked", "5.num_batches_tracked"}
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_average_of_weights_is_served_well_again():
    model, data = network(), batches()
    with torch.no_grad():
        for x in data:
            model(x)
        model[0].weight.mul_(20)  # the next layer sees what its statistics do not know
        stale = model.eval()(data[0]).std()
        recalibrate(model, data)
        assert model(data[0]).std() < stale / 2


@loop_over(
    ("model", "data", "options", "message"),
    [
        (nn.Linear(2, 2), batches(), {}, "Linear has no deconvolution layer"),
        (network(), [], {}, "no finite batch among 0 batches"),
        (network(), [batches(1)[0] / 0], {}, "no finite batch among 1 batches"),
        (network(), batches(), {"limit": 0}, "limit must be at least 1 batch, got 0"),
    ],
)
def test_bad_input_is_refused_and_leaves_the_network_alone(model, data, options, message):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        recalibrate(model, data, **options)
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    assert model.training


def test_runs_count_alike_where_a_layer_has_several_and_bad_batches_do_not():
    layer = FastDeconv(3, 3, 3, padding=1, mode=4)
    good = batches(3)
    recalibrate(layer, [*good[:2], good[0] / 0, good[2]])
    mean = torch.stack([x.mean((0, 2, 3)) for x in good]).mean(0)
    torch.testing.assert_close(layer.running_mean[4::9], mean)  # the middle tap sees all pixels
    twice = copy.deepcopy(layer)
    recalibrate(_Twice(twice), good)
    torch.testing.assert_close(twice.running_mean[4::9], mean * 2)
    assert twice.num_batches_tracked == 6 and twice.momentum == 0.1


class _Twice(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x) + self.layer(3 * x)


@loop_over(
    ("batch", "forward"),
    [
        ({"x": 0}, lambda model, batch: model(batch["x"])),
        ((0, "labels"), None),
        ([0], lambda model, batch: model(*batch)),
        ({"x": 0}, lambda model, batch: model(*batch.values())),
    ],
)
def test_batches_of_any_kind_are_taken_by_a_forward(batch, forward):
    x = batches(1)[0]
    model, other = network(), network()
    batch = {"x": x} if isinstance(batch, dict) else type(batch)([x, *batch[1:]])
    assert recalibrate(model, [batch], forward=forward) == recalibrate(other, [x]) == 1
    torch.testing.assert_close(dict(model.state_dict()), dict(other.state_dict()), rtol=0, atol=0)


@loop_over(
    ("bad", "error", "message"),
    [
        ({"x": batches(1)[0]}, TypeError, "a batch must be a tensor.* got dict: pass forward="),
        ([], TypeError, "a batch must be a tensor.* got list"),
        (("x", batches(1)[0]), TypeError, "a batch must be a tensor.* got tuple"),
        (torch.ones(8, 4, 7, 7), ValueError, "3 channels"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
)
def test_an_error_in_any_batch_restores_all_statistics(bad, error, message):
    model = network()
    model(batches()[0])

    def loader():
        yield batches()[1]
        if isinstance(bad, BaseException):
            raise bad
        yield bad

    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        recalibrate(model, loader())
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    assert (model[0].momentum, model[5].momentum) == (0.1, 0.1)
    assert all(module.training for module in model.modules())


def test_a_layer_that_no_batch_reaches_keeps_its_statistics():
    model = network()
    model.unused = FastDeconv(3, 4, 3)
    model.unused(batches()[0])
    forward = lambda model, batch: nn.Sequential.forward(model[:6], batch)
    kept = copy.deepcopy(model.unused.state_dict())
    assert recalibrate(model, batches(), forward=forward) == 3
    torch.testing.assert_close(dict(model.unused.state_dict()), dict(kept), rtol=0, atol=0)
    assert model[0].num_batches_tracked == 3
