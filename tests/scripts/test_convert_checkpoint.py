"""Tests of scripts/convert_checkpoint.py: the converted checkpoint predicts as the published."""

import copy
import errno
import re
from functools import partial
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

import main
import main_imagenet
import models.densenet
import models.imagenet
import models.preact
import models.resnet
import models.vgg
from deconv import published
from scripts import convert_checkpoint
from scripts.published_networks import find_flags, read_layers, translate
from scripts.trained_network import load_network, read_images
from tests.pairwise import loop_over
from tests.scripts.published_oracles import (
    BATCHNORM,
    VGG,
    Basic,
    BasicLarge,
    DenseNet,
    PreAct,
    Stages,
    deconvolution,
)
from util.cli.settings import read_settings
from util.data.images import DataSpec

FLAGS = "--dataset digits --use-gpu False --batch-size 100 --epochs 4"
QUIET = "--tensorboardX False --save-plot False"
VGG11 = (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M")


class PublishedVGG(nn.Module):
    """VGG-11 as published: deconvolution and ReLU under `features.module`, then a Delinear."""

    def __init__(self):
        super().__init__()
        layers, channels = [], 1
        for width in VGG11:
            if width == "M":
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [published.FastDeconv(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
        self.features = nn.ModuleDict({"module": nn.Sequential(*layers)})
        self.classifier = published.Delinear(512, 10)

    def forward(self, x):
        return self.classifier(self.features["module"](x).flatten(1))


@pytest.fixture(scope="module")
def trained():
    """A published network after two steps, and its optimizer."""
    torch.manual_seed(0)
    network = PublishedVGG()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    for _ in range(2):
        network(torch.randn(64, 1, 32, 32)).square().mean().backward()
        optimizer.step()
    return network.eval(), optimizer


def save(path, network, optimizer, /, **changes):
    state = {f"module.{name}": value for name, value in network.state_dict().items()}
    content = {"epoch": 2, "state_dict": state, "best_acc": torch.tensor(12.5), "arch": "vgg11"}
    torch.save({**content, "optimizer": optimizer.state_dict(), **changes}, path)
    return str(path)


def test_a_published_checkpoint_predicts_the_same_and_is_tested(trained, tmp_path, capsys):
    network, optimizer = trained
    source, out = save(tmp_path / "published.pth.tar", *trained), str(tmp_path / "run")
    convert_checkpoint.main([source, out, *FLAGS.split()])
    found = load_network(out)
    images = read_images(found, None, 64)
    with torch.no_grad():
        scores, expected = found.network(images), network.double()(images.double()).float()
    network.float()
    torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    momenta = [entry["momentum_buffer"] for entry in found.saved["optimizer"]["state"].values()]
    own = [optimizer.state[p]["momentum_buffer"] for p in network.parameters()]
    assert all(torch.equal(*pair) for pair in zip(momenta, own, strict=True))
    assert (found.saved["epoch"], found.saved["best_top1"]) == (2, 12.5)
    capsys.readouterr()
    main.main(["--resume", out, "-e", "--use-gpu", "False"])
    assert re.search(r"vgg11  test loss \S+ top1", capsys.readouterr().out)


CHANNEL, DELINEAR = partial(published.ChannelDeconv, eps=1e-5), published.Delinear
WIDTHS = (16, 24)  # of small networks
SMALL_VGG = partial(VGG, widths=(*WIDTHS, 32))
LARGE_VGG = partial(SMALL_VGG, hidden=64)
RESNET, LARGE = partial(Stages, WIDTHS, Basic), partial(Stages, WIDTHS, BasicLarge, large=True)
WIDER = partial(Stages, (16, 32), Basic)
PREACT = partial(Stages, WIDTHS, PreAct, use_norm=False)
SENET = partial(Stages, WIDTHS, partial(PreAct, gate=True))
DENSE = partial(DenseNet, (1, 2), 4)


DECONV_2019 = SimpleNamespace(conv=partial(published.FastDeconv2019, eps=1e-5), norm=None)
DECONV_2019.stem, DECONV_2019.linear, DECONV_2019.channel = DECONV_2019.conv, nn.Linear, None


@pytest.fixture
def small(monkeypatch):
    """Give our networks the widths and depths of the networks above."""
    for module in (models.resnet, models.preact):
        monkeypatch.setattr(module, "WIDTHS", WIDTHS)
    monkeypatch.setitem(models.resnet.DEPTHS, 18, (models.resnet.BasicBlock, (2, 2)))
    monkeypatch.setattr(models.vgg, "WIDTHS", (*WIDTHS, 32))
    monkeypatch.setitem(models.vgg.DEPTHS, 11, (1, 1, 2))
    monkeypatch.setattr(models.densenet, "DEPTHS", (1, 2))
    monkeypatch.setattr(models.densenet, "GROWTH", 4)
    entry = models.imagenet._enlarge("vgg11", side=7, hidden=(64, 64), dropout_rate=0.5)
    monkeypatch.setitem(models.imagenet.IMAGENET_ARCHITECTURES, "vgg11d", entry)


def train_steps(network, images):
    """Train two steps; return the optimizer."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    for _ in range(2):
        network(images).square().mean().backward()
        optimizer.step()
    return optimizer


def build_ours(script, arch, layers):
    """Build our network as convert_checkpoint.py does, on images of ten classes."""
    words = [word for flag in find_flags(arch, layers).values() for word in flag]
    line = "--dataset cifar10" if script is main else "--dummy"
    flags, _ = read_settings(script.build_script(), ["--arch", arch, *words, *line.split()])
    return script.build_network(flags, DataSpec("cifar10", 3, 64, tuple("0123456789"), (), ()))


@loop_over(
    "arch, make, build, folds",
    [
        ("vgg11", BATCHNORM, SMALL_VGG, 0),
        ("vgg11", deconvolution(15, channel=partial(CHANNEL, 32)), SMALL_VGG, 0),
        ("resnet18", BATCHNORM, RESNET, 0),
        ("resnet18", deconvolution(channel=partial(CHANNEL, 24)), RESNET, 0),
        ("resnet18", deconvolution(channel=partial(CHANNEL, 8)), RESNET, 1),
        ("preact", BATCHNORM, PREACT, 0),
        ("preact", deconvolution(10, linear=DELINEAR), PREACT, 0),
        ("senet", BATCHNORM, SENET, 0),
        ("senet", deconvolution(15, linear=DELINEAR), SENET, 8),
        ("densenet121", BATCHNORM, DENSE, 0),
        ("vgg11d", deconvolution(15, linear=partial(DELINEAR, block=64)), LARGE_VGG, 2),
        ("vgg11d", deconvolution(15, channel=partial(CHANNEL, 32)), LARGE_VGG, 3),
        ("resnet18d", BATCHNORM, LARGE, 0),
        ("resnet18d", deconvolution(15, linear=DELINEAR), LARGE, 1),
        ("densenet121d", BATCHNORM, partial(DENSE, large=True), 0),
        ("densenet121d", deconvolution(15), partial(DENSE, large=True), 0),
    ],
)
def test_our_networks_predict_and_go_on_as_the_published_ones(
    arch, make, build, folds, small, capsys
):
    network, script = build(make), main_imagenet if arch.endswith("d") else main
    for norm in (m for m in network.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.normal_(norm.weight, 1, 0.3)
        nn.init.normal_(norm.bias, 0, 0.3)
    images = torch.randn(
        16, 3, 64 if script is main_imagenet else 32, 64 if script is main_imagenet else 32
    )
    optimizer = train_steps(network, images)
    layers = read_layers(network.state_dict(), optimizer.state_dict())
    ours = build_ours(script, arch, layers)
    momenta = convert_checkpoint.load_weights(arch, layers, ours)
    assert capsys.readouterr().out.count("folded into weights") == folds
    expect_equal(ours, network, images)
    if folds:
        assert momenta == {}
        return
    own = torch.optim.SGD(ours.parameters(), lr=0.01, momentum=0.9)
    own.load_state_dict({**own.state_dict(), "state": copy.deepcopy(momenta)})
    for each in (own, optimizer):  # a step along the momenta
        for parameter in each.param_groups[0]["params"]:
            parameter.grad = torch.zeros_like(parameter)
        each.param_groups[0]["lr"] = 0.1
        each.step()
    expect_equal(ours, network, images)


def test_a_network_of_torchvision_is_matched_by_name():
    torchvision = pytest.importorskip("torchvision")
    network = torchvision.models.mobilenet_v3_small(num_classes=10)
    layers = read_layers({f"module.{k}": v for k, v in network.state_dict().items()}, None)
    ours = build_ours(main_imagenet, "mobilenet_v3_small", layers)
    convert_checkpoint.load_weights("mobilenet_v3_small", layers, ours)
    expect_equal(ours, network, torch.randn(2, 3, 64, 64))


@loop_over(
    "arch, make, build, error",
    [
        ("densenet121", deconvolution(), DENSE, "dense1.0.conv1 whitens channels in another order"),
        ("vgg11", BATCHNORM, RESNET, "conv1 is not a layer of a published vgg"),
        ("preact", BATCHNORM, SENET, "layer1.0.fc1 is not a layer of a published preact"),
        (
            "resnet18",
            BATCHNORM,
            partial(Stages, (16, 32), Basic),
            "layer2.0.conv1.weight has shape",
        ),
        ("vgg11", DECONV_2019, SMALL_VGG, "use deconv.published.FastDeconv2019"),
    ],
)
def test_networks_that_ours_cannot_equal_are_refused_by_layer(arch, make, build, error, small):
    network = build(make)
    train_steps(network, torch.randn(8, 3, 32, 32))
    layers = read_layers(network.state_dict(), None)
    with pytest.raises((ValueError, RuntimeError), match=re.escape(error)):
        convert_checkpoint.load_weights(arch, layers, build_ours(main, arch, layers))


def test_channels_that_are_whitened_before_the_relu_are_refused():
    layers = {"features.norm5": {"running_mean1": torch.zeros(4, 1)}}
    with pytest.raises(ValueError, match="before the last ReLU"):
        translate("densenet121d", layers, nn.Identity())


def test_an_imagenet_checkpoint_is_tested_and_resumed_on_a_folder(small, tmp_path, capsys):
    torch.manual_seed(0)
    network, images = LARGE(deconvolution(15, linear=DELINEAR)), torch.randn(8, 3, 64, 64)
    train_steps(network, images)
    for split, name, number in product(("train", "val"), range(10), range(2)):
        file = tmp_path / "images" / split / str(name) / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(torch.randint(256, (64, 64, 3), dtype=torch.uint8).numpy()).save(file)
    state = {f"module.{name}": value for name, value in network.state_dict().items()}
    content = {"epoch": 1, "state_dict": state, "best_acc1": torch.tensor(5.0)}
    torch.save({**content, "arch": "resnet18d"}, tmp_path / "published.pth.tar")
    out, folder = str(tmp_path / "run"), str(tmp_path / "images")
    line = f"--image-size 64 -b 10 -j 0 --use-gpu False --epochs 2 {QUIET}"
    convert_checkpoint.main([str(tmp_path / "published.pth.tar"), out, folder, *line.split()])
    assert f"main_imagenet.py --resume {out} -e {folder}" in capsys.readouterr().out
    expect_equal(load_network(out).network, network, images)
    main_imagenet.main(["--resume", out, "-e", folder])
    assert re.search(r"resnet18d  test loss \S+ top1", capsys.readouterr().out)
    main_imagenet.main(["--resume", out, folder])
    assert load_network(out).saved["epoch"] == 2


def test_an_error_while_saving_leaves_no_folder(trained, tmp_path, monkeypatch, capsys):
    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(convert_checkpoint, "save_checkpoint", fail)
    source, out = save(tmp_path / "published.pth.tar", *trained), tmp_path / "run"
    with pytest.raises(SystemExit) as stop:
        convert_checkpoint.main([source, str(out), *FLAGS.split()])
    assert stop.value.code == 2 and "No space left" in capsys.readouterr().err
    assert not out.exists()


def expect_equal(ours, network, images):
    with torch.no_grad():
        scores, expected = ours.eval()(images), network.eval().double()(images.double()).float()
    network.float()
    torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


@pytest.mark.slow
def test_a_published_checkpoint_is_resumed(trained, tmp_path):
    source, out = save(tmp_path / "published.pth.tar", *trained), str(tmp_path / "run")
    flags = [*FLAGS.split(), *QUIET.split()]
    convert_checkpoint.main([source, str(tmp_path / "first"), *flags])
    steps = load_network(str(tmp_path / "first")).saved["step"] + 1
    convert_checkpoint.main([source, out, *flags, f"--max-steps={steps}"])
    main.main(["--resume", out])
    resumed = load_network(out).saved
    assert (resumed["step"], resumed["epoch"]) == (steps, 3)


class Foreign:
    pass


@loop_over(
    "changes, flags, message",
    [
        ({"optimizer": Foreign()}, "", "may run code"),
        ({"state_dict": None}, "", "no state_dict"),
        ({"state_dict": {"features.0.weight": torch.ones(1)}}, "", "too few layers for a"),
        ({"best_acc": None}, "", "best_acc or best_acc1 must be a number, got None"),
        ({"arch": "dpn"}, "", "arch dpn cannot be converted: its layers have other names"),
        ({}, "--arch vgg13", "has 9 layers with weights, the network of the flags 11"),
        ({}, "--num-groups 16", "published running_deconv needs a layer with block=64"),
        ({}, "--dataset nowhere", "--dataset"),
        ({}, "--resume elsewhere", "--resume is for main.py"),
        ({}, "-e", "--evaluate is for main.py"),
        (None, "", "refused: damaged"),
    ],
)
def test_what_cannot_be_converted_is_refused(changes, flags, message, trained, tmp_path, capsys):
    path, out = tmp_path / "published.pth.tar", tmp_path / "run"
    source = save(path, *trained, **(changes or {}))
    if changes is None:
        path.write_bytes(path.read_bytes()[:5000])
    words = FLAGS.split() if "dataset" not in flags else []
    with pytest.raises(SystemExit) as stop:
        convert_checkpoint.main([source, str(out), *words, *flags.split()])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1, error
    assert not out.exists()
