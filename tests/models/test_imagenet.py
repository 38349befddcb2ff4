"""Networks for large images: equal to torchvision's with BatchNorm, or converted from there."""

import warnings
from functools import partial

import pytest
import torch
import torchvision
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import models.external
from deconv import Delinear, FastDeconv
from models import (
    IMAGENET_ARCHITECTURES,
    build_imagenet_model,
    count_pretrained_classes,
    make_layers,
)
from tests.pairwise import loop_over

# Ours -> torchvision's name of it with BatchNorm, and its published number of parameters.
TWINS = {
    "resnet18d": ("resnet18", 11_689_512),
    "resnet34d": ("resnet34", 21_797_672),
    "resnet50d": ("resnet50", 25_557_032),
    "resnet101d": ("resnet101", 44_549_160),
    "vgg11d": ("vgg11_bn", 132_868_840),
    "vgg16d": ("vgg16_bn", 138_365_992),
    "densenet121d": ("densenet121", 7_978_856),
}
WEIGHTED = (nn.Conv2d, nn.BatchNorm2d, nn.Linear)


def build(arch, *, deconv=False, **options):
    return build_imagenet_model(
        arch, make_layers(deconv=deconv, block_final=32 * deconv), **options
    )


def on_meta(make, *args, **options):
    with torch.device("meta"):
        return make(*args, **options)


def find(model, kinds):
    return [module for module in model.modules() if isinstance(module, kinds)]


def count(tensors):
    return sum(tensor.numel() for tensor in tensors)


def conv_biases(model):
    return [conv.bias for conv in find(model, nn.Conv2d) if conv.bias is not None]


def test_parameter_counts_are_torchvisions():
    for arch, (name, published) in TWINS.items():
        theirs = on_meta(torchvision.models.get_model, name)
        plain = published - count(conv_biases(theirs))
        assert count(on_meta(build, arch).parameters()) == plain, arch
        # deconvolution: no scale and shift per normalised channel, but a bias per convolution
        norms = count(p for norm in find(theirs, nn.BatchNorm2d) for p in norm.parameters())
        outs = sum(conv.out_channels for conv in find(theirs, nn.Conv2d))
        own = count(on_meta(build, arch, deconv=True).parameters())
        assert own == plain - norms + outs, arch


@torch.no_grad()
def share_weights(theirs, ours):
    """Random parameters and statistics in both, layer by layer in order."""
    shift = 0
    for source, target in zip(find(theirs, WEIGHTED), find(ours, WEIGHTED), strict=True):
        if isinstance(source, nn.BatchNorm2d):
            values = [
                torch.rand(v.shape).add(0.5).to(v.dtype) for v in source.state_dict().values()
            ]
        else:
            bound = (3 / source.weight[0].numel()) ** 0.5
            weight = torch.empty(source.weight.shape).uniform_(-bound, bound)
            values = [weight] if source.bias is None else [weight, torch.rand(len(weight)) - 0.5]
        state = dict(zip(source.state_dict(), values, strict=True))
        source.load_state_dict(state, assign=True)
        if isinstance(source, nn.BatchNorm2d):  # takes back the bias of the convolution before it
            state = {**state, "running_mean": state["running_mean"] - shift}
        shift = 0
        if isinstance(source, nn.Conv2d) and source.bias is not None:
            shift = state.pop("bias")
        target.load_state_dict(state, assign=True)


@pytest.mark.parametrize("arch", [arch for arch in TWINS if arch != "vgg16d"])
def test_with_batchnorm_they_are_torchvisions_networks(arch):
    theirs = on_meta(torchvision.models.get_model, TWINS[arch][0]).eval()
    ours = on_meta(build, arch).eval()
    share_weights(theirs, ours)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = theirs(images)
        torch.testing.assert_close(ours(images), expected, rtol=1e-4, atol=1e-4 * expected.std())
    assert [m.p for m in find(ours, nn.Dropout)] == [m.p for m in find(theirs, nn.Dropout)]


def test_with_deconvolution_no_batchnorm_is_left():
    for arch in TWINS:
        model = on_meta(build, arch, deconv=True)
        assert not find(model, nn.modules.batchnorm._BatchNorm), arch
        assert all(isinstance(conv, FastDeconv) for conv in find(model, nn.Conv2d)), arch
        *hidden, last = find(model, nn.Linear)
        assert (type(last), last.block) == (Delinear, 32), arch
        kinds = [type(linear) for linear in hidden]
        assert kinds == [nn.Linear] * (2 * arch.startswith("vgg")), arch


def test_deconvolution_takes_large_images():
    with FakeTensorMode():  # shapes only
        for arch in ("resnet34d", "resnet101d", "vgg11d", "vgg16d"):
            model = build(arch, deconv=True)
            assert model(torch.randn(2, 3, 224, 224)).shape == (2, 1000), arch


