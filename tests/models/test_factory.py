"""make_layers: each option reaches the layers that it is for."""

from itertools import product

import pytest
import torch
from torch import nn

from deconv import Delinear, FastDeconv
from models import build_model, make_layers
from tests.pairwise import loop_over


def find(model, kind):
    return [module for module in model.modules() if isinstance(module, kind)]


def test_options_reach_every_layer():
    layers = make_layers(
        deconv=True,
        mode=4,
        block=8,
        eps=1e-3,
        n_iter=3,
        bias=False,
        sampling_stride=2,
        stem_iter=7,
        freeze=True,
        freeze_iter=9,
        momentum=0.3,
        input_norm="l1",
    )
    model = build_model("vgg11", layers)
    convs = find(model, FastDeconv)
    assert len(convs) == 8
    assert [conv.n_iter for conv in convs] == [7] + [3] * 7
    for conv in convs:
        assert (conv.mode, conv.block, conv.eps) == (4, 8, 1e-3)
        assert (conv.freeze, conv.freeze_iter) == ((True, 9) if conv is convs[0] else (False, 100))
        assert (conv.sampling_stride, conv.momentum, conv.bias) == (2, 0.3, None)
    (last,) = find(model, Delinear)
    assert {layer.input_norm for layer in (*convs, last)} == {"l1"} and not last.freeze
    assert (last.block, last.eps, last.n_iter, last.momentum) == (512, 1e-3, 3, 0.3)
    assert last.bias is not None


def test_defaults_are_the_published_ones():
    model = build_model("simple_v2", make_layers(deconv=True))
    for conv in find(model, FastDeconv):
        assert (conv.mode, conv.block, conv.eps, conv.n_iter) == (5, 16, 1e-2, 5)
        assert conv.sampling_stride == 3
        assert conv.bias is not None


@loop_over(
    ("deconv", "block_final", "block"),
    [
        (True, None, 512),
        (True, 0, None),
        (True, 64, 64),
        (False, None, None),
        (False, 0, None),
        (False, 512, 512),
    ],
)
def test_block_final_decides_the_last_linear_layer(deconv, block_final, block):
    linear = make_layers(deconv=deconv, block_final=block_final).linear(512, 10)
    assert type(linear) is (nn.Linear if block is None else Delinear)
    assert block is None or linear.block == block


def test_convolutions_have_a_bias_only_without_batchnorm():
    for bias, batchnorm in product([True, False], [True, False]):
        layers = make_layers(deconv=False, bias=bias, batchnorm=batchnorm)
        for conv in (layers.stem(3, 4, 3), layers.conv(3, 4, 3)):
            assert type(conv) is nn.Conv2d
            assert (conv.bias is not None) == (bias and not batchnorm)
        assert type(layers.norm(4)) is (nn.BatchNorm2d if batchnorm else nn.Identity)


def theirs():
    conv = nn.Conv2d(3, 4, 3, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(4, 2))


def test_networks_from_elsewhere_keep_their_layers_or_are_converted():
    network = theirs()
    for final in (None, 0):
        adapt = make_layers(deconv=False, block_final=final).adapt
        assert adapt(network, pretrained=False) is network
    for options in ({"batchnorm": False}, {"block_final": 32}):
        assert make_layers(deconv=False, **options).adapt is None
    options = dict(mode=3, block=2, eps=0.1, n_iter=4, root="cholesky", layout="contiguous")
    first_only = dict(stem_iter=7, freeze=True, freeze_iter=9)
    layers = make_layers(deconv=True, block_final=2, bias=False, **first_only, **options)
    first, norm, second, _, head = layers.adapt(network, pretrained=False)
    assert [type(m) for m in (first, norm, second, head)] == [
        FastDeconv,
        nn.Identity,
        FastDeconv,
        Delinear,
    ]
    chosen = {name: getattr(second, name) for name in options}
    assert chosen == options and (first.n_iter, first.bias, head.block) == (7, None, 2)
    assert (first.freeze_iter, second.freeze, head.freeze) == (9, False, False)
    assert "freeze_steps" in first.state_dict()
    assert (head.eps, head.n_iter, head.layout) == (0.1, 4, "contiguous")
    whole = make_layers(deconv=True, block_final=0).adapt(network, pretrained=True)
    assert type(whole[-1]) is nn.Linear and whole[0].bias is not None
    with pytest.raises(ValueError, match="no convolution of images can be replaced"):
        layers.adapt(nn.Sequential(nn.Conv1d(3, 4, 3)), pretrained=False)


