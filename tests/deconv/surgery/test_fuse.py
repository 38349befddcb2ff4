"""deconv.fuse: the same outputs from plain layers, whatever the network."""

import copy
import pickle
from contextlib import nullcontext
from types import MethodType

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations, prune

from deconv import Delinear, FastDeconv, convert, fuse, plan, recalibrate
from models import build_model, make_layers
from tests.pairwise import loop_over, pairwise

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def trained(model, *shape):
    """The model in evaluation after two batches, of the dtype of its parameters; and a third."""
    torch.manual_seed(0)
    like = next(model.parameters())
    for _ in range(2):
        model(2 * torch.randn(shape).to(like) + 1)
    return model.eval(), torch.randn(shape).to(like)


def network():
    layers = [FastDeconv(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return trained(nn.Sequential(nn.Sequential(*layers), Delinear(4, 2)), 8, 3, 9, 9)


def assert_plain(model):
    assert {type(m) for m in model.modules()} & {nn.Conv2d, nn.Linear}
    assert b"deconv" not in pickle.dumps(model)


GEOMETRIES = [
    dict(kernel_size=3, padding=1),
    dict(kernel_size=(3, 2), stride=(2, 1), padding=(2, 0), bias=False),
    dict(kernel_size=3, dilation=2, padding="same", groups=2),
    dict(kernel_size=(4, 1), padding="same", layout="contiguous", shared=False),
    dict(kernel_size=1, stride=2, padding="valid", groups=4),
]


@loop_over(
    ("geometry", "mode", "dtype", "channels_last"),
    pairwise(GEOMETRIES, [1, 2, 3, 4, 5], list(TOLERANCE), [False, True]),
)
def test_a_convolution_keeps_its_outputs(geometry, mode, dtype, channels_last):
    layer = FastDeconv(4, 8, mode=mode, block=2, dtype=dtype, **geometry)
    if channels_last:
        layer.to(memory_format=torch.channels_last)
    layer, x = trained(layer, 5, 4, 9, 11)
    plain = fuse(layer)
    assert type(plain) is nn.Conv2d and plain.bias is not None
    assert plain.weight.stride() == layer.weight.stride() and plain.weight.dtype == dtype
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(plain(x), layer(x), rtol=tolerance, atol=tolerance)
    assert_plain(plain)


@loop_over("dtype", TOLERANCE)
@loop_over("bias", [True, False])
def test_a_linear_layer_keeps_its_outputs(bias, dtype):
    layer, x = trained(Delinear(12, 5, bias, block=4, dtype=dtype), 7, 6, 12)
    plain = fuse(layer)
    assert type(plain) is nn.Linear
    torch.testing.assert_close(plain(x), layer(x), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert_plain(plain)


@pytest.mark.parametrize(
    ("arch", "size"),
    [("vgg11", 32), ("resnet18", 32), ("densenet121", 32), ("simple_v1", 12), ("mlp", 12)],
)
def test_a_network_keeps_its_outputs_and_the_input_is_untouched(arch, size):
    """Whole images are the features of simple_v1 and mlp: 432 at side 12, 3072 at side 32."""
    layers = make_layers(deconv=True)
    built = build_model(arch, layers, in_channels=3, num_classes=10, image_size=size)
    model, x = trained(built, 4, 3, size, size)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fused = fuse(model)
    torch.testing.assert_close(fused(x), model(x), rtol=1e-5, atol=1e-5)
    assert_plain(fused)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert any(isinstance(module, FastDeconv | Delinear) for module in model.modules())


def test_fusing_again_changes_nothing():
    model, x = network()
    once = fuse(model)
    twice = fuse(once)
    assert twice is not once and repr(twice) == repr(once)
    torch.testing.assert_close(twice(x), once(x), rtol=0, atol=0)


def test_what_is_shared_stays_shared():
    layer = FastDeconv(3, 3, 3, padding=1)
    model = nn.Sequential(layer, nn.Sequential(layer))
    model.order = [layer]  # where nn.Module does not look
    fused = fuse(model.eval())
    assert type(fused[0]) is nn.Conv2d and fused[0] is fused[1][0] is fused.order[0]


def test_requires_grad_is_kept_and_a_new_bias_follows_its_weight():
    model = nn.Sequential(FastDeconv(3, 4, 3), FastDeconv(4, 4, 3, bias=False)).eval()
    model[0].weight.requires_grad_(False)
    model[1].requires_grad_(False)
    flags = {name: value.requires_grad for name, value in fuse(model).named_parameters()}
    expected = {"0.weight": False, "0.bias": True, "1.weight": False, "1.bias": False}
    assert flags == expected


@loop_over("device", ["meta", "cuda"])
def test_devices_are_kept(device):
    with nullcontext() if device == "meta" else FakeTensorMode():
        layers = FastDeconv(3, 4, 3, device=device), Delinear(5, 2, device=device)
        model = nn.Sequential(*layers).eval()
        assert {value.device.type for value in fuse(model).parameters()} == {device}


def test_folds_in_full_precision_under_autocast_and_draws_no_random_numbers():
    model, x = network()
    expected, state = fuse(model)(x), torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16):
        fused = fuse(model)
    torch.testing.assert_close(fused(x), expected, rtol=0, atol=0)
    assert torch.equal(state, torch.get_rng_state())


@loop_over(("part", "name"), [("", "the model"), ("0.0", "0.0"), ("1", "1")])
def test_training_mode_is_refused_by_name(part, name):
    model, _ = network()
    model.get_submodule(part).training = True
    with pytest.raises(ValueError, match=rf"^{name} \(\w+\) is in training mode"):
        fuse(model)


def test_other_layers_may_be_in_training_mode():
    model = nn.Sequential(FastDeconv(3, 4, 1), nn.Dropout()).eval()
    model[1].train()
    assert fuse(model)[1].training


@pytest.fixture
def process_group():
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("wrap", [nn.parallel.DistributedDataParallel, torch.compile])
def test_wrapped_models_and_parts_are_refused_with_the_way_out(wrap, process_group):
    model, _ = network()
    wrapped = wrap(model).eval()
    with pytest.raises(ValueError, match="the model is wrapped") as error:
        fuse(wrapped)
    attribute = error.value.args[0].split("'")[1]
    assert getattr(wrapped, attribute) is model
    with pytest.raises(ValueError, match="0 is wrapped"):
        fuse(nn.Sequential(wrapped).eval())


def test_sharded_models_are_refused_with_the_way_out_and_recalibrated(process_group):
    model, x = network()
    sharded = copy.deepcopy(model)
    fully_shard(sharded[0])
    fully_shard(sharded)
    for function, verb in ((fuse, "Fuse"), (convert, "Convert"), (plan, "Convert")):
        with pytest.raises(ValueError, match=rf"0.0.weight is a DTensor.*\. {verb} .* before"):
            function(sharded)
    with pytest.raises(ValueError, match="^weight is a DTensor.* Fuse .* before"):
        sharded[0][0].fuse()
    for each in (model, sharded):
        assert recalibrate(each, [x + 1]) == 1
    assert torch.equal(sharded[0][0].running_cov_joint, model[0][0].running_cov_joint)
    torch.testing.assert_close(sharded(x), model(x))


class Counting(nn.Sequential):
    """Counts the calls of its first layer by a hook that is a method, and doubles its output."""

    def __init__(self, *layers):
        super().__init__(*layers)
        self.calls = 0
        self[0].register_forward_hook(self.double)

    def double(self, module, args, output):
        self.calls += 1
        return 2 * output


def test_forward_hooks_come_along_and_belong_to_the_copy():
    model, x = trained(Counting(FastDeconv(3, 4, 3)), 5, 3, 9, 9)
    fused = fuse(model)
    (hook,) = fused[0]._forward_hooks.values()
    assert isinstance(hook, MethodType) and hook.__self__ is fused
    torch.testing.assert_close(fused(x), model(x))
    assert model.calls == fused.calls
    assert fuse(fused)[0]._forward_hooks
    model[0]._forward_hooks.clear()
    assert fused[0]._forward_hooks


def test_computed_weights_are_folded_or_refused():
    layer, x = trained(parametrizations.weight_norm(FastDeconv(3, 4, 3)), 5, 3, 9, 9)
    torch.testing.assert_close(fuse(layer)(x), layer(x))
    layer, x = trained(prune.random_unstructured(FastDeconv(3, 4, 3), "weight", 0.5), 5, 3, 9, 9)
    with pytest.raises(ValueError, match="permanent"):
        fuse(layer)
    prune.remove(layer, "weight")
    torch.testing.assert_close(fuse(layer)(x), layer(x))


def test_layers_can_be_fused_one_by_one_before_evaluation():
    """As timm's reparameterize_model does."""
    model, x = network()
    model.train()
    fused = nn.Sequential(model[0][0].fuse(), *model[0][1:], model[1].fuse())
    assert all(module.training for module in fused.modules())
    torch.testing.assert_close(fused.eval()(x), model.eval()(x))


@loop_over("name", ["weight", "bias", "running_mean", "running_cov_joint"])
@torch.no_grad()
def test_evaluation_follows_edits_that_no_version_counter_tells_of(name):
    layer, x = trained(FastDeconv(3, 4, 3), 5, 3, 9, 9)
    tensor = getattr(layer, name)
    edits = [lambda: tensor.data.mul_(2), lambda: tensor.detach().numpy().__imul__(2)]
    if name in ("weight", "bias"):
        tensor.grad = torch.ones_like(tensor)
        edits.append(torch.optim.SGD([tensor], lr=1.0, fused=True).step)
    for edit in edits:
        before, version = layer(x), tensor._version
        edit()
        assert tensor._version == version and not torch.allclose(layer(x), before)
        torch.testing.assert_close(layer(x), fuse(layer)(x))


def test_timm_fuses_the_layers_by_the_same_name():
    reparameterize = pytest.importorskip("timm.utils.model").reparameterize_model
    model, x = network()
    fused = reparameterize(model)
    torch.testing.assert_close(fused(x), model(x), rtol=1e-5, atol=1e-5)
    assert_plain(fused)


def test_a_converted_network_is_plain_again():
    torch.manual_seed(0)
    block = [nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)]
    model = convert(nn.Sequential(*block), pretrained=True)
    with torch.no_grad():
        model[0].scale.uniform_()
        model[0].shift.uniform_()
    model, x = trained(model.double(), 5, 3, 9, 9)
    fused = fuse(model)
    assert [type(m) for m in fused] == [nn.Conv2d, nn.ReLU, nn.Conv2d, nn.Identity]
    torch.testing.assert_close(fused(x), model(x), rtol=1e-10, atol=1e-10)
    assert_plain(fused)
