"""deconv.convert: small models of all kinds, converted and compared."""

import copy
import pickle
import re
from contextlib import nullcontext

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torchvision.models import resnet18
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.video import r3d_18
from torchvision.ops import FrozenBatchNorm2d

import deconv
from deconv import Delinear, FastDeconv, FastDeconv3d, convert, fuse, plan
from deconv.surgery.batchnorm import ChannelAffine
from deconv.whitening import Whitening
from tests.deconv.surgery.helpers import (
    TOLERANCE,
    PreActivation,
    actions,
    assert_kept,
    pair,
    randomize,
    reasons,
)
from tests.pairwise import loop_over, pairwise
from util.data.embedded_sets import read_fashion_mini


def test_a_pair_becomes_a_deconvolution_and_an_identity():
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


@loop_over(
    "geometry",
    [
        dict(kernel_size=(3, 2), stride=(2, 1), padding=(2, 0)),
        dict(kernel_size=3, dilation=2, padding="same", groups=2),
        dict(kernel_size=1, stride=2, padding="valid", groups=4, bias=False),
    ],
)
def test_a_convolution_keeps_its_geometry_and_parameters(geometry):
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


@loop_over("bias", [True, False])
def test_a_bias_replaces_the_shift_of_batchnorm(bias):
    model = pair()
    model[0].weight.requires_grad_(False)
    new = convert(model, bias=bias)[0].bias
    assert (new is not None) == bias
    assert not bias or (not new.any() and not new.requires_grad)
    assert convert(nn.Sequential(nn.Conv2d(3, 4, 1, bias=False)))[0].bias is None  # had no shift


@loop_over(
    ("bias", "channels_last", "affine", "dtype"),
    pairwise([True, False], [True, False], [True, False], list(TOLERANCE)),
)
def test_pretrained_folds_the_batchnorm_before_training_starts(bias, channels_last, affine, dtype):
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2, bias=bias),
        nn.BatchNorm2d(8, affine=affine),
    )
    randomize(model).to(dtype)
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


def test_layers_take_their_input_by_the_keyword_of_torch():
    class Keywords(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)
            self.up, self.head = nn.ConvTranspose2d(4, 4, 2, 2), nn.Linear(4, 2)

        def forward(self, x):
            maps = self.up(input=self.conv(input=self.norm(input=x)), output_size=[15, 15])
            return self.head(input=maps.mean((2, 3)))

    model, x = Keywords().eval(), torch.randn(4, 3, 9, 9)
    converted = convert(model, linear=True, pretrained=True)
    assert type(converted.norm) is ChannelAffine
    torch.testing.assert_close(converted(x), model(x))
    converted.train()(x).sum().backward()
    torch.testing.assert_close(fuse(converted.eval())(x), converted(x))


def test_without_pretrained_the_weights_stay_as_they_are():
    model = randomize(pair(bias=True))
    new = convert(model)[0]
    assert torch.equal(new.weight, model[0].weight) and torch.equal(new.bias, model[0].bias)


@loop_over("norm", [nn.SyncBatchNorm, FrozenBatchNorm2d])
def test_sync_and_frozen_batchnorms_are_replaced(norm):
    model = randomize(pair(norm=norm)).eval()
    assert type(convert(model)[1]) is nn.Identity
    new = convert(model, pretrained=True)
    x = torch.randn(2, 4, 6, 6)
    folded = F.batch_norm(
        model[0](x), model[1].running_mean, model[1].running_var, model[1].weight, model[1].bias
    )
    torch.testing.assert_close(new[:2](x), folded, rtol=1e-4, atol=1e-5)


@loop_over("inplace", [True, False])
def test_preactivation_batchnorm_is_replaced_and_the_shortcut_unchanged(inplace):
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


def test_pretrained_keeps_an_affine_map_that_cannot_be_folded():
    model = randomize(nn.Sequential(PreActivation(), PreActivation()))
    model[1].bn1.requires_grad_(False)
    new = convert(model, pretrained=True)
    assert_kept(model, new, torch.randn(2, 4, 6, 6))
    assert [type(new[0].bn1), type(new[0].bn2)] == [ChannelAffine, nn.Identity]
    assert new[0].bn1.scale.requires_grad and not new[1].bn1.scale.requires_grad
    fused = fuse(new)
    assert_kept(new, fused, torch.randn(2, 4, 6, 6), 1e-5)
    assert not any(kind in pickle.dumps(fused[1]) for kind in (b"ChannelAffine", b"FastDeconv"))


