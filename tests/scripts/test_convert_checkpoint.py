"""Tests of scripts/convert_checkpoint.py: the converted checkpoint predicts as the published."""

import re

import pytest
import torch
from torch import nn

import main
from deconv import published
from scripts import convert_checkpoint
from scripts.trained_network import load_network, read_images
from tests.pairwise import loop_over

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
    images = read_images(found.flags, None, 64)
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
        ({"arch": "dpn"}, "", "arch dpn cannot be converted, only vgg and resnet"),
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