@pytest.mark.parametrize("arch", ["resnet18d", "resnet50d", "densenet121d"])
def test_deconvolution_trains_every_parameter(arch):
    model = build(arch, deconv=True, num_classes=7)
    F.cross_entropy(model(torch.randn(2, 3, 64, 64)), torch.tensor([0, 6])).backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.any() for p in model.parameters())
    assert model.eval()(torch.randn(1, 3, 33, 47)).shape == (1, 7)


def test_torchvisions_networks_keep_torchvisions_initialisation():
    torch.manual_seed(5)
    ours = build("resnet18", num_classes=7)
    torch.manual_seed(5)
    theirs = torchvision.models.resnet18(num_classes=7)
    assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))


def test_every_classification_network_of_torchvision_is_there():
    others = {*torchvision.models.list_models()} - {*IMAGENET_ARCHITECTURES}
    assert {"resnet18", "vit_b_16", "vgg11_bn", "inception_v3"} <= {*IMAGENET_ARCHITECTURES}
    assert others == {
        name
        for kind in ("detection", "optical_flow", "quantization", "segmentation", "video")
        for name in torchvision.models.list_models(getattr(torchvision.models, kind))
    }


@pytest.mark.parametrize(
    ("arch", "size"),
    [
        ("googlenet", 224),
        ("maxvit_t", 224),
        ("vgg11_bn", 64),
        ("vit_b_16", 64),
        ("alexnet", 63),
        ("inception_v3", 75),
        ("squeezenet1_0", 32),
    ],
)
def test_torchvisions_networks_train_with_one_output_and_no_warning(arch, size):
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("error")
        model = build(arch, num_classes=7, image_size=size)
        assert model(torch.randn(2, 3, size, size)).shape == (2, 7)


@pytest.mark.parametrize("arch", ["alexnet", "googlenet", "inception_v3"])
def test_pretrained_weights_are_kept(arch, monkeypatch):
    options = {} if arch == "alexnet" else {"init_weights": False}
    state = torchvision.models.get_model(arch, **options).state_dict()
    weights = type(torchvision.models.get_model_weights(arch).DEFAULT)
    monkeypatch.setattr(weights, "get_state_dict", lambda *_, **__: state)
    model = build(arch, pretrained=True)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    with torch.no_grad():
        assert model.train()(torch.randn(2, 3, 96, 96)).shape == (2, 1000)


@loop_over(
    ("arch", "head", "deconv"),
    [
        ("squeezenet1_0", "classifier.1", False),
        ("googlenet", "fc", False),
        ("resnet18", "fc", True),
    ],
)
def test_pretrained_weights_serve_any_number_of_classes(arch, head, deconv):
    with pytest.MonkeyPatch.context() as patch:
        options = {"init_weights": False} if arch == "googlenet" else {}
        state = torchvision.models.get_model(arch, **options).state_dict()
        weights = type(torchvision.models.get_model_weights(arch).DEFAULT)
        patch.setattr(weights, "get_state_dict", lambda *_, **__: state)
        model = build(arch, deconv=deconv, pretrained=True, num_classes=7)
    rebuilt = build(arch, deconv=deconv, pretrained=True, download=False, num_classes=7)
    named = dict(model.named_parameters())
    assert named[f"{head}.weight"].shape[0] == 7 and named[f"{head}.weight"].std() > 0
    others = {name for name in named if not name.startswith(head)}
    assert deconv or all(torch.equal(named[name], state[name]) for name in others)
    rebuilt.load_state_dict(model.state_dict())  # as a resumed run does
    images = torch.randn(2, 3, 96, 96)
    torch.testing.assert_close(rebuilt.eval()(images), model.eval()(images))


def test_pretrained_weights_of_timm_serve_any_number_of_classes(monkeypatch):
    timm = pytest.importorskip("timm")
    theirs = timm.create_model("resnet18")
    overlay = {"state_dict": theirs.state_dict()}
    create = partial(timm.create_model, pretrained_cfg_overlay=overlay)
    monkeypatch.setattr(timm, "create_model", create)
    ours = build("timm/resnet18", pretrained=True, num_classes=7).state_dict()
    assert torch.equal(ours["layer1.0.conv1.weight"], theirs.state_dict()["layer1.0.conv1.weight"])
    assert ours["fc.weight"].shape == (7, 512)
    assert count_pretrained_classes("timm/resnet18") == 1000


def test_dropout_rate_reaches_both_dropouts():
    model = on_meta(build, "vgg11d", dropout_rate=0.25)
    assert [dropout.p for dropout in find(model, nn.Dropout)] == [0.25, 0.25]