def test_the_second_of_two_batchnorms_becomes_an_affine_map():
    model = randomize(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)))
    new = convert(model, pretrained=True)
    assert [type(module) for module in new[1:]] == [nn.Identity, ChannelAffine]
    assert_kept(model, new, torch.randn(2, 4, 5, 5))


def test_shared_layers_stay_shared():
    conv, norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
    model = nn.Sequential(conv, norm, nn.Sequential(conv, norm))
    model.order = [conv]  # where nn.Module does not look
    new = convert(model)
    assert type(new[0]) is FastDeconv and new[0] is new[2][0] is new.order[0]
    assert new[1] is new[2][1]
    assert len(plan(model)) == 2
    assert_kept(randomize(model), convert(model, pretrained=True), torch.randn(2, 4, 5, 5))


@loop_over("pretrained", [False, True])
def test_tied_weights_stay_tied(pretrained):
    conv = nn.Conv2d(4, 4, 1)
    layers = [nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)]
    model = randomize(nn.Sequential(*layers, conv, nn.BatchNorm2d(4), nn.Sequential(conv)))
    model[2].weight = model[0].weight
    model.register_parameter("weight_of_last", conv.weight)
    new = convert(model, pretrained=pretrained)
    assert new[0].weight is new[2].weight and new[4] is new[6][0]
    assert new[4].weight is new.weight_of_last
    if pretrained:
        assert reasons(model, pretrained=True)["1"] == (
            "replaced: 0 shares its weight, which stays tied"
        )
        assert_kept(model, new, torch.randn(2, 4, 5, 5))


def test_the_plan_says_where_a_scale_is_tied_no_longer():
    model = randomize(nn.Sequential(*pair()[:2], nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)))
    model[3].weight = model[1].weight
    assert (
        reasons(model, pretrained=True)["1"]
        == "replaced: folded into 0; its weight is no longer tied"
    )
    assert_kept(model, convert(model, pretrained=True), torch.randn(2, 4, 5, 5))


def test_the_linear_layer_that_ends_the_model_is_replaced():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(1), nn.Linear(4, 6), nn.Linear(6, 2))
    kinds = [type(module) for module in convert(model, block_linear=3)]
    assert kinds == [FastDeconv, nn.Flatten, nn.Linear, Delinear]
    head = convert(model, block_linear=3, eps=0.5, layout="contiguous")[-1]
    assert (head.block, head.eps, head.layout) == (3, 0.5, "contiguous")
    assert torch.equal(head.weight, model[-1].weight) and torch.equal(head.bias, model[-1].bias)
    assert type(convert(model, linear=False)[-1]) is nn.Linear
    named = convert(model, linear=["2"])
    assert [type(module) for module in named[2:]] == [Delinear, nn.Linear]
    model.append(nn.modules.linear.NonDynamicallyQuantizableLinear(2, 2))  # has code of its own
    assert [actions(model)[name][0] for name in "234"] == ["kept", "kept", "skipped"]


class Gated(nn.Module):
    """A gate of the channels at the end, as a squeeze-excitation has it."""

    def __init__(self):
        super().__init__()
        self.conv, self.gate = nn.Conv2d(3, 4, 1), nn.Linear(4, 4)

    def forward(self, x):
        x = self.conv(x)
        return x * self.gate(x.mean((2, 3))).sigmoid()[..., None, None]


