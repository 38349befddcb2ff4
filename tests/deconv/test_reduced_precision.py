"""Settings of torch that round float32 products: the method keeps all bits, and the settings stay.

There is no GPU here: `Rounding` does to every product what a GPU would.
"""

import threading
from contextlib import suppress

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from deconv import Delinear, FastDeconv, published
from deconv.ops import precision
from deconv.ops.inverse_sqrt import ROOTS, inverse_sqrt
from deconv.ops.matmul import multiply, outer_products, transform
from deconv.ops.precision import full_products
from deconv.surgery.plan import DECONVOLUTIONS
from tests.pairwise import loop_over, pairwise
from tests.rounding import Rounding

BACKENDS = torch.backends
SETTINGS = {
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "allow_tf32": lambda: setattr(BACKENDS.cuda.matmul, "allow_tf32", True),
    "all": lambda: setattr(BACKENDS, "fp32_precision", "tf32"),
    "cuda": lambda: setattr(BACKENDS.cuda.matmul, "fp32_precision", "tf32"),
    "oneDNN": lambda: setattr(BACKENDS.mkldnn.matmul, "fp32_precision", "bf16"),
    "convolution": lambda: setattr(BACKENDS.mkldnn.conv, "fp32_precision", "bf16"),
}


def reset():
    torch.set_float32_matmul_precision("highest")
    BACKENDS.fp32_precision = "none"
    for setting in precision.SETTINGS:
        setting.fp32_precision = "none"


@pytest.fixture(autouse=True)
def default_settings():
    torch.manual_seed(0)
    reset()
    yield
    reset()


def read_settings():
    """Return all settings; a getter of torch raises where old and new ones were mixed."""
    modules = BACKENDS, BACKENDS.cudnn, BACKENDS.cudnn.conv, BACKENDS.mkldnn, *precision.SETTINGS
    values = [module.fp32_precision for module in modules]
    for read in (torch.get_float32_matmul_precision, lambda: BACKENDS.cuda.matmul.allow_tf32):
        values.append("mixed")
        with suppress(RuntimeError):
            values[-1] = read()
    return values


def learn(make_layer, x):
    """Return what a training step and an evaluation compute before the layer's own convolution."""
    torch.manual_seed(0)
    layer, x, values = make_layer(), x.clone().requires_grad_(), []
    for training in (True, False):
        folded = layer.train(training).fold_whitening(layer.prepare_input(x))
        sum((value * torch.randn_like(value)).sum() for value in folded).backward()
        values += [*folded, x.grad.clone(), layer.weight.grad.clone(), layer.bias.grad.clone()]
    return [*values, *layer.buffers()]


STEPS = [1, 2, 5, 10, 12, 15]
OPTIONS = [{}, dict(block=2, shared=False), dict(rows_per_feature=1), dict(groups=2)]
LAYERS = pairwise([*DECONVOLUTIONS], [1, 2, 3, 4, 5], ROOTS, STEPS, OPTIONS, [*SETTINGS])


@loop_over(("kind", "mode", "root", "n_iter", "options", "setting"), LAYERS)
def test_convolutions_keep_every_bit(kind, mode, root, n_iter, options, setting):
    make_layer = lambda: DECONVOLUTIONS[kind](
        8, 6, 3, 2, 1, mode=mode, root=root, n_iter=n_iter, **options
    )
    x = torch.randn(5, 8, *(9,) * (make_layer().weight.dim() - 2))
    assert_same_bits(make_layer, x, setting)


@loop_over(
    ("n_iter", "rows", "block", "setting"), pairwise(STEPS, [6, 40, 400], [15, 30], [*SETTINGS])
)
def test_linear_layers_keep_every_bit(n_iter, rows, block, setting):
    x = torch.randn(rows, 30) @ torch.randn(30, 30)
    assert_same_bits(lambda: Delinear(30, 4, n_iter=n_iter, block=block), x, setting)


