"""Small models and comparisons for the tests of surgery."""

import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from deconv import plan

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}


def randomize(model):
    """The model with every BatchNorm as if trained: no number as it starts."""
    torch.manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if getattr(module, "running_var", None) is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
            if isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d) and module.bias is not None:
                module.weight.uniform_(0.5, 2)
                module.bias.normal_()
    return model


def pair(*, bias=False, norm=nn.BatchNorm2d, **options):
    conv = nn.Conv2d(4, 8, 3, padding=1, bias=bias, **options)
    return nn.Sequential(conv, norm(8), nn.ReLU(inplace=True))


def actions(model, **options):
    return {row.name: (row.action, row.becomes) for row in plan(model, **options)}


def reasons(model, **options):
    return {row.name: f"{row.action}: {row.reason}" for row in plan(model, **options)}


def assert_kept(old, new, x, tolerance=1e-4):
    old.eval(), new.eval()
    with torch.no_grad():
        given, expected = new(x), old(x)
    atol = tolerance * expected.abs().max().item()
    torch.testing.assert_close(given, expected, rtol=0, atol=atol)


class PreActivation(nn.Module):
    """BN, ReLU, convolution, twice, beside a shortcut of its input."""

    def __init__(self, inplace=True):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.relu = nn.ReLU(inplace=inplace)

    def forward(self, x):
        y = self.conv1(self.relu(self.bn1(x)))
        return x + self.conv2(self.relu(self.bn2(y)))
