"""deconv.convert and deconv.plan: what becomes of each layer, in small networks of all kinds."""

import copy
import pickle
import re
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.ao.nn.intrinsic.qat import ConvBn2d
from torch.ao.quantization import default_qat_qconfig
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torchvision.ops import FrozenBatchNorm2d

import deconv
from deconv import Delinear, FastDeconv, convert, fuse, plan
from deconv.surgery.batchnorm import ChannelAffine
from tests.pairwise import pairwise

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}


def stir(model):
    """The model with every BatchNorm as if trained: no number as it starts."""
    torch.manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if getattr(module, "running_var", None) is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
            if isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d) and module.bias is not None:
                module.weight.uniform_(0.5, 2)
                module.bias.normal_()
    return model


def pair(*, bias=False, norm=nn.BatchNorm2d, **options):
    conv = nn.Conv2d(4, 8, 3, padding=1, bias=bias, **options)
    return nn.Sequential(conv, norm(8), nn.ReLU(inplace=True))


def actions(model, **options):
    return {row.name: (row.action, row.becomes) for row in plan(model, **options)}


def reasons(model, **options):
    return {row.name: f"{row.action}: {row.reason}" for row in plan(model, **options)}


def assert_kept(old, new, x, tolerance=1e-4):
    old.eval(), new.eval()
    with torch.no_grad():
        given, expected = new(x), old(x)
    atol = tolerance * expected.abs().max().item()
    torch.testing.assert_close(given, expected, rtol=0, atol=atol)


class PreActivation(nn.Module):
    """BN, ReLU, convolution, twice, beside a shortcut of its input."""

    def __init__(self, inplace=True):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.relu = nn.ReLU(inplace=inplace)

    def forward(self, x):
        y = self.conv1(self.relu(self.bn1(x)))
        return x + self.conv2(self.relu(self.bn2(y)))


def test_every_pair_becomes_a_deconvolution_and_an_identity():
    model = pair()
    before = copy.deepcopy(model.state_dict())
    new = convert(model, mode=3, block=2, eps=0.1, n_iter=7, momentum=0.5)
    assert [type(module) for module in new] == [FastDeconv, nn.Identity, nn.ReLU]
    layer = new[0]
    chosen = (layer.mode, layer.block, layer.eps, layer.n_iter, layer.momentum)
    assert chosen == (3, 2, 0.1, 7, 0.5)
    assert torch.equal(layer.weight, model[0].weight) and layer.weight is not model[0].weight
    assert new[2] is not model[2] and new[2].inplace
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    assert type(model[0]) is nn.Conv2d and type(model[1]) is nn.BatchNorm2d


@pytest.mark.parametrize(
    "geometry",
    [
        dict(kernel_size=(3, 2), stride=(2, 1), padding=(2, 0)),
        dict(kernel_size=3, dilation=2, padding="same", groups=2),
        dict(kernel_size=1, stride=2, padding="valid", groups=4, bias=False),
    ],
)
def test_a_convolution_keeps_what_it_is(geometry):
    conv = nn.Conv2d(4, 8, dtype=torch.float64, **geometry).to(memory_format=torch.channels_last)
    conv.weight.requires_grad_(False)
    conv.eval()
    new = convert(conv)
    assert type(new) is FastDeconv and not new.training
    for name in ("stride", "padding", "dilation", "groups", "kernel_size", "in_channels"):
        assert getattr(new, name) == getattr(conv, name)
    torch.testing.assert_close(new.weight, conv.weight, rtol=0, atol=0, check_stride=True)
    assert (new.bias is None) == (conv.bias is None)
    assert {value.dtype for value in new.parameters()} == {torch.float64}
    assert new.running_mean.dtype == torch.float64 and not new.weight.requires_grad
    assert conv.bias is None or (torch.equal(new.bias, conv.bias) and new.bias.requires_grad)
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(new(x), conv(x), rtol=0, atol=1e-12)  # no batch was seen yet