@loop_over("setting", ["high", "convolution"])
def test_wide_blocks_keep_every_bit(setting):
    """Convolutions of oneDNN compute the products on a CPU of AMD; few rows have a root of rows."""
    wide = dict(block=64, root="newton", n_iter=12)
    for size in ((30, 10), (3, 3)):
        x = torch.randn(2, 64, *size)
        assert_same_bits(lambda: FastDeconv(64, 4, 1, mode=4, **wide), x, setting)
        assert_same_bits(lambda: FastDeconv(64, 4, 2, rows_per_feature=0, **wide), x, setting)


@loop_over("setting", SETTINGS)
def test_published_layers_keep_every_bit(setting):
    x = torch.randn(6, 8, 7, 7)
    make_layer = lambda: published.FastDeconv(8, 6, 3, padding=1, n_iter=12)
    assert_same_bits(make_layer, x, setting)
    channel = lambda: published.ChannelDeconv(4, n_iter=12)
    assert_same_bits(channel, x, setting, lambda make, x: differentiate(make(), x))


@loop_over("setting", SETTINGS)
def test_single_products_keep_every_bit(setting):
    """`outer_products` needs its own gradient where ranks share statistics."""
    vectors, matrices = torch.randn(2, 6, 5), torch.randn(2, 3, 3)
    calls = [
        lambda x: transform(matrices, x),
        lambda x: transform(x[0, :, :3].reshape(2, 3, 3), vectors),
        lambda x: outer_products(x, x.flip(1), 2, 0.5),
        lambda x: multiply(x, x.mT, torch.eye(6), beta=1.5, alpha=-0.5),
    ]
    for call in calls:
        assert_same_bits(None, vectors, setting, lambda _, x, call=call: differentiate(call, x))


def differentiate(call, x):
    x = x.clone().requires_grad_()
    with full_products():
        value = call(x)
    return [value, *torch.autograd.grad(value.sin().sum(), x)]


