import math

import torch
from torch import nn

from util.training.accelerator import Accelerator
from util.training.nonfinite import find_nonfinite

CPU = Accelerator(torch.device("cpu"))


def make_model():
    return nn.Sequential(
        nn.Linear(2, 3), nn.Sequential(nn.ReLU(), nn.Linear(3, 3)), nn.Linear(3, 1)
    )


def test_the_first_layer_with_a_nonfinite_output_is_named():
    model, images = make_model(), torch.ones(4, 2)
    assert find_nonfinite(model, CPU, images) is None
    with torch.no_grad():
        model[1][1].weight[0, 0] = math.inf
        model[2].weight[0, 0] = math.nan
    assert find_nonfinite(model, CPU, images) == "the output of 1.1 (Linear)"
    assert not model[1][1]._forward_hooks


def test_the_last_parameter_with_a_nonfinite_gradient_is_named():
    model = make_model()
    bad = [model[1][1].bias, model[0].weight]
    assert find_nonfinite(model, CPU, torch.ones(1, 2), bad) == "the gradient of 1.1.bias"