@pytest.mark.parametrize("bias", [True, False])
def test_a_bias_stands_for_the_shift_of_batchnorm(bias):
    model = pair()
    model[0].weight.requires_grad_(False)
    new = convert(model, bias=bias)[0].bias
    assert (new is not None) == bias
    assert not bias or (not new.any() and not new.requires_grad)
    assert convert(nn.Sequential(nn.Conv2d(3, 4, 1, bias=False)))[0].bias is None  # had no shift


@pytest.mark.parametrize(
    ("bias", "channels_last", "affine", "dtype"),
    pairwise([True, False], [True, False], [True, False], list(TOLERANCE)),
)
def test_pretrained_folds_the_batchnorm_before_training_starts(bias, channels_last, affine, dtype):
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2, bias=bias),
        nn.BatchNorm2d(8, affine=affine),
    )
    stir(model).to(dtype)
    if channels_last:
        model.to(memory_format=torch.channels_last)
    new = convert(model, pretrained=True)
    x = torch.randn(3, 4, 9, 8, dtype=dtype)
    assert_kept(model, new, x, TOLERANCE[dtype])
    assert new[0].weight.stride() == model[0].weight.stride()
    assert type(new[1]) is nn.Identity
    was = new[0](x)
    new.train()(x)
    assert not torch.allclose(new.eval()[0](x), was)


def test_without_pretrained_the_weights_stay_as_they_are():
    model = stir(pair(bias=True))
    new = convert(model)[0]
    assert torch.equal(new.weight, model[0].weight) and torch.equal(new.bias, model[0].bias)


@pytest.mark.parametrize("norm", [nn.SyncBatchNorm, FrozenBatchNorm2d])
def test_other_batchnorms_go_as_well(norm):
    model = stir(pair(norm=norm)).eval()
    assert type(convert(model)[1]) is nn.Identity
    new = convert(model, pretrained=True)
    x = torch.randn(2, 4, 6, 6)
    folded = F.batch_norm(
        model[0](x), model[1].running_mean, model[1].running_var, model[1].weight, model[1].bias
    )
    torch.testing.assert_close(new[:2](x), folded, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("inplace", [True, False])
def test_batchnorm_before_the_convolution_goes_and_the_shortcut_stays(inplace):
    model = nn.Sequential(PreActivation(inplace), PreActivation(inplace)).eval()
    new = convert(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in new.modules())
    assert [type(new[0].bn1), type(new[0].bn2)] == [nn.Identity, nn.Identity]
    x = torch.randn(2, 4, 6, 6)
    given = x.clone()
    block = new[0]
    expected = x + block.conv2(block.conv1(x.relu()).relu())
    torch.testing.assert_close(block(x), expected)
    assert torch.equal(x, given)


def test_pretrained_keeps_an_affine_map_where_no_convolution_can_take_it():
    model = stir(nn.Sequential(PreActivation(), PreActivation()))
    model[1].bn1.requires_grad_(False)
    new = convert(model, pretrained=True)
    assert_kept(model, new, torch.randn(2, 4, 6, 6))
    assert [type(new[0].bn1), type(new[0].bn2)] == [ChannelAffine, nn.Identity]
    assert new[0].bn1.scale.requires_grad and not new[1].bn1.scale.requires_grad
    fused = fuse(new)
    assert_kept(new, fused, torch.randn(2, 4, 6, 6), 1e-5)
    assert not any(kind in pickle.dumps(fused[1]) for kind in (b"ChannelAffine", b"FastDeconv"))


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


class Unreadable(nn.Module):
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


@pytest.mark.parametrize(
    ("network", "affine"),
    [(Twice, 2), (Again, 1), (Unreadable, 0), (Borrowed, 1), (Optional, 0), (Listed, 0)],
)
def test_pretrained_folds_only_what_the_code_proves(network, affine):
    model = stir(nn.Sequential(network(), nn.Conv2d(4, 2, 1)))
    new = convert(model, pretrained=True)
    assert sum(isinstance(module, ChannelAffine) for module in new.modules()) == affine
    assert_kept(model, new, torch.randn(2, 4, 6, 6))


def test_a_batchnorm_after_another_is_not_lost():
    model = stir(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)))
    new = convert(model, pretrained=True)
    assert [type(module) for module in new[1:]] == [nn.Identity, ChannelAffine]
    assert_kept(model, new, torch.randn(2, 4, 5, 5))


