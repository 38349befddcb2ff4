"""Networks of torchvision and timm through convert, a training step, recalibrate and fuse.

Converted networks keep shapes, train and fuse; pretrained ones keep their outputs. The suite takes
one network of each family. Slow tests take every classification network of torchvision, and 20
networks of all kinds that a new seed draws each time. FOREIGN_SEED=N repeats a draw.
"""

import copy
import os
from pathlib import Path
from random import Random
from time import time_ns

import pytest
import torch
from torch import nn
from torchvision.models import detection, get_model, list_models, segmentation, video

from deconv import FastDeconv, convert, fuse, plan, recalibrate
from models import IMAGENET_ARCHITECTURES, build_imagenet_model, make_layers
from tests.deconv.surgery.helpers import randomize

FAMILIES = ["mobilenet_v3_small", "resnet18", "shufflenet_v2_x0_5"]  # slow tests have all
OTHER_SIZES = {"maxvit_t": 224, "vit_h_14": 42}  # of patches of 14
# Of two images with a pixel or four each in the last stages, which the smallest are, covariances
# are of rank one, and gradients of the deepest networks overflow float32.
OTHER_SIZES |= {"resnet152": 64, "wide_resnet101_2": 64}
THEIRS = [name for name, a in IMAGENET_ARCHITECTURES.items() if "pretrained" in a.options]
DRAWN = {"classification": 6, "segmentation": 2, "detection": 3, "video": 3, "timm": 6}
LARGE = 60e6  # parameters of networks that the draw passes over


def build(name):
    size = OTHER_SIZES.get(name, IMAGENET_ARCHITECTURES[name].min_image_size)
    layers = make_layers(deconv=False)
    model = build_imagenet_model(name, layers, num_classes=7, image_size=size)
    return model, torch.randn(2, 3, size, size)


def skip_where_memory_is_short(model):
    """Skip a network whose copies in float64 or whose gradients would not fit into memory.

    Other processes hold memory, too: the kernel tells how much is left.
    """
    needed = 30 * sum(p.numel() for p in model.parameters())
    facts = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    if needed > 1024 * int(facts["MemAvailable"].split()[0]):
        pytest.skip(f"needs {needed / 1e9:.0f} GB of memory")


def start_heads(model):
    """Start anew what is zero, such as heads of ViT, which leave nothing to compare."""
    for p in model.parameters():
        if p.dim() > 1 and not p.any():
            nn.init.normal_(p, std=0.1)


def call(model, x):
    return model(x)


class Forward(nn.Module):
    """A model with another forward, for `recalibrate`."""

    def __init__(self, model, forward):
        super().__init__()
        self.model, self.function = model, forward

    def forward(self, x):
        return self.function(self.model, x)


def assert_converts(model, x, forward=call, dtype=torch.float32, whole=True):
    """Take a model through all of surgery.

    Args:
        model: of any library.
        x: a batch, at least two images.
        forward: (model, x) -> a tensor, compared in evaluation and minimised in training.
        dtype: of the training step.
        whole: no BatchNorm may stay. Otherwise those stay that `plan` lists with a reason.
    """
    skip_where_memory_is_short(model)
    start_heads(randomize(model).eval())
    with torch.no_grad():
        wide = copy.deepcopy(model).double()
        exact = forward(wide, x.double())
        wide = convert(wide, pretrained=True)
        assert_no_batchnorm(wide, model, whole, pretrained=True)
        assert_near(forward(wide, x.double()), exact, 1e-9)
        del wide
        expected = forward(model, x)
        # Random statistics make some deep networks chaotic: no worse than the network itself is.
        own = 3 * (expected - exact).abs().max().item() / exact.abs().max().item()
        assert_near(forward(convert(model, pretrained=True), x).double(), exact, max(1e-4, own))
    new, x = convert(model.to(dtype)).train(), x.to(dtype)
    assert_no_batchnorm(new, model, whole)
    output = forward(new, x)
    assert output.shape == expected.shape
    output.square().mean().backward()
    gradients = [p.grad for p in new.parameters() if p.grad is not None]
    assert len(gradients) > 0.9 * len(list(new.parameters())) or not whole
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    nn.utils.clip_grad_norm_(new.parameters(), 1)  # of two small images they are large
    torch.optim.SGD(new.parameters(), lr=1e-3).step()
    with torch.no_grad():
        once, twice = forward(new.eval(), x), forward(new, x)
        assert torch.isfinite(once).all() and torch.equal(once, twice)
        new, x = new.double(), x.double()
        assert recalibrate(Forward(new, forward), [x]) == 1
        assert_near(forward(fuse(new), x), forward(new, x), 1e-8)


def assert_near(given, expected, tolerance):
    atol = tolerance * expected.abs().max().item()
    torch.testing.assert_close(given, expected, rtol=0, atol=atol)


def assert_no_batchnorm(converted, model, whole=True, **options):
    left = {name for name, m in converted.named_modules() if "BatchNorm" in type(m).__name__}
    kinds = {type(module).__name__ for module in converted.modules()}
    assert any("FastDeconv" in kind for kind in kinds)
    if whole:
        assert not left and "Conv2d" not in kinds
    elif left:
        stay = {row.name: row.reason for row in plan(model, **options) if row.action != "replaced"}
        assert left <= stay.keys() and all(stay[name] for name in left)


@pytest.mark.parametrize("name", FAMILIES)
def test_torchvision_families(name):
    assert_converts(*build(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in THEIRS if name not in FAMILIES])
def test_every_classification_network_of_torchvision(name):
    assert_converts(*build(name))


def segment(model, x):
    return sum(model(x).values())


