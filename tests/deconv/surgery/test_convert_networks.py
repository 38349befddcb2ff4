"""deconv.convert on networks of others: same shapes, no BatchNorm left, they train, pretrained ones
give what they gave."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models import detection, segmentation

from deconv import FastDeconv, convert, plan
from models import IMAGENET_ARCHITECTURES, build_imagenet_model, make_layers
from tests.deconv.surgery.helpers import randomize

# Of different families; the slow test has all.
FAMILIES = [
    "densenet121",
    "googlenet",
    "mobilenet_v3_small",
    "regnet_y_400mf",
    "resnet18",
    "shufflenet_v2_x0_5",
    "squeezenet1_0",
]
OTHER_SIZES = {"maxvit_t": 224, "vit_h_14": 42}  # of patches of 14
# Of two images with a pixel or four each in the last stages, which the smallest are, covariances
# are of rank one, and gradients of the deepest networks overflow float32.
OTHER_SIZES |= {"resnet152": 64, "wide_resnet101_2": 64}
THEIRS = [name for name, a in IMAGENET_ARCHITECTURES.items() if "pretrained" in a.options]
TIMM = [
    "convmixer_768_32",
    "cspresnet50",
    "darknet53",
    "dla34",
    "densenet121",
    "dpn68",
    "efficientnet_b0",
    "ese_vovnet19b_dw",
    "fastvit_t8",
    "ghostnet_100",
    "hrnet_w18_small",
    "mixnet_s",
    "mobilenetv3_small_050",
    "regnety_002",
    "repvgg_a0",
    "res2net50_14w_8s",
    "resnet50d",
    "resnetv2_50",
    "skresnet18",
    "xception41",
]


def build(name):
    size = OTHER_SIZES.get(name, IMAGENET_ARCHITECTURES[name].min_image_size)
    layers = make_layers(deconv=False)
    model = build_imagenet_model(name, layers, num_classes=7, image_size=size)
    return model, torch.randn(2, 3, size, size)


def skip_where_memory_is_short(model):
    """Of the largest networks, the copies in float64 or the gradients would not fit beside it.

    What other work has of the memory cannot be had, so the kernel is asked how much is left.
    """
    needed = 30 * sum(p.numel() for p in model.parameters())
    facts = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    if needed > 1024 * int(facts["MemAvailable"].split()[0]):
        pytest.skip(f"needs {needed / 1e9:.0f} GB of memory")


def start_heads(model):
    """Those that start at zero (of ViT) give nothing to compare."""
    for p in model.parameters():
        if p.dim() > 1 and not p.any():
            nn.init.normal_(p, std=0.1)


def assert_converts(model, x, forward=lambda model, x: model(x)):
    """forward(model, x) -> an output to compare in evaluation, and to minimise in training."""
    skip_where_memory_is_short(model)
    start_heads(randomize(model).eval())
    with torch.no_grad():
        wide = copy.deepcopy(model).double()
        exact = forward(wide, x.double())
        wide = convert(wide, pretrained=True)
        assert_no_batchnorm(wide)
        assert_near(forward(wide, x.double()), exact, 1e-9)
        del wide
        expected = forward(model, x)
        # Random statistics make some deep networks chaotic: no worse than the network itself is.
        own = 3 * (expected - exact).abs().max().item() / exact.abs().max().item()
        assert_near(forward(convert(model, pretrained=True), x).double(), exact, max(1e-4, own))
    new = convert(model).train()
    assert_no_batchnorm(new)
    output = forward(new, x)
    assert output.shape == expected.shape
    output.square().mean().backward()
    gradients = [p.grad for p in new.parameters() if p.grad is not None]
    assert len(gradients) > 0.9 * len(list(new.parameters()))
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    nn.utils.clip_grad_norm_(new.parameters(), 1)  # of two small images they are large
    torch.optim.SGD(new.parameters(), lr=1e-3).step()
    with torch.no_grad():
        once, twice = forward(new.eval(), x), forward(new, x)
    assert torch.isfinite(once).all() and torch.equal(once, twice)


def assert_near(given, expected, tolerance):
    atol = tolerance * expected.abs().max().item()
    torch.testing.assert_close(given, expected, rtol=0, atol=atol)


def assert_no_batchnorm(model):
    kinds = [type(module).__name__ for module in model.modules()]
    assert not [kind for kind in kinds if "BatchNorm" in kind]
    assert "Conv2d" not in kinds and "FastDeconv" in kinds


@pytest.mark.parametrize("name", FAMILIES)
def test_torchvision_families(name):
    assert_converts(*build(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in THEIRS if name not in FAMILIES])
def test_every_classification_network_of_torchvision(name):
    assert_converts(*build(name))


@pytest.mark.parametrize("make", [segmentation.fcn_resnet50, segmentation.deeplabv3_resnet50])
def test_segmentation(make):
    model = make(weights=None, weights_backbone=None, num_classes=3, aux_loss=True)
    x = torch.randn(2, 3, 32, 32)
    assert_converts(model, x, lambda model, x: sum(model(x).values()))


def detect(model, x):
    """What the heads say of fixed regions, which boxes that hardly differ would change."""
    features = list(model.backbone(x).values())
    objectness, deltas = model.rpn.head(features)
    regions = [torch.tensor([[0.0, 0, 31, 31], [8, 8, 40, 40]]).to(x) for _ in x]
    sizes = [tuple(x.shape[2:])] * len(x)
    pooled = model.roi_heads.box_roi_pool(model.backbone(x), regions, sizes)
    classes, boxes = model.roi_heads.box_predictor(model.roi_heads.box_head(pooled))
    parts = [*objectness, *deltas, classes, boxes]
    return torch.cat([part.flatten() for part in parts])


@pytest.mark.parametrize(
    "make",
    [
        detection.fasterrcnn_resnet50_fpn,  # its backbone's BatchNorm is frozen with weights
        pytest.param(detection.fasterrcnn_resnet50_fpn_v2, marks=pytest.mark.slow),
        pytest.param(detection.fasterrcnn_mobilenet_v3_large_320_fpn, marks=pytest.mark.slow),
    ],
)
def test_detection(make):
    model = make(weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=64)
    assert_converts(model, torch.randn(2, 3, 64, 64), detect)
    new = convert(model).train()
    boxes, labels = torch.tensor([[4.0, 4, 40, 40]]), torch.tensor([1])
    losses = new(list(torch.rand(2, 3, 64, 64)), [{"boxes": boxes, "labels": labels}] * 2)
    sum(losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in new.parameters() if p.grad is not None)
    assert {*new.eval()([torch.rand(3, 64, 64)])[0]} == {"boxes", "labels", "scores"}


def build_timm(name):
    timm = pytest.importorskip("timm")
    return timm.create_model(name, num_classes=7), torch.randn(2, 3, 64, 64)


@pytest.mark.parametrize("name", ["resnet50d", "resnetv2_50"])
def test_timm_families(name):
    """BatchNormAct2d, and it before the convolution, and activations that work in place."""
    assert_converts(*build_timm(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM)
def test_timm_networks(name):
    assert_converts(*build_timm(name))


def test_activations_of_timm_are_kept():
    model, _ = build_timm("resnetv2_50")
    norms = [row for row in plan(model) if "BatchNormAct" in type(row.module).__name__]
    activations = {row.becomes for row in norms if "ReLU" in repr(row.module.act)}
    assert len(norms) == 49 and activations == {"ReLU"}
    new = convert(model)
    assert sum(isinstance(module, nn.ReLU) for module in new.modules()) == 49
    assert not any(m.inplace for m in new.modules() if isinstance(m, nn.ReLU))


def test_what_is_learned_is_where_it_was():
    model, _ = build("resnet18")
    new = convert(model, linear=True)
    weights = {name for name, _ in model.named_parameters() if "bn" not in name}
    weights = {name for name in weights if "downsample.1" not in name}
    theirs = dict(model.named_parameters())
    ours = dict(new.named_parameters())
    assert all(torch.equal(ours[name], theirs[name]) for name in weights)
    assert set(ours) - weights == {
        f"{n}.bias" for n, m in new.named_modules() if isinstance(m, FastDeconv)
    }