@pytest.mark.parametrize("at", ["conv", "inner", "norm"])
def test_pretrained_folds_nothing_across_a_hook(at):
    inner = nn.Sequential(nn.Conv2d(4, 4, 1))
    model = stir(nn.Sequential(inner, nn.BatchNorm2d(4)))
    if at == "norm":
        model[1].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    else:
        hooked = inner[0] if at == "conv" else inner
        hooked.register_forward_hook(lambda module, args, output: output.square())
    assert_kept(model, convert(model, pretrained=True), torch.randn(2, 4, 5, 5))


def test_a_forward_that_was_put_in_place_is_not_read():
    model = stir(pair())
    model.forward = lambda x: model[2](model[1](2 * model[0](x)))
    assert reasons(model, pretrained=True)["1"].startswith(
        "kept: forward of Sequential cannot be traced"
    )
    assert_kept(model, convert(model, pretrained=True), torch.randn(2, 4, 5, 5))


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
def test_parts_that_are_no_python_stay_as_they_are():
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    model = stir(nn.Sequential(pair(), nn.Conv2d(8, 4, 1), scripted, nn.BatchNorm2d(4)))
    new = convert(model, pretrained=True)
    assert (
        reasons(model)["2.0"]
        == "skipped: is TorchScript: convert the model before torch.jit.script"
    )
    assert isinstance(new[2], torch.jit.ScriptModule)
    assert_kept(model, new, torch.randn(2, 4, 5, 5))


def test_a_sequential_gives_what_its_last_module_gives():
    model = stir(nn.Sequential(nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 1)), nn.BatchNorm2d(4)))
    new = convert(model, pretrained=True)
    assert type(new[1]) is nn.Identity
    assert_kept(model, new, torch.randn(2, 4, 6, 6))


def test_reading_the_code_leaves_no_trace_in_the_network():
    class Counting(nn.Sequential):
        def forward(self, x):
            self.last = x
            return super().forward(x)

    model = Counting(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    convert(model)
    assert not hasattr(model, "last")


def test_an_operation_in_place_keeps_the_batchnorm_before_it():
    class InPlace(PreActivation):
        def forward(self, x):
            return x + self.conv1(F.relu(self.bn1(x), inplace=True))

    assert reasons(InPlace())["bn1"] == "skipped: relu after it would overwrite its input"


def test_what_is_shared_is_replaced_once_and_stays_shared():
    conv, norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
    model = nn.Sequential(conv, norm, nn.Sequential(conv, norm))
    model.order = [conv]  # where nn.Module does not look
    new = convert(model)
    assert type(new[0]) is FastDeconv and new[0] is new[2][0] is new.order[0]
    assert new[1] is new[2][1]
    assert len(plan(model)) == 2
    assert_kept(stir(model), convert(model, pretrained=True), torch.randn(2, 4, 5, 5))


def test_tied_weights_stay_tied():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
    model[1].weight = model[0].weight
    new = convert(model)
    assert new[0].weight is new[1].weight


def test_the_last_linear_layer_goes_on_request():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(1), nn.Linear(4, 6), nn.Linear(6, 2))
    kinds = [type(module) for module in convert(model, linear=True, block_linear=3)]
    assert kinds == [FastDeconv, nn.Flatten, nn.Linear, Delinear]
    head = convert(model, linear=True, block_linear=3, eps=0.5, layout="contiguous")[-1]
    assert (head.block, head.eps, head.layout) == (3, 0.5, "contiguous")
    assert torch.equal(head.weight, model[-1].weight) and torch.equal(head.bias, model[-1].bias)
    assert type(convert(model)[-1]) is nn.Linear
    # Another class is not the layer that it seems, and the last one is taken before it.
    model.append(nn.Sequential(nn.modules.linear.NonDynamicallyQuantizableLinear(2, 2)))
    assert type(convert(model, linear=True)[3]) is Delinear