def assert_same_bits(make_layer, x, setting, learn=learn):
    reset()
    expected = learn(make_layer, x)
    SETTINGS[setting]()
    with Rounding() as mode:
        given = learn(make_layer, x)
    assert mode.rounded == 0
    for one, other in zip(given, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_without_the_context_newton_is_lost_and_the_emulation_sees_every_pass(monkeypatch):
    x = torch.randn(400, 64) @ torch.randn(64, 64)
    cov = torch.cov(x.T)[None].requires_grad_()
    exact = inverse_sqrt(cov.double(), 15, eps=1e-2)
    errors = []
    torch.set_float32_matmul_precision("high")
    for reduced in (precision.is_reduced, lambda: False):
        monkeypatch.setattr(precision, "is_reduced", reduced)
        with Rounding() as forward, full_products():
            root = inverse_sqrt(cov, 15, eps=1e-2)
        with Rounding() as backward:
            root.sum().backward()
        errors.append(((root - exact).abs().max() / exact.abs().max()).item())
        assert (forward.rounded > 0) == (backward.rounded > 0) == (reduced() is False)
    assert errors[0] < 1e-3 and errors[1] > 1e-2


def test_products_of_this_cpu_keep_every_bit():
    left, right = torch.randn(2, 256, 256)
    expected = left @ right
    torch.set_float32_matmul_precision("medium")
    if torch.equal(left @ right, expected):
        pytest.skip("this CPU multiplies as before")
    make_layer = lambda: FastDeconv(64, 64, 3, root="newton", block=64)
    x = torch.randn(4, 64, 16, 16)
    given = learn(make_layer, x)
    reset()
    for one, other in zip(given, learn(make_layer, x), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


class Broken(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    @precision.in_full_products
    def backward(ctx, grad):
        assert not precision.is_reduced()
        raise ArithmeticError


def fail_forward():
    with full_products():
        assert not precision.is_reduced()
        raise ArithmeticError


def fail_backward():
    Broken.apply(torch.ones(2, requires_grad=True)).sum().backward()


def nest():
    with full_products():
        FastDeconv(3, 4, 3)(torch.randn(2, 3, 8, 8)).sum().backward()
        assert not precision.is_reduced()
        assert not BACKENDS.cuda.matmul.allow_tf32  # raises if old and new settings disagree


RUNS = {"step": lambda: FastDeconv(3, 4, 3)(torch.randn(2, 3, 8, 8)).sum().backward(), "nest": nest}
FAILURES = {"forward": fail_forward, "backward": fail_backward}


@loop_over(("first", "second", "run"), pairwise([*SETTINGS], [*SETTINGS], [*RUNS, *FAILURES]))
def test_settings_are_restored(first, second, run):
    reset()
    for name in (first, second):  # mixed: torch's own getters may raise, these contexts never
        SETTINGS[name]()
    before = read_settings()
    with suppress(ArithmeticError):
        (RUNS | FAILURES)[run]()
    assert read_settings() == before and precision.is_reduced()
    torch.set_float32_matmul_precision("highest")
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_setting_that_was_inherited_still_is():
    BACKENDS.fp32_precision = "tf32"
    with full_products():
        assert not precision.is_reduced()
    BACKENDS.fp32_precision = "ieee"
    assert {setting.fp32_precision for setting in precision.SETTINGS} == {"ieee"}


def test_threads_share_the_precision():
    """The first context of all threads changes the settings, the last one restores them."""
    torch.set_float32_matmul_precision("high")
    before, seen = read_settings(), []
    barrier = threading.Barrier(4)

    def work():
        layer, x = FastDeconv(3, 4, 3), torch.randn(2, 3, 8, 8)
        barrier.wait()
        for _ in range(30):
            with full_products():
                layer(x).sum().backward()
                seen.append(precision.is_reduced())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [False] * 120 and read_settings() == before


@loop_over("setting", SETTINGS)
def test_transforms_and_second_derivatives_work(setting):
    layer, x = FastDeconv(3, 4, 3, block=3), torch.randn(6, 3, 8, 8)
    layer(x)
    values = []
    for choose in (reset, SETTINGS[setting]):
        choose()
        given = layer.weight.detach().clone().requires_grad_()
        call = lambda w, x=x: torch.func.functional_call(layer, {"weight": w}, (x,)).sin().sum()
        for training in (True, False):
            layer.train(training)
            (slope,) = torch.autograd.grad(call(given), given, create_graph=True)
            values += [slope, torch.autograd.grad(slope.square().sum(), given)[0]]
        values.append(torch.func.grad(call)(given))
        values.append(torch.func.vmap(torch.func.grad(call), (None, 0))(given, x[:, None]))
    for one, other in zip(values[6:], values[:6], strict=True):
        torch.testing.assert_close(one, other)


def compile_rounded(graph, inputs):
    """Run a compiled graph as a GPU does."""

    def run(*args):
        with Rounding():
            return graph(*args)

    return make_boxed_func(run)


@pytest.mark.parametrize("root", ROOTS)
def test_compiled_code_computes_newton_in_float64(root):
    """A graph cannot change the settings: only products of patches and weights are rounded."""
    layer = FastDeconv(8, 6, 3, root=root, n_iter=15, block=8)
    x = torch.einsum("dc,nchw->ndhw", torch.randn(8, 8), torch.randn(32, 8, 9, 9))
    expected = layer(x)
    expected.square().sum().backward()
    slope, layer.weight.grad = layer.weight.grad, None
    torch._dynamo.reset()
    torch.set_float32_matmul_precision("high")
    backend = aot_autograd(fw_compiler=compile_rounded, bw_compiler=compile_rounded)
    run = torch.compile(layer, fullgraph=True, backend=backend)
    given = run(x)
    given.square().sum().backward()
    assert 0 < (given - expected).abs().max() < 0.01 * expected.abs().max()
    assert 0 < (layer.weight.grad - slope).abs().max() < 0.01 * slope.abs().max()
    with torch.no_grad():
        given, expected = run.eval()(x), layer(x)
    assert 0 < (given - expected).abs().max() < 0.01 * expected.abs().max()


def test_an_export_has_no_float64():
    torch.set_float32_matmul_precision("high")
    network = nn.Sequential(FastDeconv(3, 4, 3, root="newton"), nn.ReLU()).eval()
    program = torch.export.export(network, (torch.randn(2, 3, 8, 8),))
    assert "float64" not in str(program)
