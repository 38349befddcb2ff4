"""Weights of one network for another: taken by layer, BatchNorm folded in."""

import pytest
import torch
from torch import nn

from deconv import Delinear, FastDeconv
from models import build_imagenet_model, build_model, make_layers, take_weights
from tests.pairwise import loop_over

PLAIN, DECONV = make_layers(deconv=False), make_layers(deconv=True, block_final=64)


@loop_over(
    ("build", "arch"),
    [(build_model, "lenet"), (build_model, "mobilev2"), (build_imagenet_model, "resnet18")],
)
def test_batchnorm_is_folded_into_the_weights_of_deconvolutions(build, arch):
    theirs, ours = build(arch, PLAIN, num_classes=7), build(arch, DECONV, num_classes=7)
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    state = theirs.state_dict()
    transfer = take_weights(ours, state, lambda: build(arch, PLAIN, num_classes=7))
    assert transfer.taken == transfer.total == len(state) and transfer.needs_calibration
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = theirs.eval()(images)
        torch.testing.assert_close(ours.eval()(images), expected, rtol=1e-4, atol=1e-4)


def test_a_layer_is_taken_whole_or_not_at_all():
    source = nn.ModuleDict(
        {"same": nn.Linear(4, 3), "head": nn.Linear(4, 3), "old": nn.Linear(1, 1)}
    )
    source["bare"] = nn.Linear(4, 3, bias=False)
    model = nn.ModuleDict(
        {"same": nn.Linear(4, 3), "head": nn.Linear(4, 2), "new": nn.Linear(1, 1)}
    )
    model["bare"] = nn.Linear(4, 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    transfer = take_weights(model, source.state_dict())
    assert transfer.new == (
        "head (weight 3 x 4 there, 2 x 4 here)",
        "new",
        "bare (bias absent there, 3 here)",
    )
    assert (transfer.taken, transfer.total, transfer.unused) == (2, 8, ("old",))
    for name, value in model.state_dict().items():
        is_taken = name.startswith("same")
        assert torch.equal(value, source.state_dict()[name] if is_taken else before[name]), name


@loop_over(
    ("source", "model", "message"),
    [
        (
            FastDeconv(8, 4, 3, block=4),
            FastDeconv(8, 4, 3, block=8),
            "layer 0 do not fit: running_",
        ),
        (Delinear(8, 4), nn.Linear(8, 4), "layer 0 do not fit: running_mean 8 there, absent here"),
        (nn.BatchNorm2d(4), nn.Conv2d(1, 1, 1), "the weights have BatchNorm, but the network none"),
        (nn.Linear(8, 4), nn.Linear(4, 4), "no layer fits in name and shape"),
    ],
)
def test_weights_that_would_be_wrong_are_refused(source, model, message):
    model, source = nn.Sequential(model), nn.Sequential(source).state_dict()
    before = [value.clone() for value in model.state_dict().values()]
    with pytest.raises(ValueError, match=message):
        take_weights(model, source)
    assert all(map(torch.equal, before, model.state_dict().values()))
