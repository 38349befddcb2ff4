"""Half and double precision, memory formats, and fake devices."""

import ast
from pathlib import Path

import torch
from torch import nn

import deconv
from deconv import Delinear, FastDeconv
from deconv.ops.inverse_sqrt import ROOTS
from deconv.surgery.plan import DECONVOLUTIONS
from tests.pairwise import loop_over, pairwise

HALF = [torch.bfloat16, torch.float16]
LAYERS = {
    "conv": (lambda **more: FastDeconv(4, 6, 3, padding=1, **more), (6, 4, 7, 7)),
    "newton": (lambda **more: FastDeconv(4, 6, 3, root="newton", **more), (6, 4, 7, 7)),
    "resolvent": (lambda **more: FastDeconv(4, 6, 3, root="resolvent", **more), (6, 4, 7, 7)),
    "small map": (lambda **more: FastDeconv(4, 64, 3, mode=3, **more), (6, 4, 5, 5)),
    "up": (lambda **more: deconv.FastDeconvTranspose2d(4, 6, 4, 2, 1, **more), (6, 4, 5, 5)),
    "volume": (lambda **more: deconv.FastDeconv3d(4, 6, 2, **more), (6, 4, 5, 5, 4)),
    "linear": (lambda **more: Delinear(9, 6, **more), (20, 9)),
    "few rows": (lambda **more: Delinear(30, 6, **more), (8, 30)),
}


def make(name, **options):
    torch.manual_seed(0)
    layer, shape = LAYERS[name]
    return layer(**options), 300 * torch.randn(shape) + 100  # squares overflow float16


