"""Networks for small images: shapes, numbers of parameters, options, and training."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from deconv import Delinear, FastDeconv
from models import ARCHITECTURES, build_model, init_from_images, make_layers
from tests.pairwise import loop_over, pairwise

SMALL = ("simple_v1", "mlp")  # made for one image size, kept small here
SIZES = {arch: 8 if arch in SMALL else 32 for arch in ARCHITECTURES}
BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d)

# Learned numbers for 3 channels and 10 classes, BatchNorm and deconvolution. The networks with an
# independent formula below are checked against it too. simple_v1 is 3072 * 10 + 10; simple_v2 has
# 864 + 18432 + 73728 weights and a last layer of 1290, plus 2 * 224 for BatchNorm or 224 biases;
# mlp is 3072 * 128 + 128, 128 * 128 + 128 and 1290, plus 2 * 256 for BatchNorm; lenet is 456, 2416,
# 48120, 10164 and 850, less 22 biases plus 44 for BatchNorm. Beside a convolution stand two numbers
# a channel with BatchNorm and a bias with deconvolution; preact has fewer norms than convolutions.
# airbench has 312 + 1,967,616 + 2560 besides, its last layer without a bias.
PARAMETERS = {
    "vgg11": (9_228_362, 9_225_610),
    "vgg13": (9_413_066, 9_410_122),
    "vgg16": (14_724_042, 14_719_818),
    "vgg19": (20_035_018, 20_029_514),
    "resnet": (11_173_962, 11_169_162),
    "resnet18": (11_173_962, 11_169_162),
    "resnet34": (21_282_122, 21_273_610),
    "resnet50": (23_520_842, 23_494_282),
    "densenet121": (6_956_298, 6_883_018),
    "preact": (11_171_146, 11_169_162),
    "senet": (11_260_354, 11_258_242),
    "resnext": (4_774_218, 4_761_610),
    "mobilev2": (2_296_922, 2_279_378),
    "efficient": (2_912_089, 2_892_193),
    "dpn": (34_236_634, 34_179_970),
    "pnasnetA": (130_646, 128_226),
    "pnasnetB": (451_626, 445_258),
    "airbench": (1_972_792, 1_971_640),
    "lenet": (62_028, 62_006),
    "simple_v1": (30_730, 30_730),
    "simple_v2": (94_762, 94_538),
    "mlp": (411_658, 411_146),
}


def build(arch, *, deconv, **options):
    return build_model(arch, make_layers(deconv=deconv, block=8), **options)


def count_parameters(model):
    return sum(p.numel() for p in model.parameters())


def has(model, kinds):
    return any(isinstance(module, kinds) for module in model.modules())


@pytest.mark.parametrize("arch", [arch for arch in ARCHITECTURES if arch != "resnet"])
def test_trains_and_evaluates_as_its_own_kind(arch):
    size = SIZES[arch]
    for deconv in (False, True):
        model = build(arch, deconv=deconv, in_channels=1, num_classes=7, image_size=size)
        assert not has(model, BATCHNORMS if deconv else (FastDeconv, Delinear))
        assert has(model, FastDeconv if deconv else (*BATCHNORMS, nn.Conv2d))
        images = torch.randn(2, 1, size, size)
        F.cross_entropy(model(images), torch.tensor([0, 6])).backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)
        with torch.no_grad():
            scores = model.eval()(images)
            assert scores.shape == (2, 7)
            assert torch.equal(model(images), scores)


@pytest.mark.parametrize("deconv", [False, True])
def test_parameter_counts_and_three_channels(deconv):
    with torch.device("meta"), torch.no_grad():  # shapes without numbers
        for arch, counts in PARAMETERS.items():
            model = build(arch, deconv=deconv)
            assert count_parameters(model) == counts[deconv], arch
            assert model.eval()(torch.empty(1, 3, 32, 32)).shape == (1, 10), arch


def vgg_convs(*depths):
    channels = 3
    for width, depth in zip((64, 128, 256, 512, 512), depths, strict=True):
        for _ in range(depth):
            yield 9, channels, width
            channels = width


def resnet_convs(kernels, expansion, *depths):
    """kernels: taps and width factors of a block's convolutions."""
    yield 9, 3, 64
    channels = 64
    for width, depth in zip((64, 128, 256, 512), depths, strict=True):
        for _ in range(depth):
            inner, out = channels, width * expansion
            for taps, factor in kernels:
                yield taps, inner, width * factor
                inner = width * factor
            if channels != out:
                yield 1, channels, out
            channels = out


CONVS = {
    "vgg11": list(vgg_convs(1, 1, 2, 2, 2)),
    "vgg13": list(vgg_convs(2, 2, 2, 2, 2)),
    "vgg16": list(vgg_convs(2, 2, 3, 3, 3)),
    "vgg19": list(vgg_convs(2, 2, 4, 4, 4)),
    "resnet18": list(resnet_convs([(9, 1), (9, 1)], 1, 2, 2, 2, 2)),
    "resnet34": list(resnet_convs([(9, 1), (9, 1)], 1, 3, 4, 6, 3)),
    "resnet50": list(resnet_convs([(1, 1), (9, 1), (1, 4)], 4, 3, 4, 6, 3)),
}


