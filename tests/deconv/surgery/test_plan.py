"""deconv.plan: the action and the reason for each layer."""

import re

import pytest
import torch
from torch import nn
from torch.ao.quantization import default_qat_qconfig
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from deconv import Delinear, FastDeconv3d, convert, plan
from tests.deconv.surgery.helpers import (
    actions,
    assert_kept,
    pair,
    randomize,
    reasons,
)
from tests.pairwise import loop_over


class InPlace(nn.Module):
    def forward(self, x):
        return F.relu(x, inplace=True)


@loop_over(
    ("norm", "act"),
    [
        (nn.BatchNorm2d(4), lambda x: F.relu(x, inplace=True)),
        (nn.BatchNorm2d(4), InPlace()),
        (nn.BatchNorm2d(4), nn.Sequential(InPlace(), nn.Dropout())),
        (nn.Sequential(nn.BatchNorm2d(4)), lambda x: F.relu(x, inplace=True)),
    ],
)
def test_an_inplace_function_keeps_the_batchnorm_before_it(norm, act):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.act, self.conv = norm, act, nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return x + self.conv(self.act(self.bn(x)))

    name = "bn" if type(norm) is nn.BatchNorm2d else "bn.0"
    assert reasons(Block())[name] == (
        "skipped: relu would overwrite its input in place: call it out of place"
    )


class Own(nn.Conv2d):
    def forward(self, x):
        return super().forward(2 * x)


class OwnConstructor(nn.Conv3d):
    """Set the arguments of the convolution, as Conv3DSimple of r3d_18 does."""

    def __init__(self, channels):
        super().__init__(channels, channels, 3, padding=1, bias=False)

    @staticmethod
    def get_downsample_stride(stride):
        return stride, stride, stride


class WithMask(nn.Conv2d):
    def __init__(self):
        super().__init__(4, 8, 1)
        self.register_buffer("mask", torch.ones(8))


def replace_forward(layer, name="forward"):
    forward = getattr(layer, name)
    setattr(layer, name, lambda x, *args: forward(2 * x, *args))
    return layer


def test_a_subclass_without_code_for_its_outputs_is_replaced():
    model = randomize(nn.Sequential(OwnConstructor(4), nn.BatchNorm3d(4), nn.ReLU()))
    new, x = convert(model, pretrained=True), torch.randn(2, 4, 5, 5, 5)
    assert [type(layer) for layer in new[:2]] == [FastDeconv3d, nn.Identity]
    assert_kept(model, new, x)


@loop_over(
    ("layers", "name", "options"),
    [
        ([nn.LazyConv2d(8, 1)], "1", {}),
        ([nn.Conv2d(4, 8, 1), nn.LazyBatchNorm2d()], "2", {"pretrained": True}),
        ([nn.Flatten(), nn.LazyLinear(3)], "2", {"linear": True}),
    ],
)
def test_lazy_layers_are_refused_until_a_batch_gives_their_shape(layers, name, options):
    model = nn.Sequential(nn.Conv2d(4, 4, 1), *layers)
    kind = type(layers[-1]).__name__
    for function in (plan, convert):
        with pytest.raises(ValueError, match=rf"^{name} \({kind}\) has .*: run .* one batch first"):
            function(model, **options)
    x = torch.randn(2, 4, 5, 5)
    model(x)
    assert_kept(model, convert(model, pretrained=True, linear=True), x)


@loop_over(
    ("conv", "reason"),
    [
        (WithMask(), r"there is no deconvolution for \S*WithMask"),
        (replace_forward(nn.Conv2d(4, 8, 1)), "its forward was replaced"),
        (replace_forward(nn.Conv2d(4, 8, 1), "_conv_forward"), "its forward was replaced"),
        (Own(4, 8, 1), r"there is no deconvolution for \S*test_plan\.Own"),
        (parametrizations.weight_norm(nn.Conv2d(4, 8, 1)), "no deconvolution for .*Parametrized"),
        (nn.Conv2d(4, 8, 1, dtype=torch.complex64), "needs real numbers, not torch.complex64"),
        (torch.ao.nn.qat.Conv2d(4, 8, 1, qconfig=default_qat_qconfig), r"torch\.ao\.nn\.qat"),
        (prune.identity(nn.Conv2d(4, 8, 1), "weight"), "a hook computes its weight or bias"),
    ],
)
def test_an_unsupported_convolution_keeps_its_batchnorm(conv, reason):
    model = nn.Sequential(nn.Conv2d(4, 4, 1), conv, nn.BatchNorm2d(8))
    first, second, third = plan(model)
    assert first.action == "replaced"
    assert second.action == "skipped"
    assert re.search(reason, second.reason)
    assert (third.action, third.reason) == ("kept", "follows 1, which is skipped")
    new = convert(model)
    assert type(new[1]).__name__ == type(conv).__name__ and type(new[2]) is nn.BatchNorm2d


class OwnNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + 1


