"""A network is registered in every place that `models/registry.py` lists."""

import re
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import nn

from deconv import Delinear, FastDeconv
from models import (
    ARCHITECTURES,
    IMAGENET_ARCHITECTURES,
    build_imagenet_model,
    build_model,
    describe_architectures,
    describe_imagenet_architectures,
    init_weights,
    make_layers,
)
from models.imagenet import OURS
from scripts.dev import record_golden
from tests.models.test_imagenet import TWINS
from tests.models.test_small_images import PARAMETERS

ROOT = Path(__file__).resolve().parents[2]
# Files of models/ that define no network.
INFRASTRUCTURE = {
    "__init__",
    "building_blocks",
    "external",
    "factory",
    "imagenet",
    "registry",
    "small_images",
}
TABLE = "models/small_images.py (ARCHITECTURES) or models/imagenet.py (OURS)"


def find_module(entry):
    """Return the file stem of the module that defines the network of an entry."""
    build = entry.build
    while isinstance(build, partial):
        build = build.func
    return build.__module__.rpartition(".")[2]


def list_forgotten_places(small=ARCHITECTURES, large=OURS):
    """Yield a sentence for each place that was forgotten when a network was added."""
    entries = small | large
    modules = {path.stem for path in (ROOT / "models").glob("*.py")} - INFRASTRUCTURE
    for module in sorted(modules - {find_module(entry) for entry in entries.values()}):
        yield f"register the network of models/{module}.py in {TABLE}"
    for module in sorted(modules):
        if not re.search(r"\b(19|20)\d\d\b", import_module(f"models.{module}").__doc__ or ""):
            yield f"cite the paper, with its year, in the docstring of models/{module}.py"
    for name in small.keys() - PARAMETERS.keys():
        yield f"add the number of parameters of {name} to PARAMETERS in test_small_images.py"
    for name in large.keys() - TWINS.keys():
        yield f"add the torchvision twin of {name} to TWINS in tests/models/test_imagenet.py"
    recorded = {path.stem for path in record_golden.FOLDER.glob("*.txt")}
    for name in sorted(set(record_golden.list_networks()) - recorded):
        yield f"run python scripts/dev/record_golden.py {name}: no tests/golden/{name}.txt"
    for name in sorted(recorded - entries.keys()):
        yield f"register {name} in {TABLE}, or remove tests/golden/{name}.txt"


def test_no_place_was_forgotten():
    assert not (forgotten := list(list_forgotten_places())), "\n".join(forgotten)


FORGOTTEN = ("dpn", "lenet", "resnext")


def test_each_forgotten_place_is_named(monkeypatch):
    entry = ARCHITECTURES["vgg11"]
    new = type(entry)(partial(entry.build), "a new network")
    small = {arch: ARCHITECTURES[arch] for arch in ARCHITECTURES if arch not in FORGOTTEN}
    small |= {"new": new}
    monkeypatch.setattr(record_golden, "ARCHITECTURES", small)
    monkeypatch.setattr(import_module("models.vgg"), "__doc__", "VGG.")
    assert [
        sentence.split()[:2] for sentence in list_forgotten_places(small, OURS | {"newd": entry})
    ] == [
        ["register", "the"],
        ["register", "the"],
        ["cite", "the"],
        ["add", "the"],
        ["add", "the"],
        ["run", "python"],
        *[["register", arch] for arch in FORGOTTEN],
    ]


def test_help_names_every_network():
    lines = describe_architectures().splitlines()
    assert [line.split()[0] for line in lines] == list(ARCHITECTURES)
    text = describe_imagenet_architectures()
    assert [line.split()[0] for line in text.splitlines()[: len(OURS)]] == list(OURS)
    assert {*IMAGENET_ARCHITECTURES} <= {word.strip(",") for word in text.split()}
    assert "timm/NAME" in text


@pytest.mark.parametrize("deconv", [False, True])
def test_initialisation_draws_every_parameter_of_every_network(deconv):
    for arch in (*OURS, *ARCHITECTURES):
        make = build_model if arch in ARCHITECTURES else build_imagenet_model
        with torch.device("meta"):
            model = make(arch, make_layers(deconv=deconv))
        model.to_empty(device="cpu")
        for parameter in model.parameters():
            nn.init.constant_(parameter, torch.nan)
        init_weights(model)
        for module in model.modules():
            own = dict(module.named_parameters(recurse=False))
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                assert (own["weight"] == 1).all(), arch
                assert (own["bias"] == 0).all(), arch
            elif own:
                bound = own["weight"][0].numel() ** -0.5
                for parameter in own.values():
                    low, high = parameter.aminmax()
                    assert -bound <= low <= high <= bound, arch  # fails on NaN
                    assert low < high or parameter.numel() == 1, arch
                rms, uncertainty = bound / 3**0.5, own["weight"].numel() ** -0.5
                assert own["weight"].square().mean().sqrt().item() == pytest.approx(
                    rms, rel=3 * uncertainty
                ), arch


def test_weights_are_uniform_within_one_over_root_fan_in():
    model = nn.Sequential(
        nn.Conv2d(32, 64, 3, groups=2), nn.BatchNorm2d(64), Delinear(256, 64), FastDeconv(16, 64, 3)
    )
    nn.init.zeros_(model[1].weight)
    init_weights(model)
    for layer, fan_in in ((model[0], 144), (model[2], 256), (model[3], 144)):
        bound = fan_in**-0.5
        assert 0.95 * bound < layer.weight.abs().max() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
        assert 0.5 * bound < layer.bias.abs().max() <= bound
    assert (model[1].weight == 1).all()
    assert (model[1].bias == 0).all()


def test_new_networks_are_initialised(monkeypatch):
    monkeypatch.setattr(nn.Conv2d, "reset_parameters", lambda conv: nn.init.zeros_(conv.weight))
    model = build_imagenet_model("resnet18d", make_layers(deconv=False))
    assert all(m.weight.std() > 0 for m in model.modules() if isinstance(m, nn.Conv2d))


def test_same_seed_same_network():
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(build_model("simple_v2", make_layers(deconv=True)).state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