def test_batchnorm_of_the_linear_layer_goes_with_it():
    model = stir(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)))
    model.insert(0, nn.Sequential(nn.Conv2d(4, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    assert actions(model, linear=True)["2"] == ("kept", "")
    shorter = model[:3]
    new = convert(shorter, linear=True, pretrained=True)
    assert type(new[2]) is nn.Identity
    assert_kept(shorter, new, torch.randn(3, 4, 5, 5))


class Own(nn.Conv2d):
    pass


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (nn.LazyConv2d(8, 1), "there is no deconvolution for LazyConv2d"),
        (Own(4, 8, 1), r"there is no deconvolution for \S*test_convert\.Own"),
        (parametrizations.weight_norm(nn.Conv2d(4, 8, 1)), "no deconvolution for .*Parametrized"),
        (nn.Conv2d(4, 8, 1, dtype=torch.complex64), "only real numbers .*, not torch.complex64"),
        (torch.ao.nn.qat.Conv2d(4, 8, 1, qconfig=default_qat_qconfig), r"torch\.ao\.nn\.qat"),
        (prune.identity(nn.Conv2d(4, 8, 1), "weight"), "a hook computes its weight or its bias"),
    ],
)
def test_what_cannot_be_replaced_keeps_its_batchnorm(conv, reason):
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


@pytest.mark.parametrize(
    ("norm", "options", "reason"),
    [
        (OwnNorm(8), {}, f"skipped: what {__name__}.OwnNorm does is not known"),
        (nn.BatchNorm2d(8, track_running_stats=False), {}, "replaced: follows 0"),
        (
            nn.BatchNorm2d(8, track_running_stats=False),
            {"pretrained": True},
            "skipped: has no running statistics to fold",
        ),
        (nn.GroupNorm(2, 8), {}, "kept: is not a BatchNorm"),
        (nn.InstanceNorm2d(8), {}, "kept: is not a BatchNorm"),
        (nn.BatchNorm2d(8), {"skip": ["1"]}, "skipped: matches the pattern '1' of skip"),
    ],
)
def test_other_norms_stay_with_the_reason(norm, options, reason):
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


def test_the_plan_prints_as_a_table_and_tells_what_convert_does():
    model = nn.Sequential(pair(), nn.Sequential(Own(4, 4, 1)), nn.Linear(2, 2))
    rows = plan(model, block=3)
    header, *lines, counts = str(rows).splitlines()
    assert header.split() == ["layer", "class", "action", "becomes", "reason"]
    assert [line.split()[:3] for line in lines] == [
        ["0.0", "Conv2d", "replaced"],
        ["0.1", "BatchNorm2d", "replaced"],
        ["1.0", "Own", "skipped"],
        ["2", "Linear", "kept"],
    ]
    assert "FastDeconv, blocks of 2, with a bias" in lines[0]
    assert counts == "2 replaced, 1 kept, 1 skipped"
    new = convert(model, block=3)
    for row in rows:
        assert (type(new.get_submodule(row.name)) is not type(row.module)) == (
            row.action == "replaced"
        )
    assert "(all)" in str(plan(nn.Conv2d(1, 1, 1)))


def test_converting_again_changes_nothing():
    once = convert(pair())
    assert repr(convert(once)) == repr(once)
    assert reasons(once) == {"0": "kept: is a deconvolution already"}


class Doubling(nn.Sequential):
    """Counts the calls of its layers by a hook that is a method, and doubles their output."""

    def __init__(self, *layers):
        super().__init__(*layers)
        self.calls = 0
        for layer in layers:
            layer.register_forward_hook(self.double)

    def double(self, module, args, output):
        self.calls += 1
        return 2 * output


def test_forward_hooks_come_along_and_belong_to_the_copy():
    model = stir(Doubling(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)))
    new = convert(model, pretrained=True)
    assert_kept(model, new, torch.randn(2, 4, 5, 5))
    assert model.calls == new.calls == 3


