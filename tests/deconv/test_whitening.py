"""Batch and running statistics of all layers, in training and evaluation."""

import pytest
import torch
from torch import nn

from deconv import Delinear, FastDeconv
from deconv.conv import MODES, ROOTS
from deconv.ops.inverse_sqrt import inverse_sqrt
from tests.oracle import images
from tests.pairwise import loop_over


@pytest.fixture(autouse=True)
def _double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@loop_over("mode", MODES)
def test_eval_before_training_is_the_plain_convolution(mode):
    layer = FastDeconv(6, 8, (3, 5), 2, 1, groups=2, mode=mode).eval()
    x = images(c=6)
    torch.testing.assert_close(layer(x), nn.Conv2d.forward(layer, x))
    linear = Delinear(6, 3).eval()
    torch.testing.assert_close(linear(x[:, :, 0, 0]), nn.Linear.forward(linear, x[:, :, 0, 0]))


@loop_over("mode", MODES)
def test_eval_after_one_batch_equals_training_on_it(mode):
    layer = FastDeconv(4, 3, 3, padding=1, mode=mode, block=2)
    x = images()
    y = layer(x)
    torch.testing.assert_close(layer.eval()(x), y)


@pytest.mark.parametrize(("momentum", "weights"), [(0.1, (0.81, 0.09, 0.1)), (None, (1 / 3,) * 3)])
def test_later_batches_enter_with_the_momentum_in_float64(momentum, weights):
    torch.set_default_dtype(torch.float32)
    layer = FastDeconv(4, 3, 3, momentum=momentum).double()
    expected = 0
    for scale, weight in zip((1, 2, 3), weights, strict=True):
        single, x = FastDeconv(4, 3, 3).double(), scale * images().double()
        layer(x), single(x)
        expected = expected + weight * single.running_cov_joint
    torch.testing.assert_close(layer.running_cov_joint, expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("root", ROOTS)
def test_evaluation_whitens_by_the_root_of_the_average_covariance(root):
    layer = FastDeconv(4, 3, 3, root=root, momentum=0.25, bias=False)
    for scale in 1, 3:
        layer(scale * images())
    whiten = inverse_sqrt(layer.running_cov_joint, layer.n_iter, root, layer.eps)
    expected = layer.weight.detach().flatten(1) @ whiten[0]
    torch.testing.assert_close(layer.whitened_weight().flatten(1), expected)


def test_statistics_survive_state_dict():
    layer = FastDeconv(4, 3, 3, mode=1)
    layer(images())
    copy = FastDeconv(4, 3, 3, mode=1)
    copy.load_state_dict(layer.state_dict())
    x = images()
    torch.testing.assert_close(copy.eval()(x), layer.eval()(x), rtol=0, atol=0)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_non_finite_batch_leaves_the_statistics_alone(poison):
    layer = FastDeconv(4, 3, 3)
    bad = images()
    bad[0, 0, 0, 0] = poison
    layer(bad)
    assert layer.num_batches_tracked == 0
    layer(images())
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    layer(bad)
    for name, value in layer.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


@loop_over("mode", MODES)
def test_batch_of_one_and_a_single_patch(mode):
    layer = FastDeconv(3, 2, 3, mode=mode)
    y = layer(torch.randn(1, 3, 3, 3, requires_grad=True))
    y.sum().backward()
    assert y.isfinite().all() and layer.weight.grad.isfinite().all()
    assert Delinear(5, 2)(torch.randn(1, 5)).isfinite().all()


@loop_over(
    ("layer", "shape", "out"),
    [(FastDeconv(4, 8, 3, mode=mode), (4, 9, 11), (8, 7, 9)) for mode in MODES]
    + [(Delinear(4, 3), (4,), (3,))],
)
def test_empty_batch_leaves_statistics_and_gradients_alone(layer, shape, out):
    layer = layer.double()
    for _ in range(2):  # before the first batch and after it
        before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
        x = torch.randn(0, *shape, requires_grad=True)
        y = layer(x)
        y.sum().backward()
        assert y.shape == (0, *out) and x.grad.shape == x.shape
        assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())
        for name, buffer in layer.named_buffers():
            torch.testing.assert_close(buffer, before[name], rtol=0, atol=0)
        layer(torch.randn(5, *shape))


def test_an_update_between_evaluation_and_its_backward_does_no_harm():
    layer, x = FastDeconv(4, 8, 3), images()
    layer(x)
    y = layer.eval()(x).sum()
    layer.train()(x)
    y.backward()
    assert layer.weight.grad.isfinite().all()


@pytest.mark.parametrize("root", ROOTS)
def test_backward_may_be_called_within_autocast(root):
    torch.set_default_dtype(torch.float32)
    layer, x = FastDeconv(4, 6, 3, root=root), torch.randn(8, 4, 9, 9, requires_grad=True)
    grads = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = layer(x).float().square().mean()
            grads.append(torch.autograd.grad(loss, (x, layer.weight)))
    for exact, rounded in zip(*grads, strict=True):
        assert 0 < (exact - rounded).norm() < 0.03 * exact.norm()


@loop_over("mode", MODES)
def test_statistics_stay_float32_under_autocast(mode):
    torch.set_default_dtype(torch.float32)
    layer = FastDeconv(4, 8, 3, mode=mode)
    x = 300 * images().float()  # squares overflow float16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    reference = FastDeconv(4, 8, 3, mode=mode)
    reference.load_state_dict(
        {k: v for k, v in layer.state_dict().items() if "running" not in k}, strict=False
    )
    reference.num_batches_tracked.zero_()
    torch.testing.assert_close(y.float(), reference(x), atol=0.1, rtol=0.05)
    for name, value in reference._buffers.items():
        torch.testing.assert_close(getattr(layer, name), value)


def test_half_precision_networks_whiten_in_float32():
    layer = FastDeconv(4, 8, 3).float()
    x = 300 * images().float()  # squares overflow float16
    expected = layer(x)
    torch.testing.assert_close(layer.half()(x.half()).float(), expected, atol=0.05, rtol=0.05)


@loop_over("mode", MODES)
def test_forward_on_a_fake_cuda_device_mixes_no_devices(mode):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=False):
        layer = FastDeconv(4, 8, 3, padding=1, mode=mode, device="cuda")
        head = Delinear(8, 2, device="cuda")  # fewer rows than features
        y = head(layer(torch.randn(2, 4, 8, 8, device="cuda")).mean((2, 3)))
        assert y.device.type == "cuda" and y.shape == (2, 2)
        assert {b.device.type for m in (layer, head) for b in m.buffers()} == {"cuda"}
        assert layer.eval()(torch.randn(2, 4, 8, 8, device="cuda")).device.type == "cuda"


@loop_over("training", [True, False])
@loop_over("mode", MODES)
def test_meta_device_propagates_shapes(mode, training):
    layer = FastDeconv(4, 8, 3, stride=2, mode=mode, device="meta").train(training)
    head = Delinear(8, 2, device="meta").train(training)
    y = layer(torch.randn(2, 4, 9, 9, device="meta"))
    assert y.is_meta and y.shape == (2, 8, 4, 4)
    assert head(y.mean((2, 3))).shape == (2, 2)