@loop_over(
    ("arch", "options", "message"),
    [
        ("resnet18b", {}, "arch must be one of resnet18, .* more; got 'resnet18b'"),
        ("resnet18d", {"pretrained": True}, "pretrained=True .*not apply to resnet18d.* resnet18,"),
        ("resnet18d", {"dropout_rate": 0.0}, "dropout_rate=0.0 .*only to vgg11d, vgg16d"),
        ("resnet50d", {"image_size": 31}, "image_size must be at least 32 for resnet50d, got 31"),
        ("inception_v3", {"image_size": 74}, "image_size must be at least 75 .*got 74"),
        ("vit_b_16", {"image_size": 100}, "vit_b_16 cannot take image_size=100: .*patch size"),
        ("maxvit_t", {"image_size": 100}, "maxvit_t cannot take image_size=100: .*partition"),
        ("vit_h_14", {"pretrained": True}, "vit_h_14 cannot take image_size=224: .*518"),
    ],
)
def test_refusals_name_the_argument_and_a_way_out(arch, options, message):
    with pytest.raises(ValueError, match=message):
        build(arch, **options)


@loop_over(
    ("arch", "options"),
    [("vit_b_16", {"batchnorm": False}), ("timm/resnet18", {"block_final": 32})],
)
def test_external_networks_refuse_mixed_layers(arch, options):
    with pytest.raises(ValueError, match=f"{arch} has layers of its own"):
        build_imagenet_model(arch, make_layers(deconv=False, **options))


@loop_over("arch", ["resnet18", "googlenet", "vgg11_bn"])
def test_external_networks_are_converted(arch):
    model = on_meta(build, arch, deconv=True, num_classes=7)
    assert not find(model, nn.modules.batchnorm._BatchNorm)
    assert all(isinstance(conv, FastDeconv) for conv in find(model, nn.Conv2d))
    last = find(model, nn.Linear)[-1]
    assert (type(last), last.block, last.out_features) == (Delinear, 32, 7)


def test_converted_networks_have_the_layers_of_ours():
    for arch, (name, _) in TWINS.items():
        models = [on_meta(build, each, deconv=True) for each in (arch, name)]
        ours, theirs = (sorted(tuple(p.shape) for p in m.parameters()) for m in models)
        assert ours == theirs, arch
        ours, theirs = (sorted(map(repr, find(m, (FastDeconv, Delinear)))) for m in models)
        assert ours == theirs, arch


def test_pretrained_weights_are_folded_in(monkeypatch):
    theirs = torchvision.models.resnet18().eval()
    for norm in find(theirs, nn.BatchNorm2d):
        norm.running_mean.normal_()
    weights = torchvision.models.ResNet18_Weights
    monkeypatch.setattr(weights, "get_state_dict", lambda *_, **__: theirs.state_dict())
    model, images = (
        build("resnet18", deconv=True, pretrained=True).eval(),
        torch.randn(2, 3, 64, 64),
    )
    with torch.no_grad():
        expected = theirs(images)
        torch.testing.assert_close(
            model(images), expected, rtol=0, atol=1e-4 * expected.abs().max()
        )


def test_a_checkpoint_of_a_pretrained_network_fits_the_network_that_is_built_without_download():
    def names(**options):
        with torch.device("meta"):
            return build("densenet121", deconv=True, **options).state_dict().keys()

    untrained, rebuilt = names(), names(pretrained=True, download=False)
    assert {"features.norm0.scale", "features.denseblock1.denselayer1.norm1.scale"} & rebuilt
    assert rebuilt - untrained, "the case has an affine map per channel"


@pytest.mark.parametrize("deconv", [False, True])
def test_timms_networks_are_known_by_name(deconv):
    pytest.importorskip("timm")
    assert "timm/resnet18" in IMAGENET_ARCHITECTURES
    with torch.device("meta"):
        model = build("timm/resnet18", deconv=deconv, num_classes=7, image_size=64)
        sized = build("timm/vit_tiny_patch16_224", deconv=deconv, num_classes=7, image_size=64)
        assert sized(torch.randn(2, 3, 64, 64)).shape == (2, 7)
    assert bool(find(model, FastDeconv)) == deconv != bool(find(model, nn.BatchNorm2d))
    with pytest.raises(ValueError, match="timm has no 'resnet17'; the closest names are resnet"):
        build("timm/resnet17", deconv=deconv)


def test_what_timm_refuses_is_one_line(monkeypatch):
    timm = pytest.importorskip("timm")

    def refuse(*args, **options):
        raise RuntimeError("no weights for it\nand more")

    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(ValueError, match="^timm cannot build resnet18: no weights for it$"):
        build("timm/resnet18")


def test_timm_is_asked_for_where_it_is_not_installed(monkeypatch):
    monkeypatch.setattr(models.external, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="timm/resnet18 needs timm.*pip install timm"):
        build("timm/resnet18")