def build_segmentation(name):
    options = {} if "lraspp" in name else dict(aux_loss=True)
    model = get_model(name, weights_backbone=None, num_classes=3, **options)
    return model, torch.randn(2, 3, 32, 32)


@pytest.mark.parametrize(
    "name",
    [
        "lraspp_mobilenet_v3_large",
        pytest.param("fcn_resnet50", marks=pytest.mark.slow),
        pytest.param("deeplabv3_resnet50", marks=pytest.mark.slow),
    ],
)
def test_segmentation(name):
    assert_converts(*build_segmentation(name), segment)


def detect(model, x):
    """Return what the heads say of fixed regions, which boxes that hardly differ would change."""
    features = list(model.backbone(x).values())
    if hasattr(model, "head"):  # a dict of tensors
        return torch.cat([part.flatten() for part in model.head(features).values()])
    objectness, deltas = model.rpn.head(features)
    regions = [torch.tensor([[0.0, 0, 31, 31], [8, 8, 40, 40]]).to(x) for _ in x]
    sizes = [tuple(x.shape[2:])] * len(x)
    pooled = model.roi_heads.box_roi_pool(model.backbone(x), regions, sizes)
    classes, boxes = model.roi_heads.box_predictor(model.roi_heads.box_head(pooled))
    parts = [*objectness, *deltas, classes, boxes]
    return torch.cat([part.flatten() for part in parts])


def build_detection(name):
    side = {"ssd300_vgg16": 300, "ssdlite320_mobilenet_v3_large": 320}.get(name, 64)
    sides = dict(min_size=64, max_size=64) if side == 64 else {}
    model = get_model(name, weights_backbone=None, num_classes=3, **sides)
    return model, torch.randn(2, 3, side, side)


@pytest.mark.parametrize(
    "name",
    [
        "fasterrcnn_mobilenet_v3_large_320_fpn",  # its backbone's BatchNorm is frozen with weights
        pytest.param("fasterrcnn_resnet50_fpn", marks=pytest.mark.slow),
        pytest.param("fasterrcnn_resnet50_fpn_v2", marks=pytest.mark.slow),
    ],
)
def test_detection(name):
    model, x = build_detection(name)
    assert_converts(model, x, detect)
    new = convert(model).train()
    boxes, labels = torch.tensor([[4.0, 4, 40, 40]]), torch.tensor([1])
    losses = new(list(torch.rand(2, 3, 64, 64)), [{"boxes": boxes, "labels": labels}] * 2)
    sum(losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in new.parameters() if p.grad is not None)
    assert {*new.eval()([torch.rand(3, 64, 64)])[0]} == {"boxes", "labels", "scores"}


def build_timm(name):
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, num_classes=7)
    config = model.default_cfg
    side = config["input_size"][-1] if config.get("fixed_input_size") else 64
    return model, torch.randn(2, 3, side, side)


@pytest.mark.parametrize(
    "name",
    [
        "test_efficientnet",
        "resnetv2_18",
        pytest.param("resnet50d", marks=pytest.mark.slow),
        pytest.param("resnetv2_50", marks=pytest.mark.slow),
    ],
)
def test_timm_families(name):
    """BatchNormAct2d, and it before the convolution, and activations that work in place."""
    assert_converts(*build_timm(name))


def build_drawn(kind, name):
    """Return a network of the draw, a batch, and its forward."""
    if kind == "timm":
        return *build_timm(name), call
    if kind == "detection":
        return *build_detection(name), detect
    if kind == "classification":
        return *build(name), call
    if kind == "video":
        size = (16, 224, 224) if name == "s3d" else (4, 32, 32)
        return get_model(name, num_classes=7), torch.randn(2, 3, *size), call
    return *build_segmentation(name), segment


def draw_names(kind, seed):
    """Yield names of networks of moderate size with a BatchNorm after convolutions."""
    timm = pytest.importorskip("timm") if kind == "timm" else None
    modules = {"segmentation": segmentation, "detection": detection, "video": video}
    names = timm.list_models() if timm else list_models(modules.get(kind))
    names = THEIRS if kind == "classification" else names
    Random(seed).shuffle(names := sorted(names))
    for name in names:
        make = timm.create_model if timm else get_model
        weights = dict(weights_backbone=None) if kind in ("segmentation", "detection") else {}
        try:
            with torch.device("meta"):
                model = make(name, **weights)
        except NotImplementedError:  # the constructor of a RegNet computes with tensors
            model = make(name, **weights)
        found = any("BatchNorm" in type(module).__name__ for module in model.modules())
        if found and sum(p.numel() for p in model.parameters()) < LARGE:
            yield name


@pytest.mark.slow
@pytest.mark.parametrize("kind", DRAWN)
def test_networks_drawn_anew(kind):
    seed = int(os.environ.get("FOREIGN_SEED", time_ns() % 10**9))
    print(f"FOREIGN_SEED={seed}")
    failures = []
    for name, _ in zip(draw_names(kind, seed), range(DRAWN[kind]), strict=False):
        print(name, flush=True)
        try:
            model, x, forward = build_drawn(kind, name)
            assert_converts(model, x, forward, torch.float64, whole=False)
        except Exception as error:
            failures.append(f"{name}: {type(error).__name__}: {error}")
    assert not failures, f"FOREIGN_SEED={seed}\n" + "\n".join(failures)


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
    new = convert(model)
    weights = {name for name, _ in model.named_parameters() if "bn" not in name}
    weights = {name for name in weights if "downsample.1" not in name}
    theirs = dict(model.named_parameters())
    ours = dict(new.named_parameters())
    assert all(torch.equal(ours[name], theirs[name]) for name in weights)
    assert set(ours) - weights == {
        f"{n}.bias" for n, m in new.named_modules() if isinstance(m, FastDeconv)
    }
