"""Only BatchNorms whose dataflow is known are folded or removed."""

import copy
import random
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.ao.nn.intrinsic.qat import ConvBn2d
from torch.ao.quantization import default_qat_qconfig
from torch.nn import functional as F

from deconv import FastDeconv, convert, plan
from deconv.surgery.batchnorm import ChannelAffine
from tests.deconv.surgery.helpers import assert_kept, pair, randomize, reasons
from tests.pairwise import loop_over


class Twice(nn.Module):
    """One convolution that two BatchNorms and a shortcut look at: nothing can be folded."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn1, self.bn2 = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        return self.bn1(y).relu() + self.bn2(y)


class Again(nn.Module):
    """One convolution called twice, with and without the BatchNorm."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.conv(self.bn(self.conv(x)))


class Untraceable(nn.Module):
    """Looks at a value, so that its code cannot be traced."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.relu(self.bn(self.conv(x)))
        return y if x.sum() > 0 else -y


class Optional(nn.Module):
    """Has another way through, which is not the default one."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.other = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

    def forward(self, x, mask=None, *, deep=False):
        y = self.conv(x)
        if mask is not None:
            y = y * mask
        return self.bn(y) if not deep else self.other(y)


class Borrowed(nn.Module):
    """Calls a part of its part by itself."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x):
        return self.block(x) + self.block[0](x)


class Listed(nn.Module):
    """Goes through lists, which have no code of their own."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))

    def forward(self, x):
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(conv(x)).relu()
        return x


@loop_over(
    ("network", "affine"),
    [(Twice, 2), (Again, 1), (Untraceable, 0), (Borrowed, 1), (Optional, 1), (Listed, 0)],
)
def test_pretrained_folds_only_into_exclusive_sources(network, affine):
    model = randomize(nn.Sequential(network(), nn.Conv2d(4, 2, 1)))
    new = convert(model, pretrained=True)
    assert sum(isinstance(module, ChannelAffine) for module in new.modules()) == affine
    assert_kept(model, new, torch.randn(2, 4, 6, 6))


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x))