def test_parameter_counts_follow_from_the_shapes():
    for arch, convs in CONVS.items():
        weights = sum(taps * channels * out for taps, channels, out in convs)
        outs = sum(out for _, _, out in convs)
        final = (2048 if arch == "resnet50" else 512) * 10 + 10
        # BatchNorm: two numbers per channel; deconvolution: a bias
        assert PARAMETERS[arch] == (weights + 2 * outs + final, weights + outs + final), arch


def test_densenet_parameter_counts_follow_from_the_shapes():
    channels, weights, norms, biases = 64, 9 * 3 * 64, 0, 64
    for depth in (6, 12, 24, 16):
        for _ in range(depth):
            weights += channels * 128 + 9 * 128 * 32
            norms, biases = norms + channels + 128, biases + 128 + 32
            channels += 32
        norms += channels  # of the transition, or the last one
        if depth != 16:
            weights += channels * (channels // 2)
            channels //= 2
            biases += channels
    final = 1024 * 10 + 10
    assert PARAMETERS["densenet121"] == (weights + 2 * norms + final, weights + biases + final)


# Table 1 of the paper counts its deconvolution networks, in millions. Its EfficientNet has
# deconvolution in the first layer only, in the published code, so that its count is BatchNorm's.
PUBLISHED = {
    "vgg16": 14.71,
    "resnet18": 11.17,
    "preact": 11.17,
    "densenet121": 6.88,
    "resnext": 4.76,
    "mobilev2": 2.28,
    "dpn": 34.18,
    "pnasnetA": 0.13,
    "senet": 11.26,
    "efficient": 2.91,
}


def test_parameter_counts_are_the_published_ones():
    counts = {arch: PARAMETERS[arch][arch != "efficient"] / 1e6 for arch in PUBLISHED}
    assert counts == pytest.approx(PUBLISHED, abs=0.01)


MAPS = {
    "preact": ("blocks", (512, 4, 4)),
    "senet": ("blocks", (512, 4, 4)),
    "resnext": ("blocks", (1024, 8, 8)),
    "mobilev2": ("features", (1280, 4, 4)),
    "efficient": ("features", (320, 1, 1)),
    "dpn": ("blocks", (2560, 4, 4)),
    "pnasnetA": ("cells", (176, 8, 8)),
    "pnasnetB": ("cells", (128, 8, 8)),
    "lenet": ("features", (16, 5, 5)),
}


def test_maps_before_the_linear_layers_are_those_of_the_small_forms():
    for arch, (blocks, shape) in MAPS.items():
        seen = []
        with torch.device("meta"):
            model = build(arch, deconv=False).eval()
            getattr(model, blocks).register_forward_hook(
                lambda _, x, y, to=seen: to.append(y.shape)
            )
            model(torch.empty(1, 3, 32, 32))
        assert seen == [(1, *shape)], arch


@loop_over(
    ("arch", "groups"), [("resnext", {1, 32}), ("dpn", {1, 32}), ("pnasnetA", {1, 44, 88, 176})]
)
def test_grouped_layers_whiten_within_their_groups(arch, groups):
    with torch.device("meta"):
        layers = [m for m in build(arch, deconv=True).modules() if isinstance(m, FastDeconv)]
    assert {layer.groups for layer in layers} == groups
    for layer in layers:
        assert len(layer.running_cov_joint) == layer.groups == layer.blocks.groups


@loop_over("size", [33, 64])
def test_larger_and_odd_images_are_accepted(size):
    with torch.device("meta"):
        for arch in ARCHITECTURES.keys() - {*SMALL}:
            model = build(arch, deconv=False)
            assert model(torch.empty(2, 3, size, size)).shape == (2, 10), arch


def test_the_stem_of_a_resnet_is_rectified():
    model, images, seen = build("resnet18", deconv=False).eval(), torch.randn(1, 3, 32, 32), []
    model.stages.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs))
    model(images)
    conv, norm, _ = model.stem
    torch.testing.assert_close(seen[0], F.relu(norm(conv(images))))