@loop_over(
    ("norm", "options", "reason"),
    [
        (OwnNorm(8), {}, f"skipped: forward of {__name__}.OwnNorm is not known"),
        (replace_forward(nn.BatchNorm2d(8)), {}, "skipped: forward of BatchNorm2d is not known"),
        (nn.BatchNorm2d(8, track_running_stats=False), {}, "replaced: follows 0"),
        (
            nn.BatchNorm2d(8, track_running_stats=False),
            {"pretrained": True},
            "skipped: has no running statistics to fold",
        ),
        (nn.GroupNorm(2, 8), {}, "kept: only BatchNorm is replaced: build the model with"),
        (nn.InstanceNorm2d(8), {}, "kept: only BatchNorm is replaced: build the model with"),
        (nn.BatchNorm2d(8), {"skip": ["1"]}, "skipped: matches the pattern '1' of skip"),
    ],
)
def test_other_norms_stay_with_a_reason(norm, options, reason):
    model = nn.Sequential(nn.Conv2d(4, 8, 1), norm)
    assert reasons(model, **options)["1"].startswith(reason)
    assert (type(convert(model, **options)[1]) is type(norm)) != reason.startswith("replaced")


def test_batchnorm_of_vectors_stays():
    vectors = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(8))
    model = nn.Sequential(pair(), vectors)
    assert actions(model)["1.2"] == ("kept", "")


def test_layers_are_skipped_by_name():
    model = nn.Sequential(pair(), pair())
    model[1][0] = nn.Conv2d(8, 8, 1)
    table = actions(model, skip=["1.*"])
    assert {name: action for name, (action, _) in table.items()} == {
        "0.0": "replaced",
        "0.1": "replaced",
        "1.0": "skipped",
        "1.1": "skipped",
    }
    assert actions(model, skip=["1.0"])["1.1"] == ("kept", "")  # it goes with its convolution


def test_the_printed_plan_matches_what_convert_does():
    model = nn.Sequential(pair(), nn.Sequential(Own(4, 4, 1)), nn.Linear(2, 2))
    rows = plan(model, block=3)
    header, *lines, counts = str(rows).splitlines()
    assert header.split() == ["layer", "class", "action", "becomes", "reason"]
    assert [line.split()[:3] for line in lines] == [
        ["0.0", "Conv2d", "replaced"],
        ["0.1", "BatchNorm2d", "replaced"],
        ["1.0", "Own", "skipped"],
        ["2", "Linear", "replaced"],
    ]
    assert "FastDeconv, blocks of 2, with a bias" in lines[0]
    assert counts == "replaced: 1 convolution, 1 norm, 1 linear layer; skipped: 1 convolution"
    new = convert(model, block=3)
    for row in rows:
        assert (type(new.get_submodule(row.name)) is not type(row.module)) == (
            row.action == "replaced"
        )
    assert "(all)" in str(plan(nn.Conv2d(1, 1, 1)))


class ForeignLinear(nn.Linear):
    """A linear layer with a forward of its own."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias)


def test_classifiers_of_timm_are_whitened():
    linear = pytest.importorskip("timm.layers.linear").Linear
    model = Norms(nn.BatchNorm2d, 3, linear)
    model(torch.randn(8, 3, 8, 8))
    new, images = convert(model, pretrained=True), torch.randn(2, 3, 8, 8)
    assert type(new[-1]) is Delinear
    torch.testing.assert_close(new.eval()(images), model.eval()(images), rtol=1e-4, atol=1e-5)


class Norms(nn.Sequential):
    """Convolutions with a norm after each, and a classifier."""

    def __init__(self, norm, classes=2, linear=nn.Linear):
        layers = [nn.Conv2d(3, 8, 3), norm(8), nn.ReLU(), nn.Conv2d(8, 8, 3), norm(8), nn.ReLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear(8, classes))


@loop_over(
    ("model", "options", "outlook"),
    [
        (Norms(nn.BatchNorm2d), {}, "^$"),
        (Norms(nn.BatchNorm2d), {"linear": False}, "^Whiten 8 as well, linear=True: .* diverges"),
        (Norms(nn.BatchNorm2d), {"skip": ["8"]}, "^Whiten 8 as well"),
        (
            Norms(nn.BatchNorm2d, 2, ForeignLinear),
            {},
            "^Whiten 8 as well, as an nn.Linear of torch",
        ),
        (Norms(lambda c: nn.GroupNorm(2, c)), {"linear": False}, "^GroupNorm stays"),
        (Norms(nn.InstanceNorm2d), {}, "^InstanceNorm2d stays"),
        (Norms(nn.Identity), {}, "^The model has no norm"),
        (Norms(nn.Identity), {"skip": ["3"]}, "^Convolutions with 73% of the weights stay"),
        (Norms(nn.BatchNorm2d, 5000), {}, "^Convolutions have 1.9% of the weights, which limits"),
        (Norms(nn.BatchNorm2d), {"skip": ["0", "3"]}, "^No convolution is replaced"),
        (convert(Norms(nn.BatchNorm2d)), {}, "^$"),
        (nn.Linear(2, 2), {}, "^$"),
    ],
)
def test_a_plan_ends_in_what_there_is_to_gain(model, options, outlook):
    rows = plan(model, **options)
    assert re.search(outlook, rows.describe_outlook())
    assert str(rows).endswith(rows.describe_outlook() or rows.count_kinds())


def test_compiled_parts_are_refused():
    with pytest.raises(ValueError, match="0 is wrapped: OptimizedModule .*'_orig_mod'"):
        plan(nn.Sequential(torch.compile(pair())))


def test_unknown_options_are_refused():
    for function in (plan, convert):
        for name in ("blocks", "stride", "dtype"):
            with pytest.raises(TypeError, match=rf"convert\(\) .*'{name}'"):
                function(pair(), **{name: 16})