@pytest.mark.parametrize("device", ["meta", "cuda"])
def test_devices_are_kept(device):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() if device == "cuda" else nullcontext():
        conv, norm = nn.Conv2d(4, 8, 1, bias=False, device=device), nn.BatchNorm2d(8, device=device)
        model = nn.Sequential(conv, norm)
        for pretrained in (False, True):
            new = convert(model, pretrained=pretrained)
            tensors = [*new.parameters(), *new.buffers()]
            assert {value.device.type for value in tensors} == {device}


def test_half_precision_is_kept():
    model = stir(pair()).bfloat16()
    new = convert(model, pretrained=True)
    assert {value.dtype for value in new[0].parameters()} == {torch.bfloat16}
    assert_kept(model, new, torch.randn(2, 4, 5, 5, dtype=torch.bfloat16), 0.05)


def test_draws_no_random_numbers_and_makes_what_pickles():
    model, state = stir(nn.Sequential(pair(), PreActivation())), torch.get_rng_state()
    new = convert(model, pretrained=True)
    assert torch.equal(state, torch.get_rng_state())
    again = pickle.loads(pickle.dumps(new)).eval()
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(again[0](x), new.eval()[0](x))
    assert set(convert(model, pretrained=True).state_dict()) == set(new.state_dict())


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (nn.Linear(2, 2), {}, "nothing in Linear can be replaced:\n.*"),
        (
            nn.BatchNorm2d(2),
            {},
            r"nothing in BatchNorm2d can .*\n.*\n.* kept .* no layer .* whitens",
        ),
        (pair(), {"skip": ["0"]}, r"nothing in Sequential can .*\n.*\n.*\n.* kept .* 0, which"),
        (pair(), {"mode": 6}, "mode must be .*6"),
        (pair(), {"block": 0}, "block must be .*0"),
        (pair(), {"skip": ["layer5.*"]}, "skip: no layer of the model matches 'layer5.*'"),
        (pair(), {"skip": "0"}, "skip must be a list of patterns, got '0'"),
        (nn.DataParallel(pair()), {}, "the model is wrapped: DataParallel .*Convert .*'module'"),
    ],
)
def test_bad_input_is_refused_by_name(model, options, message):
    with pytest.raises(ValueError, match=message):
        convert(model, **options)


def test_compiled_parts_are_refused():
    with pytest.raises(ValueError, match="0 is wrapped: OptimizedModule .*'_orig_mod'"):
        plan(nn.Sequential(torch.compile(pair())))


def test_unknown_options_are_refused():
    for function in (plan, convert):
        for name in ("blocks", "stride", "dtype"):
            with pytest.raises(TypeError, match=rf"convert\(\) .*'{name}'"):
                function(pair(), **{name: 16})


def test_statistics_can_be_forgotten():
    layer = FastDeconv(4, 4, 3, mode=1)
    fresh = copy.deepcopy(layer.state_dict())
    layer(torch.randn(2, 4, 8, 8))
    assert not torch.equal(layer.running_mean, fresh["running_mean"])
    layer.reset_running_stats()
    torch.testing.assert_close(dict(layer.state_dict()), dict(fresh), rtol=0, atol=0)


def test_public_names():
    assert {"convert", "plan", "fuse", "FastDeconv", "Delinear"} <= set(deconv.__all__)
    assert all(callable(getattr(deconv, name)) for name in deconv.__all__)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_synchronised_batchnorm_before_a_convolution_is_for_all_dimensions(dims):
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    model = nn.Sequential(nn.SyncBatchNorm(4), nn.ReLU(), conv(4, 6, 3)).eval()
    nn.init.normal_(model[0].running_mean)
    x = torch.randn(4, 4, *(7,) * dims)  # as many images as channels: no shape would tell
    converted = convert(model, pretrained=True)
    torch.testing.assert_close(converted(x), model(x))
    torch.testing.assert_close(fuse(converted)(x), model(x))