def test_airbench_whitens_patches_of_its_images_and_passes_channels_on():
    shades = torch.randn(60, 1, 1, 1) + torch.randn(60, 3, 12, 12).cumsum(2)
    model, drawn = build("airbench", deconv=False), []
    init_from_images(model, lambda count: drawn.append(count) or shades)
    conv = model.stem[0]
    assert drawn == [5000] and not conv.weight.requires_grad and conv.bias.eq(0).all()
    patches = F.unfold(shades, 2).transpose(1, 2).reshape(-1, 12).double()
    values, vectors = torch.linalg.eigh(patches.mT @ patches / len(patches))
    found = conv.weight[:12].flatten(1).double().detach()
    expected = (vectors / (values + 5e-4).sqrt()).mT.flip(0)
    torch.testing.assert_close(found.abs(), expected.abs(), atol=1e-3, rtol=1e-3)
    assert torch.equal(conv.weight[12:], -conv.weight[:12])
    moments = conv(shades).square().mean((0, 2, 3))
    torch.testing.assert_close(moments, torch.ones(24), atol=0.05, rtol=0)  # eps is not small here
    for group, (inputs, width) in zip(model.groups, [(24, 64), (64, 256), (256, 256)], strict=True):
        maps = torch.randn(2, inputs, 6, 6)
        torch.testing.assert_close(group[0](maps)[:, :inputs], maps)
        assert group[0].out_channels == width and group[2].eps == 1e-12
        assert not group[2].weight.requires_grad and group[2].bias.requires_grad
    assert model.linear.weight.std().item() == pytest.approx(1)


def test_airbench_divides_its_outputs_by_its_width():
    model, features = build("airbench", deconv=False).eval(), []
    model.linear.register_forward_pre_hook(lambda _, inputs: features.extend(inputs))
    out = model(torch.randn(3, 3, 32, 32))
    torch.testing.assert_close(out, features[0] @ model.linear.weight.mT / 256)


def test_deconvolution_takes_larger_images():
    assert build("vgg11", deconv=True)(torch.randn(1, 3, 64, 64)).shape == (1, 10)


@pytest.mark.parametrize(("arch", "method", "deconv"), pairwise(SMALL, [1, 2, 3, 4], [False, True]))
def test_methods_train_in_either_kind_of_network(arch, method, deconv):
    model = build(arch, deconv=deconv, num_classes=7, image_size=8, method=method)
    loss = F.cross_entropy(model(torch.randn(4, 3, 8, 8)), torch.arange(4))
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert has(model, (FastDeconv, Delinear)) == (method != 1)
    assert has(model, BATCHNORMS) == (arch == "mlp" and method == 1 and not deconv)


def test_regressions_start_as_the_same_linear_map():
    images = torch.randn(3, 2, 8, 8)
    weight, bias = torch.randn(5, 2 * 8 * 8), torch.randn(5)
    for method in (1, 2, 3, 4):
        model = build(
            "simple_v1", deconv=False, in_channels=2, num_classes=5, image_size=8, method=method
        )
        layer = next(m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear))
        with torch.no_grad():
            layer.weight.copy_(weight.reshape(layer.weight.shape))
            layer.bias.copy_(bias)
        expected = F.linear(images.flatten(1), weight, bias)
        torch.testing.assert_close(model.eval()(images), expected, rtol=1e-4, atol=1e-4)


@loop_over("arch", ["vgg11", "simple_v2", "mlp"])
def test_dropout_rate_reaches_the_network(arch):
    model = build(arch, deconv=False, dropout_rate=0.25)
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [0.25]


@loop_over(
    ("arch", "options", "message"),
    [
        ("vgg12", {}, "arch must be one of vgg11, .*resnet50, .*mlp; got 'vgg12'"),
        ("vgg11", {"method": 3}, "method=3 does not apply to vgg11, only to simple_v1, mlp"),
        ("simple_v2", {"method": 1}, "method=1 does not apply to simple_v2"),
        ("resnet", {"dropout_rate": 0.5}, "dropout_rate=0.5 does not apply to resnet, only"),
        ("mlp", {"method": 5}, "method must be one of 1 plain, .*got 5"),
        ("vgg11", {"image_size": 28}, "image_size must be at least 32 for vgg11, got 28"),
    ],
)
def test_refusals_name_the_argument_and_the_choices(arch, options, message):
    with pytest.raises(ValueError, match=message):
        build(arch, deconv=False, **options)


@loop_over(
    ("arch", "asked", "expected"),
    [
        ("mobilev2", 5, {"depthwise": 1, "others": 5}),
        ("efficient", 5, {"depthwise": 1, "others": 5}),
        ("resnext", 5, {"grouped": 3}),
        ("resnext", 2, {"grouped": 2}),
        ("dpn", 5, {"grouped": 5, "others": 5}),
    ],
)
def test_grouped_layers_take_few_newton_schulz_steps_as_published(arch, asked, expected):
    with torch.device("meta"):
        network = build_model(arch, make_layers(deconv=True, n_iter=asked))
    found = {}
    for layer in network.modules():
        if isinstance(layer, FastDeconv) and layer.kernel_size == (3, 3):
            alone, grouped = layer.groups == layer.in_channels, layer.groups > 1
            kind = "depthwise" if alone else "grouped" if grouped else "others"
            assert found.setdefault(kind, layer.n_iter) == layer.n_iter
    assert found == expected
