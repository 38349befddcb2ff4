"""A network is registered in every place that CONTRIBUTING.md lists, and initialised."""

import re
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from deconv import Delinear, FastDeconv
from models import (
    ARCHITECTURES,
    IMAGENET_ARCHITECTURES,
    Architecture,
    build_imagenet_model,
    build_model,
    describe_architectures,
    describe_imagenet_architectures,
    init_weights,
    make_layers,
    registry,
)
from models.imagenet import OURS
from scripts.dev import record_golden
from tests.models.test_imagenet import TWINS
from tests.models.test_small_images import PARAMETERS
from tests.pairwise import loop_over
from tests.test_documents import list_file_tree, read
from util.data import loader

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
    "transfer",
}
TABLE = "models/small_images.py (ARCHITECTURES) or models/imagenet.py (OURS)"
ALIASES = {*ARCHITECTURES} - {*record_golden.list_networks()}  # share the entry of another name


def find_module(entry):
    """Return the module that defines the network of an entry."""
    build = entry.build
    while isinstance(build, partial):
        build = build.func
    return sys.modules[build.__module__]


def list_forgotten_places(name, entry, *, large=False):
    """Yield each place of CONTRIBUTING.md that a registered network lacks, and the remedy."""
    module = find_module(entry)
    file = f"{module.__name__.replace('.', '/')}.py"
    if not re.search(r"\b(19|20)\d\d\b", module.__doc__ or ""):
        yield f"{file}: cite the paper of {name}, with its year, in the docstring of the module"
    if large and name not in TWINS:
        yield f"tests/models/test_imagenet.py (TWINS): add the torchvision twin of {name}"
    if not large and name not in PARAMETERS:
        yield f"tests/models/test_small_images.py (PARAMETERS): add the parameter counts of {name}"
    if name not in ALIASES and not (record_golden.FOLDER / f"{name}.txt").exists():
        yield f"tests/golden/{name}.txt: run python scripts/dev/record_golden.py {name}"
    if file not in list_file_tree():
        yield f"CONTRIBUTING.md, Files: add a line for {file}"
    if f"`{name}`" not in read(ROOT / "CHANGELOG.md"):
        yield f"CHANGELOG.md, Unreleased: name `{name}`"


def list_unregistered(entries):
    """Yield each network file and each recorded network that has no entry."""
    files = {path.stem for path in (ROOT / "models").glob("*.py")} - INFRASTRUCTURE
    defining = {find_module(entry).__name__ for entry in entries.values()}
    for file in sorted(file for file in files if f"models.{file}" not in defining):
        yield f"{TABLE}: register the network of models/{file}.py"
    for recorded in sorted({path.stem for path in record_golden.FOLDER.glob("*.txt")}):
        if recorded not in entries:
            yield f"{TABLE}: register {recorded}, or remove tests/golden/{recorded}.txt"


def test_no_place_was_forgotten():
    entries = ARCHITECTURES | OURS
    forgotten = [
        place
        for name, entry in entries.items()
        for place in list_forgotten_places(name, entry, large=name in OURS)
    ]
    forgotten += list_unregistered(entries)
    if forgotten:
        pytest.fail("\n".join(forgotten), pytrace=False)


def test_each_forgotten_place_is_named(monkeypatch):
    module = ModuleType("models.made_up", "A made-up network.")
    monkeypatch.setitem(sys.modules, "models.made_up", module)

    def build(layers):
        """Stand for a network of the module."""

    build.__module__ = "models.made_up"
    entry = Architecture(partial(build), "a made-up network")
    common = ["tests/golden/made_up.txt", "CONTRIBUTING.md", "CHANGELOG.md"]
    for large, counts in ((False, "test_small_images.py"), (True, "test_imagenet.py")):
        places = [
            re.split("[ ,:]", place)[0]
            for place in list_forgotten_places("made_up", entry, large=large)
        ]
        assert places == ["models/made_up.py", f"tests/models/{counts}", *common]
    entries = {arch: ARCHITECTURES[arch] for arch in ARCHITECTURES if arch not in ("dpn", "lenet")}
    missing = ("the network of models/dpn.py", "dpn, or", "lenet, or")
    assert all(any(name in place for place in list_unregistered(entries)) for name in missing)


def test_models_and_util_take_images_of_the_same_smallest_size():
    assert registry.MIN_IMAGE_SIZE == loader.MIN_IMAGE_SIZE


def test_help_names_every_network():
    lines = describe_architectures().splitlines()
    assert [line.split()[0] for line in lines] == list(ARCHITECTURES)
    text = describe_imagenet_architectures()
    assert [line.split()[0] for line in text.splitlines()[: len(OURS)]] == list(OURS)
    assert {*IMAGENET_ARCHITECTURES} <= {word.strip(",") for word in text.split()}
    assert "timm/NAME" in text


@loop_over("deconv", [False, True])
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
