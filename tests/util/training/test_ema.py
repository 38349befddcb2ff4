import pytest
import torch
from torch import nn

from deconv import FastDeconv
from util.errors import RunError
from util.training.ema import ExponentialAverage, check_decay


def test_weights_and_running_statistics_follow_the_recursion_and_counters_are_copied():
    model = nn.Sequential(FastDeconv(2, 4, 3), nn.BatchNorm2d(4))
    average = ExponentialAverage(model, 0.8)
    for step in range(5):
        model(torch.randn(8, 2, 6, 6))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn_like(parameter)
        average.update_parameters(model)
        now = {name: value.double() for name, value in model.state_dict().items()}
        if step == 0:
            truth = now
        truth = {name: 0.8 * truth[name] + 0.2 * value for name, value in now.items()}
    found = average.module.state_dict()
    for name, value in model.state_dict().items():
        expected = truth[name].float() if value.is_floating_point() else value
        torch.testing.assert_close(found[name], expected)
    assert found["1.num_batches_tracked"] == 5


def test_an_average_over_more_steps_than_the_run_is_refused():
    check_decay(0.9, 10)
    with pytest.raises(RunError, match="--ema 0.99: averages about 100 steps, but the run has 99"):
        check_decay(0.99, 99)