class TwoUses(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x)) + F.conv2d(x, self.conv.weight)


def test_pretrained_folds_nothing_into_a_weight_that_is_used_elsewhere():
    model, x = TwoUses().eval(), torch.randn(2, 4, 7, 7)
    nn.init.normal_(model.norm.weight)
    torch.testing.assert_close(convert(model, pretrained=True)(x), model(x))


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x))


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


@pytest.mark.parametrize("model", [ByName(Pair()), ByNumber(nn.Sequential(*Pair().children()))])
def test_pretrained_folds_nothing_that_code_without_a_trace_reaches_into(model):
    nn.init.normal_(next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)).weight)
    x = torch.randn(2, 4, 7, 7)
    torch.testing.assert_close(convert(model.eval(), pretrained=True)(x), model(x))


@pytest.mark.filterwarnings("ignore:.torch.nn.utils:FutureWarning")
@pytest.mark.parametrize(
    "hook",
    [nn.utils.weight_norm, nn.utils.spectral_norm, lambda conv: prune.identity(conv, "bias")],
)
def test_weights_that_hooks_compute_are_copied_and_learn(hook):
    model = nn.Sequential(pair(), hook(nn.Conv2d(8, 4, 1)), nn.BatchNorm2d(4))
    x = torch.randn(2, 4, 5, 5)
    assert_kept(model, convert(stir(model), pretrained=True), x)
    new = convert(model)
    new(x).square().mean().backward()
    assert all(p.grad is not None for p in new.parameters())
    assert_kept(new, fuse(new.eval()), x)


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


def test_filling_the_scale_at_the_start_is_no_use_of_it():
    assert plan(Filled(Pair()))[1].action == "replaced"


@pytest.mark.parametrize("pretrained", [False, True])
def test_what_is_made_in_inference_mode_can_be_trained(pretrained):
    model = stir(nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)))
    with torch.inference_mode():
        new = convert(model, pretrained=pretrained)
        fused = fuse(new.eval())
    for network in (new.train(), fused):
        network(torch.randn(2, 4, 7, 7)).sum().backward()
        assert all(p.grad is not None for p in network.parameters())


@pytest.mark.parametrize(
    ("part", "name", "reason"),
    [
        (WithNorm(), "1.norm", r"is a part of 1, \S*test_convert.WithNorm"),
        (ByHand(), "1.norm", r"\S*test_convert.ByHand uses more than its output"),
        (Unreadable(), "1.bn", r"forward of \S*test_convert.Unreadable cannot be traced"),
        (ConvBn2d(4, 4, 3, qconfig=default_qat_qconfig), "1.bn", r"is a part of 1, \S*ConvBn2d"),
    ],
)
def test_a_batchnorm_stays_with_code_that_cannot_do_without_it(part, name, reason):
    model = stir(nn.Sequential(nn.Conv2d(4, 4, 1), part))
    row = next(row for row in plan(model) if row.name == name)
    assert row.action == "kept" and re.match(reason, row.reason)
    assert_kept(model, convert(model, pretrained=True), torch.randn(2, 4, 5, 5))
    convert(model).train()(torch.randn(2, 4, 5, 5))


@pytest.mark.parametrize("pretrained", [False, True])
def test_reading_a_scale_that_no_trace_shows_fails_aloud(pretrained):
    model = nn.Sequential(nn.Conv2d(4, 4, 1), ByScale(Pair()))
    new = convert(model, pretrained=pretrained)
    with pytest.raises(AttributeError, match="has no attribute 'weight'"):
        new(torch.randn(2, 4, 5, 5))


def test_nothing_is_folded_under_a_forward_without_a_trace():
    row = {row.name: row for row in plan(ByName(Pair()), pretrained=True)}["child.norm"]
    assert row.becomes == "ChannelAffine"
    assert row.reason.endswith("ByName cannot be traced, so child.conv may have other uses")
    kept = reasons(ByName(Pair()), skip=["child.conv"])["child.norm"]
    assert kept == "kept: follows child.conv, which is skipped"