class TwoHeads(nn.Module):
    """A network that tells a policy and a value, and an output that only training needs."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.policy = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Dropout(), nn.Linear(4, 2))
        self.value, self.extra = nn.Linear(4, 1), nn.Linear(4, 1)

    def forward(self, x):
        x = self.body(x)
        outputs = {"policy": self.policy(x).log_softmax(1), "value": 2 * self.value(x)[:, 0]}
        return {**outputs, "extra": self.extra(x)} if self.training else outputs


class Unseen(TwoHeads):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else None


@loop_over(
    ("model", "replaced"),
    [
        (Gated(), []),
        (TwoHeads(), ["policy.3", "value"]),
        (Unseen(), []),
        (nn.Sequential(nn.Linear(2, 12), nn.Unflatten(1, (3, 2, 2)), nn.Conv2d(3, 1, 1)), []),
        (nn.Sequential(TwoHeads().body, nn.Linear(4, 2), nn.BatchNorm1d(2)), []),
        (nn.Sequential(nn.Linear(2, 2)), []),
    ],
)
def test_linear_layers_elsewhere_stay_and_can_be_named(model, replaced):
    rows = [row for row in plan(model) if isinstance(row.module, nn.Linear)]
    assert [row.name for row in rows if row.action == "replaced"] == replaced
    for row in rows:
        if row.action == "kept":
            remedy = re.search(r"linear=(\[.*\]) replaces it", row.reason)[1]
            assert type(convert(model, linear=eval(remedy)).get_submodule(row.name)) is Delinear


def test_batchnorm_after_the_last_linear_layer_is_folded():
    model = randomize(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)))
    model.insert(0, nn.Sequential(nn.Conv2d(4, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    assert actions(model)["2"] == ("kept", "")
    shorter = model[:3]
    new = convert(shorter, linear=["1"], pretrained=True)
    assert type(new[2]) is nn.Identity
    assert_kept(shorter, new, torch.randn(3, 4, 5, 5))


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


def test_forward_hooks_are_bound_to_the_copy():
    model = randomize(Doubling(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)))
    new = convert(model, pretrained=True)
    assert_kept(model, new, torch.randn(2, 4, 5, 5))
    assert model.calls == new.calls == 3


@loop_over("device", ["meta", "cuda"])
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
    model = randomize(pair()).bfloat16()
    new = convert(model, pretrained=True)
    assert {value.dtype for value in new[0].parameters()} == {torch.bfloat16}
    assert_kept(model, new, torch.randn(2, 4, 5, 5, dtype=torch.bfloat16), 0.05)


def test_converting_draws_no_random_numbers_and_pickles():
    model, state = randomize(nn.Sequential(pair(), PreActivation())), torch.get_rng_state()
    new = convert(model, pretrained=True)
    assert torch.equal(state, torch.get_rng_state())
    again = pickle.loads(pickle.dumps(new)).eval()
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(again[0](x), new.eval()[0](x))
    assert set(convert(model, pretrained=True).state_dict()) == set(new.state_dict())


@loop_over(
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
        (pair(), {"linear": "0"}, "linear must be a list of patterns, got '0'"),
        (pair(), {"linear": ["fc"]}, "linear: no layer of the model matches 'fc'"),
        (nn.DataParallel(pair()), {}, "the model is wrapped: DataParallel .*Convert .*'module'"),
    ],
)
def test_bad_input_is_refused_by_name(model, options, message):
    with pytest.raises(ValueError, match=message):
        convert(model, **options)


def test_running_statistics_can_be_reset():
    layer = FastDeconv(4, 4, 3, mode=1)
    fresh = copy.deepcopy(layer.state_dict())
    layer(torch.randn(2, 4, 8, 8))
    assert not torch.equal(layer.running_mean, fresh["running_mean"])
    layer.reset_running_stats()
    torch.testing.assert_close(dict(layer.state_dict()), dict(fresh), rtol=0, atol=0)


def test_public_names():
    assert {"convert", "plan", "fuse", "FastDeconv", "Delinear"} <= set(deconv.__all__)
    assert all(hasattr(deconv, name) for name in deconv.__all__)


@loop_over("dims", [1, 2, 3])
def test_sync_batchnorm_takes_the_dimensions_of_the_convolutions(dims):
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    model = nn.Sequential(nn.SyncBatchNorm(4), nn.ReLU(), conv(4, 6, 3)).eval()
    nn.init.normal_(model[0].running_mean)
    x = torch.randn(4, 4, *(7,) * dims)  # as many images as channels: no shape would tell
    converted = convert(model, pretrained=True)
    torch.testing.assert_close(converted(x), model(x))
    torch.testing.assert_close(fuse(converted)(x), model(x))


@pytest.mark.filterwarnings("ignore:.torch.nn.utils:FutureWarning")
@loop_over(
    "hook",
    [nn.utils.weight_norm, nn.utils.spectral_norm, lambda conv: prune.identity(conv, "bias")],
)
def test_weights_computed_by_hooks_are_copied_and_train(hook):
    model = nn.Sequential(pair(), hook(nn.Conv2d(8, 4, 1)), nn.BatchNorm2d(4))
    x = torch.randn(2, 4, 5, 5)
    assert_kept(model, convert(randomize(model), pretrained=True), x)
    new = convert(model)
    new(x).square().mean().backward()
    assert all(p.grad is not None for p in new.parameters())
    assert_kept(new, fuse(new.eval()), x)


class Remembering(nn.Sequential):
    """Leaves activations in attributes, as CorrBlock of raft_small does."""

    def forward(self, x):
        self.last = {"outputs": [super().forward(x)]}
        return self.last["outputs"][0]


def test_activations_in_attributes_are_copied():
    model, x = Remembering(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)), torch.randn(2, 4, 7, 7)
    model(x).sum().backward()
    new = convert(model)
    new(x).sum().backward()
    assert_kept(new, fuse(new.eval()), x)


@loop_over("pretrained", [False, True])
def test_a_copy_made_in_inference_mode_can_be_trained(pretrained):
    model = randomize(nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)))
    with torch.inference_mode():
        new = convert(model, pretrained=pretrained)
        fused = fuse(new.eval())
    for network in (new.train(), fused):
        network(torch.randn(2, 4, 7, 7)).sum().backward()
        assert all(p.grad is not None for p in network.parameters())


def test_video_networks_are_converted_whole():
    """Their convolutions are subclasses with a constructor of their own."""
    model, x = r3d_18(num_classes=3), torch.randn(2, 3, 4, 16, 16)
    new = convert(randomize(model).double(), pretrained=True)
    assert sum(isinstance(module, FastDeconv3d) for module in new.modules()) == 20
    assert_kept(model, new, x.double(), 1e-9)


@loop_over("train", [False, True])
def test_fx_traces_a_converted_network_with_our_layers_as_leaves(train):
    network = randomize(resnet18(num_classes=5))
    model = convert(network, pretrained=train, linear=True).train(train)
    names = {n for n, m in model.named_modules() if isinstance(m, Whitening)}
    x, nodes = torch.randn(4, 3, 64, 64), {"layer4": "maps", "fc": "scores"}
    expected = copy.deepcopy(model)
    graph = fx.symbolic_trace(model)
    assert names == {
        node.target
        for node in graph.graph.nodes
        if node.op == "call_module" and isinstance(graph.get_submodule(node.target), Whitening)
    }
    extractor = create_feature_extractor(copy.deepcopy(model), nodes)
    scores = expected(x)
    torch.testing.assert_close(graph(x), scores, rtol=0, atol=0)
    torch.testing.assert_close(extractor(x)["scores"], scores, rtol=0, atol=0)
    statistics = {n: b for n, b in expected.named_buffers() if "running" in n}
    torch.testing.assert_close(
        {n: b for n, b in graph.named_buffers() if n in statistics}, statistics, rtol=0, atol=0
    )


def train(model, images, labels, batch=64, steps=12):
    """Return the losses of SGD at learning rate 0.1 and momentum 0.9."""
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1, momentum=0.9)
    losses = []
    for step in range(steps):
        chosen = torch.arange(step * batch, (step + 1) * batch) % len(images)
        loss = F.cross_entropy(model(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def read_images(side):
    """Return the images of Fashion-MNIST in this repository, in colour and standardised."""
    (images, labels), _ = read_fashion_mini()
    images = torch.from_numpy(images[:, None]).float().expand(-1, 3, -1, -1)
    images = F.interpolate((images - images.mean()) / images.std(), size=(side, side))
    return images, torch.from_numpy(labels).long()


def test_a_network_converted_by_default_trains_at_the_recommended_rate():
    torch.manual_seed(0)
    network, (images, labels) = resnet18(num_classes=10), read_images(32)
    losses = train(convert(network), images, labels)
    assert max(losses) < 4 and sum(losses[-3:]) / 3 < 1.5, losses
    diverging = train(convert(network, linear=False), images, labels, steps=6)
    assert max(diverging) > 2 * max(losses)


@pytest.mark.slow
@loop_over("seed", range(3))
def test_a_network_converted_by_default_trains_on_larger_images(seed):
    torch.manual_seed(seed)
    images, labels = read_images(64)
    losses = train(convert(resnet18()), images, labels, steps=60)  # 1000 classes, as in the README
    assert sum(losses[-5:]) / 5 < 1, losses  # after 40 steps, one of three seeds exceeds 1