@loop_over(
    ("root", "root_final", "expected"),
    [
        ("cholesky", None, "resolvent"),
        ("newton", None, "newton"),
        ("resolvent", None, "resolvent"),
        ("newton", "cholesky", "cholesky"),
    ],
)
def test_linear_layers_have_the_root_of_convolutions_unless_it_is_triangular(
    root, root_final, expected
):
    layers = make_layers(deconv=True, root=root, root_final=root_final)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    conv, *_, head = layers.adapt(network, pretrained=False)
    assert (conv.root, head.root) == (root, expected)
    hidden = [layers.select_method(n).hidden(6, 5) for n in (3, 4)]
    assert {layer.root for layer in (layers.linear(6, 5), *hidden)} == {expected}


def test_deconvolution_needs_no_norm():
    assert type(make_layers(deconv=True).norm(4)) is nn.Identity


@loop_over("deconv", [True, False])
def test_methods_whiten_what_they_say(deconv):
    options = dict(eps=1e-3, n_iter=3, stem_iter=7, momentum=0.3, freeze=True)
    layers = make_layers(deconv=deconv, **options)
    plain, channel, joint, blocks = (
        next(m for m in layers.select_method(n).image(2, 8, 5) if hasattr(m, "weight"))
        for n in (1, 2, 3, 4)
    )
    assert type(plain) is nn.Conv2d
    assert (type(channel), channel.mode, channel.blocks.size) == (FastDeconv, 3, 2)
    assert (type(joint), joint.mode, joint.blocks.features) == (FastDeconv, 4, 2 * 8 * 8)
    assert (type(blocks), blocks.blocks.features, blocks.blocks.count) == (Delinear, 32, 4)
    for layer in (channel, joint, blocks):
        assert (layer.eps, layer.n_iter, layer.momentum, layer.freeze) == (1e-3, 7, 0.3, True)


def test_bias_reaches_the_regressions():
    layers = make_layers(deconv=False, bias=False)
    for number in (1, 2, 3, 4):
        image = layers.select_method(number).image(2, 8, 5)
        assert all(layer.bias is None for layer in image if hasattr(layer, "weight"))


def test_default_method_is_of_the_kind_of_the_bundle():
    plain, deconvolved = make_layers(deconv=False), make_layers(deconv=True)
    assert plain.select_method(None) is plain.methods[1]
    assert deconvolved.select_method(None) is deconvolved.methods[3]


@loop_over(
    ("method", "block_final", "kinds"),
    [
        (1, None, [nn.Linear, nn.Linear]),
        (2, None, [nn.Linear, nn.Linear]),
        (3, None, [Delinear, Delinear]),
        (4, None, [Delinear, Delinear]),
        (3, 0, [Delinear, nn.Linear]),
        (1, 64, [nn.Linear, Delinear]),
    ],
)
def test_mlp_takes_its_linear_layers_from_the_method(method, block_final, kinds):
    layers = make_layers(deconv=False, block_final=block_final, n_iter=3)
    model = build_model("mlp", layers, image_size=8, method=method)
    linears = [module for module in model if isinstance(module, nn.Linear)]
    assert [type(linear) for linear in linears] == kinds
    for linear in linears:
        if isinstance(linear, Delinear):
            assert linear.n_iter == 3
            block = block_final or {3: 128, 4: 32}[method]
            assert linear.blocks.features == block


def test_wrong_options_are_refused_by_name():
    with pytest.raises(ValueError, match="block_final must be .*got -1"):
        make_layers(deconv=True, block_final=-1)
    with pytest.raises(TypeError, match="colour"):
        make_layers(deconv=False, colour=1)


def test_one_bundle_builds_independent_networks():
    layers = make_layers(deconv=True)
    first, second = (build_model("simple_v2", layers) for _ in range(2))
    second(torch.randn(2, 3, 32, 32))
    assert [m.num_batches_tracked.item() for m in find(first, FastDeconv)] == [0, 0, 0]