class Chosen(nn.Module):
    """One of two BatchNorms after a convolution."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))
        self.domain = 0


class ByArgument(Chosen):
    def forward(self, x, domain=0):
        return self.norms[domain](self.conv(x))


class ByAttribute(Chosen):
    def forward(self, x):
        return self.norms[self.domain](self.conv(x))


class ByFlag(Pair):
    def forward(self, x, normalized=True):
        return self.norm(self.conv(x)) if normalized else self.conv(x)


class ByOwnFlag(Pair):
    def __init__(self):
        super().__init__()
        self.normalized = True

    def forward(self, x):
        return self.norm(self.conv(x)) if self.normalized else self.conv(x)


class ByOwnText(Pair):
    def __init__(self):
        super().__init__()
        self.kind, self.scale = "batch", None

    def forward(self, x):
        x = self.conv(x) if self.scale is None else self.conv(x) * self.scale
        return self.norm(x) if self.kind == "batch" else x


class ByOtherText(ByOwnText):
    def forward(self, x):
        return self.conv(x) if self.kind == "none" else self.norm(self.conv(x))


class ByNumber(Pair):
    stage = 7  # of the class

    def forward(self, x):
        return self.conv(x) if self.stage == 3 else self.norm(self.conv(x))


class ByCount(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
        self.depth = 2

    def forward(self, x):
        for i in range(self.depth):
            x = self[i](x)
        return x


class Storing(Pair):
    def forward(self, x):
        self.taps = {"conv": [self.conv(x)]}
        return self.norm(self.taps["conv"][0])


class ReadingStored(nn.Module):
    """Uses what its child stores in an attribute."""

    def __init__(self):
        super().__init__()
        self.child = Storing()

    def forward(self, x):
        return self.child(x) + self.child.taps["conv"][0]


class ByType(Pair):
    def forward(self, x):
        return self.conv(x) if isinstance(x, torch.Tensor) else self.norm(self.conv(x[0]))


class ByNone(Pair):
    def forward(self, x, shift):
        return self.conv(x) if shift is None else self.norm(self.conv(x)) + shift


class WithKeyword(nn.Module):
    """Skips the BatchNorm of a child, which the child does not by itself."""

    def __init__(self):
        super().__init__()
        self.first, self.second = ByFlag(), ByFlag()

    def forward(self, x):
        return self.first(x) + self.second(x, normalized=False)


class PartOnDemand(nn.Module):
    """Calls a part of its child where it is told to."""

    def __init__(self):
        super().__init__()
        self.child = Pair()

    def forward(self, x, raw=False):
        return self.child.conv(x) if raw else self.child(x)


def set_attributes(**values):
    def call(model, x):
        for name, value in values.items():
            setattr(model, name, value)
        return model(x)

    return call


@loop_over(
    ("network", "calls"),
    [
        (ByArgument, [lambda model, x: model(x, 1)]),
        (ByAttribute, [set_attributes(domain=1)]),
        (ByFlag, [lambda model, x: model(x, normalized=False)]),
        (ByOwnFlag, [set_attributes(normalized=False), set_attributes(normalized=True)]),
        (ByOwnText, [set_attributes(scale=2.0), set_attributes(kind="none")]),
        (ByOtherText, [set_attributes(kind="none")]),
        (ByNumber, [set_attributes(stage=3)]),
        (ByCount, [set_attributes(depth=1)]),
        (ReadingStored, []),
        (ByType, [lambda model, x: model([x])]),
        (ByNone, [lambda model, x: model(x, None), lambda model, x: model(x, 1)]),
        (WithKeyword, []),
        (PartOnDemand, [lambda model, x: model(x, raw=True)]),
    ],
)
def test_pretrained_is_exact_whichever_path_a_call_takes(network, calls):
    model, x = randomize(network()).double(), torch.randn(2, 4, 6, 6, dtype=torch.float64)
    new = convert(model, pretrained=True)
    assert any(isinstance(module, ChannelAffine) for module in new.modules())
    for call in calls if network is ByNone else (lambda model, x: model(x), *calls):
        torch.testing.assert_close(call(new.eval(), x), call(model.eval(), x), rtol=0, atol=1e-12)


def test_a_flag_that_changes_nothing_between_them_does_not_prevent_folding():
    class Activated(Pair):
        def forward(self, x, scale=None, activate=True):
            x = self.norm(self.conv(x if scale is None else x * scale))
            return x.relu() if activate else x

    assert reasons(Activated(), pretrained=True)["norm"] == "replaced: folded into conv"
    reason = reasons(ByFlag(), pretrained=True)["norm"]
    assert reason.endswith("ByFlag may use conv without the norm")


class Iterating(nn.Module):
    """Collects the outputs of layers, as `visit` lists them; can be traced or not."""

    def __init__(self, visit, traced):
        super().__init__()
        self.body = nn.Sequential(*pair()[:2], nn.ReLU(), *pair()[:2])
        self.body[3] = nn.Conv2d(8, 8, 1)
        self.visit, self.traced = visit, traced

    def forward(self, x):
        taps = []
        for layer in self.visit(self.body):
            x = layer(x)
            if self.traced or x.sum() > -1e9:
                taps.append(x)
        return torch.cat(taps)


@loop_over("traced", [True, False])
@loop_over(
    "visit",
    [
        iter,
        lambda body: (layer for _, layer in enumerate(body)),
        lambda body: (layer for _, layer in body.named_children()),
        lambda body: body._modules.values(),
    ],
)
def test_pretrained_is_exact_where_a_forward_iterates_over_layers(visit, traced):
    model = randomize(Iterating(visit, traced)).double()
    assert_kept(model, convert(model, pretrained=True), torch.randn(2, 4, 6, 6).double(), 1e-12)


class Tapped(nn.Conv2d):
    """A class that only tells which outputs count."""


class ByClass(nn.Sequential):
    def __init__(self, kind):
        super().__init__(Tapped(4, 4, 3), nn.BatchNorm2d(4), *Pair().children())
        self.kind = kind

    def forward(self, x):
        taps = []
        for layer in self:
            x = layer(x)
            if isinstance(layer, self.kind):
                taps.append(x.mean((2, 3)))
        return torch.cat(taps)


@loop_over(
    ("kind", "expected"),
    [
        (nn.BatchNorm2d, [FastDeconv, nn.BatchNorm2d, FastDeconv, nn.BatchNorm2d]),
        (nn.Conv2d, [FastDeconv, ChannelAffine, FastDeconv, ChannelAffine]),
        (Tapped, [Tapped, nn.BatchNorm2d, nn.Conv2d, nn.BatchNorm2d]),
    ],
)
def test_layers_stay_where_the_forward_asks_for_their_classes(kind, expected):
    model = randomize(nn.Sequential(nn.Conv2d(4, 4, 1), ByClass(kind)))
    new = convert(model, pretrained=True)
    assert [type(layer) for layer in new[1]] == expected
    assert_kept(model, new, torch.randn(2, 4, 7, 7))
    kept = [row.reason for row in plan(model) if type(row.module) is expected[1]]
    assert all("ByClass depends on the classes of its layers: " in reason for reason in kept)
    convert(model).train()(torch.randn(2, 4, 7, 7))


class Stateful(nn.Module):
    """Counts its calls in a buffer and in an attribute, and draws random numbers."""

    def __init__(self):
        super().__init__()
        self.child, self.calls = Pair(), 0
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.count += 1
        self.child.calls = self.calls
        torch.set_grad_enabled(False)
        return self.child(x) * random.random() * np.random.rand() + torch.rand(1)  # noqa: NPY002


def random_states():
    numpy = np.random.get_state()  # noqa: NPY002
    return random.getstate(), numpy[1].tolist(), numpy[2], torch.get_rng_state().tolist()


def test_planning_and_converting_change_nothing():
    model = Stateful()
    before = copy.deepcopy(model.state_dict())
    states = random_states()
    plan(model)
    new = convert(model, pretrained=True)
    assert (model.calls, new.calls, new.count) == (0, 0, 0) and not hasattr(model.child, "calls")
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    assert random_states() == states and torch.is_grad_enabled()


@loop_over("at", ["conv", "inner", "norm"])
def test_pretrained_folds_nothing_across_a_hook(at):
    inner = nn.Sequential(nn.Conv2d(4, 4, 1))
    model = randomize(nn.Sequential(inner, nn.BatchNorm2d(4)))
    if at == "norm":
        model[1].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    else:
        hooked = inner[0] if at == "conv" else inner
        hooked.register_forward_hook(lambda module, args, output: output.square())
    assert_kept(model, convert(model, pretrained=True), torch.randn(2, 4, 5, 5))


def test_an_instance_forward_is_not_traced():
    model = randomize(pair())
    model.forward = lambda x: model[2](model[1](2 * model[0](x)))
    assert reasons(model, pretrained=True)["1"].startswith(
        "kept: forward of Sequential cannot be traced"
    )
    assert_kept(model, convert(model, pretrained=True), torch.randn(2, 4, 5, 5))


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
def test_torchscript_parts_stay():
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    model = randomize(nn.Sequential(pair(), nn.Conv2d(8, 4, 1), scripted, nn.BatchNorm2d(4)))
    new = convert(model, pretrained=True)
    assert (
        reasons(model)["2.0"]
        == "skipped: is TorchScript: convert the model before torch.jit.script"
    )
    assert isinstance(new[2], torch.jit.ScriptModule)
    assert_kept(model, new, torch.randn(2, 4, 5, 5))


def test_the_source_is_found_inside_a_sequential():
    model = randomize(
        nn.Sequential(nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 1)), nn.BatchNorm2d(4))
    )
    new = convert(model, pretrained=True)
    assert type(new[1]) is nn.Identity
    assert_kept(model, new, torch.randn(2, 4, 6, 6))


def test_tracing_sets_no_attributes():
    class Counting(nn.Sequential):
        def forward(self, x):
            self.last = x
            return super().forward(x)

    model = Counting(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    convert(model)
    assert not hasattr(model, "last")


class TwoUses(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x)) + F.conv2d(x, self.conv.weight)


def test_pretrained_folds_nothing_into_a_weight_with_other_uses():
    model, x = TwoUses().eval(), torch.randn(2, 4, 7, 7)
    nn.init.normal_(model.norm.weight)
    torch.testing.assert_close(convert(model, pretrained=True)(x), model(x))


class ByName(nn.Module):
    """Code that no trace goes through, and that calls what lies within its child."""

    def __init__(self, child):
        super().__init__()
        self.child = child

    def forward(self, x):
        y = self.child.conv(x)
        return y if x.sum() > 1e9 else self.child.norm(y) + y


class ByNumber(ByName):
    def forward(self, x):
        y = self.child[0](x)
        return y if x.sum() > 1e9 else self.child[1](y) + y


@loop_over("model", [ByName(Pair()), ByNumber(nn.Sequential(*Pair().children()))])
def test_pretrained_is_exact_below_an_untraceable_forward(model):
    nn.init.normal_(next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)).weight)
    x = torch.randn(2, 4, 7, 7)
    torch.testing.assert_close(convert(model.eval(), pretrained=True)(x), model(x))


class WithNorm(nn.Conv2d):
    """A convolution with a BatchNorm of its own, as some libraries have."""

    def __init__(self):
        super().__init__(4, 4, 3)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(super().forward(x))


class ByHand(Pair):
    def forward(self, x):
        norm = self.norm
        return F.batch_norm(self.conv(x), norm.running_mean, norm.running_var, norm.weight)


class Filled(ByName):
    def __init__(self, child):
        super().__init__(child)
        nn.init.constant_(self.child.norm.weight, 2)


class ByScale(Filled):
    """Reads a scale where no trace tells, in a method of its forward."""

    def forward(self, x):
        y = super().forward(x)
        return y if x.sum() > 1e9 else self.scale(y)

    def scale(self, y):
        return y * sum(self.child.norm.weight[c] for c in range(4))


def test_initialising_the_scale_does_not_keep_the_batchnorm():
    assert plan(Filled(Pair()))[1].action == "replaced"


@loop_over(
    ("part", "name", "reason"),
    [
        (WithNorm(), "1.norm", r"is a part of 1, \S*test_tracing.WithNorm"),
        (ByHand(), "1.norm", r"\S*test_tracing.ByHand reads its tensors by name"),
        (Untraceable(), "1.bn", r"forward of \S*test_tracing.Untraceable cannot be traced"),
        (ConvBn2d(4, 4, 3, qconfig=default_qat_qconfig), "1.bn", r"is a part of 1, \S*ConvBn2d"),
    ],
)
def test_a_batchnorm_stays_that_code_depends_on(part, name, reason):
    model = randomize(nn.Sequential(nn.Conv2d(4, 4, 1), part))
    row = next(row for row in plan(model) if row.name == name)
    assert row.action == "kept" and re.match(reason, row.reason)
    assert_kept(model, convert(model, pretrained=True), torch.randn(2, 4, 5, 5))
    convert(model).train()(torch.randn(2, 4, 5, 5))


@loop_over("pretrained", [False, True])
def test_reading_a_replaced_scale_raises_attribute_error(pretrained):
    model = nn.Sequential(nn.Conv2d(4, 4, 1), ByScale(Pair()))
    new = convert(model, pretrained=pretrained)
    with pytest.raises(AttributeError, match="has no attribute 'weight'"):
        new(torch.randn(2, 4, 5, 5))


def test_nothing_is_folded_below_an_untraceable_forward():
    row = {row.name: row for row in plan(ByName(Pair()), pretrained=True)}["child.norm"]
    assert row.becomes == "ChannelAffine"
    assert row.reason.endswith("ByName cannot be traced, so child.conv may have other uses")
    kept = reasons(ByName(Pair()), skip=["child.conv"])["child.norm"]
    assert kept == "kept: follows child.conv, which is skipped"