def learn(layer, x, dtype=None):
    """Return output and gradients of a training step as float32, then the output in evaluation."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        y = layer(x)
    (y.float() - 1).square().mean().backward()
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        after = layer.eval()(x)
    assert after.dtype == y.dtype
    return y, [value.float() for value in (y, after, layer.weight.grad, layer.bias.grad)]


def assert_close(given, expected, share):
    for one, other in zip(given, expected, strict=True):
        atol = share * other.abs().max().item()
        torch.testing.assert_close(one, other, rtol=0, atol=atol)


@loop_over("dtype", HALF)
@loop_over("name", LAYERS)
def test_autocast_computes_statistics_in_float32(dtype, name):
    layer, x = make(name)
    _, expected = learn(layer, x)
    other, _ = make(name)
    y, given = learn(other, x, dtype)
    assert y.dtype == dtype and other.weight.grad.dtype == torch.float32
    assert_close(given, expected, 0.1)
    for key, value in layer.named_buffers():
        torch.testing.assert_close(other.get_buffer(key), value)


@loop_over("dtype", HALF)
@loop_over("name", LAYERS)
def test_a_network_that_was_cast_learns(dtype, name):
    layer, x = make(name)
    _, expected = learn(layer, x)
    other, _ = make(name)
    y, given = learn(other.to(dtype), x.to(dtype))
    kinds = {value.dtype for value in [y, *other.parameters(), other.weight.grad]}
    assert kinds == {dtype}
    assert {value.dtype for value in other.buffers()} == {torch.float32, torch.int64}
    made = LAYERS[name][0](dtype=dtype)  # no other than one that was cast
    assert [value.dtype for value in made.buffers()] == [value.dtype for value in other.buffers()]
    assert_close(given, expected, 0.1)


@loop_over("name", LAYERS)
def test_double_precision_is_kept_throughout(name):
    layer, x = make(name, dtype=torch.float64)
    y = layer(x.double())
    assert y.dtype == layer.running_mean.dtype == torch.float64
    single, _ = make(name)
    single.load_state_dict({key: value.float() for key, value in layer.state_dict().items()})
    difference = (single.eval()(x).double() - layer.eval()(x.double())).abs().max()
    assert 0 < difference < 1e-4 * y.abs().max()


@loop_over("training", [True, False])
@loop_over("name", ["conv", "up", "volume"])
def test_channels_last_is_kept(name, training):
    layer, x = make(name)
    expected = layer.train(training)(x)
    last = torch.channels_last_3d if x.dim() == 5 else torch.channels_last
    x = x.to(memory_format=last).requires_grad_()
    y = layer.to(memory_format=last)(x)
    assert y.is_contiguous(memory_format=last) and layer.weight.is_contiguous(memory_format=last)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    y.sum().backward()
    assert x.grad.is_contiguous(memory_format=last)


@loop_over("name", LAYERS)
def test_the_gradient_of_a_broadcast_output(name):
    layer, x = make(name)
    gradients = []
    for weight in (torch.ones(()), torch.ones_like(layer(x))):
        given = x.clone().requires_grad_()
        gradients += torch.autograd.grad((layer(given) * weight).sum(), given)
    torch.testing.assert_close(*gradients)


def test_no_code_asks_for_a_device_of_one_kind():
    """`device.type == "cpu"` chooses a faster way; anything else must do on every device."""
    for path in Path(deconv.__file__).parent.rglob("*.py"):
        if path.name == "precision.py":  # names settings of torch
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            assert not (isinstance(node, ast.Attribute) and node.attr in ("cuda", "mps", "xla"))
            text = isinstance(node, ast.Constant) and isinstance(node.value, str)
            assert not (text and node.value.partition(":")[0] in ("cuda", "mps", "xla"))


@loop_over("kind", [*DECONVOLUTIONS, nn.Linear])
def test_layers_made_without_memory_take_up_a_state(kind):
    make_layer = DECONVOLUTIONS[kind] if kind is not nn.Linear else lambda i, o, _: Delinear(i, o)
    layer = make_layer(4, 6, 3)
    x = torch.randn(3, 4, *(5,) * (layer.weight.dim() - 2))
    layer(x)
    with torch.device("meta"):
        blank = make_layer(4, 6, 3)
        assert blank(x.to("meta")).shape == layer(x).shape
    assert all(value.is_meta for value in [*blank.parameters(), *blank.buffers()])
    blank.to_empty(device="cpu").load_state_dict(layer.state_dict())
    torch.testing.assert_close(blank.eval()(x), layer.eval()(x), rtol=0, atol=0)


OPTIONS = [
    *(dict(root=root) for root in ROOTS),
    dict(rows_per_feature=1, groups=2, bias=False),
]


@loop_over(("kind", "mode", "options"), pairwise([*DECONVOLUTIONS], [1, 2, 3, 4, 5], OPTIONS))
def test_a_forward_on_a_fake_gpu_mixes_no_devices(kind, mode, options):
    from torch._subclasses.fake_tensor import FakeTensorMode

    make_layer = DECONVOLUTIONS[kind]
    with FakeTensorMode(allow_non_fake_inputs=False):
        layer = make_layer(4, 6, 3, 2, 1, mode=mode, block=2, **options, device="cuda")
        x = torch.randn(3, 4, *(6,) * (layer.weight.dim() - 2), device="cuda")
        for training in (True, False):
            y = layer.train(training)(x)
            assert y.device.type == "cuda" and y.shape == kind.forward(layer, x).shape
        assert {value.device.type for value in layer.buffers()} == {"cuda"}


def test_a_sum_beyond_half_precision_is_no_reason_to_forget_a_batch():
    layer = FastDeconv(3, 512, 3).half()
    nn.init.constant_(layer.bias, 200)  # 512 of which are more than 65504
    layer(torch.randn(2, 3, 8, 8).half())
    assert layer.num_batches_tracked == 1


def test_a_layer_made_without_memory_can_start_anew():
    layer = FastDeconv(3, 4, 3, device="meta").to_empty(device="cpu")
    for buffer in layer.buffers():
        buffer.fill_(7)  # whatever was there
    layer.reset_parameters()
    x = torch.randn(2, 3, 8, 8)
    plain = nn.functional.conv2d(x, layer.weight, layer.bias)
    torch.testing.assert_close(layer.eval()(x), plain)


def test_statistics_assigned_in_half_precision_become_float32():
    state = FastDeconv(3, 4, 3).state_dict()
    half = {
        name: value.half() if value.is_floating_point() else value for name, value in state.items()
    }
    layer = FastDeconv(3, 4, 3)
    layer.load_state_dict(half, assign=True)
    assert layer.weight.dtype == torch.float16 and layer.running_mean.dtype == torch.float32
    layer(300 * torch.randn(2, 3, 8, 8).half())
    assert layer.eval()(torch.randn(2, 3, 8, 8).half()).isfinite().all()


def test_bfloat16_costs_inputs_of_a_large_mean_what_the_page_says():
    def batchnorm():
        return nn.Sequential(nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32))

    for make_layer, size, mean, error in (
        (lambda: FastDeconv(16, 32, 3), (32, 16, 12, 12), 100, 0.26),
        (batchnorm, (32, 16, 12, 12), 100, 0.2),
        (lambda: FastDeconv(16, 32, 3), (32, 16, 12, 12), 3, 0.01),
        (lambda: Delinear(64, 32), (256, 64), 100, 0.42),
    ):
        torch.manual_seed(0)
        mixing = torch.randn(size[1], size[1]) / 8 if len(size) == 2 else torch.eye(size[-1])
        layer, images = make_layer(), mean + torch.randn(size) @ mixing  # correlated features
        exact = layer(images)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = layer(images)
        share = (rounded - exact).norm() / exact.norm()
        assert 0.8 * error < share < 1.25 * error, (layer, mean, share)
