"""`input_norm`: scales of samples cancel, and a fused network keeps the normalisation."""

import io

import pytest
import torch
from torch import nn

from deconv import Delinear, FastDeconv, convert, fuse, published, recalibrate, whiteness
from deconv.input_norm import InputNorm, NormalizedLayer
from deconv.ops.normalize import INPUT_NORMS, normalize_samples
from deconv.surgery.plan import DECONVOLUTIONS
from tests.oracle import make_maps
from tests.pairwise import loop_over

NORMS = INPUT_NORMS[1:]
KINDS = [*DECONVOLUTIONS.values(), Delinear]


def build(kind, **options):
    """A layer of 4 channels in float64, and a batch for it."""
    if kind is Delinear:
        return Delinear(4, 3, **options).double(), torch.randn(6, 4).double() + 1
    layer = kind(4, 3, 3, stride=2, padding=1, **options).double()
    return layer, make_maps(layer.weight.dim() - 2).double()


def normalize_by_hand(x, norm):
    """Loop over samples (N, ...): the published formulas, in float64."""
    rows = []
    for sample in x.double():
        values = sample.flatten()
        if norm == "layer":
            centred = values - values.mean()
            spread = (centred.square().sum() / max(len(values) - 1, 1)).sqrt()
            rows.append((centred / (spread + 1e-5)).reshape(sample.shape))
        else:
            rows.append((values / (values.abs().mean() + 1e-5)).reshape(sample.shape))
    return torch.stack(rows)


@loop_over("norm", NORMS)
@loop_over("kind", KINDS)
def test_a_layer_whitens_the_normalised_input(kind, norm):
    layer, x = build(kind, input_norm=norm)
    torch.manual_seed(1)
    plain, _ = build(kind)
    plain.load_state_dict(layer.state_dict())
    for _ in range(2):
        torch.testing.assert_close(layer(x), plain(normalize_by_hand(x, norm)))
    torch.testing.assert_close(layer.state_dict(), plain.state_dict())
    torch.testing.assert_close(layer.eval()(x), plain.eval()(normalize_by_hand(x, norm)))
    if kind is not Delinear:  # one image without a batch dimension
        torch.testing.assert_close(layer(x[0]), layer(x[:1])[0])


@loop_over("norm", NORMS)
@loop_over("kind", KINDS)
def test_a_positive_factor_of_each_sample_changes_no_output(kind, norm):
    layer, x = build(kind, input_norm=norm)
    factors = torch.logspace(-1, 3, len(x), dtype=x.dtype).reshape(-1, *[1] * (x.dim() - 1))
    for mode in (True, False):
        layer.train(mode)
        torch.testing.assert_close(layer(factors * x), layer(x), rtol=1e-3, atol=1e-3)


@loop_over("norm", NORMS)
def test_the_gradient_is_that_of_the_formula(norm):
    x = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: normalize_samples(x, norm, dims=2), x)
    layer, x = build(FastDeconv, input_norm=norm)
    assert torch.autograd.gradcheck(layer, x[:2, :, :3, :3].clone().requires_grad_())


@loop_over("norm", NORMS)
@loop_over("kind", KINDS)
def test_a_sample_of_zeros_stays_zero_with_a_finite_gradient(kind, norm):
    layer, x = build(kind, input_norm=norm)
    x[0] = 0
    x.requires_grad_()
    assert not normalize_samples(x, norm, x.dim() - 1)[0].any()
    layer(x).square().sum().backward()
    assert x.grad.isfinite().all() and layer.weight.grad.isfinite().all()
    one = normalize_samples(torch.full((2, 1), 3.0), norm, dims=1)  # no spread within a sample
    torch.testing.assert_close(one, torch.full((2, 1), float(norm == "l1")), rtol=1e-5, atol=0)
    assert layer(x[:0]).shape[0] == 0


@loop_over("dtype", [torch.float16, torch.bfloat16])
@loop_over("norm", NORMS)
def test_half_precision_is_normalised_in_float32(norm, dtype):
    x = (300 * torch.randn(4, 8, 16, 16)).to(dtype)  # squares overflow in float16
    given = normalize_samples(x, norm, dims=3)
    assert given.dtype == dtype
    torch.testing.assert_close(given, normalize_by_hand(x, norm).to(dtype))
    layer = FastDeconv(8, 4, 3, input_norm=norm)
    expected = layer(x.float())
    with torch.autocast("cpu", dtype):
        assert layer(x).dtype == dtype
        torch.testing.assert_close(layer(x).float(), expected, rtol=0.05, atol=0.05)


@loop_over("norm", NORMS)
@loop_over("kind", KINDS)
def test_a_fused_layer_keeps_only_the_normalisation(kind, norm):
    layer, x = build(kind, input_norm=norm)
    layer(x)
    plain = fuse(layer.eval())
    assert type(plain) is NormalizedLayer and type(plain[0]) is InputNorm
    assert type(plain[1]) in (*DECONVOLUTIONS, nn.Linear) and not plain.training
    torch.testing.assert_close(plain[1].weight, layer.whitened_weight())
    torch.testing.assert_close(plain(x), layer(x))
    torch.testing.assert_close(plain(x[0]), layer(x[0]))
    if layer.weight.dim() > 2 and layer.transposed:
        size = [2 * side for side in x.shape[2:]]
        torch.testing.assert_close(plain(x, output_size=size), layer(x, size))


def test_forward_hooks_of_a_fused_layer_see_the_raw_input():
    layer, x = build(FastDeconv, input_norm="layer")
    seen = []
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    layer.register_forward_hook(lambda _, args, y: y + 1)
    expected = layer.eval()(x)
    torch.testing.assert_close(fuse(nn.Sequential(layer).eval())(x), expected)
    assert len(seen) == 2 and seen[1] is x


def make_network(**options):
    parts = FastDeconv(3, 4, 3, padding=1, **options), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
    network = nn.Sequential(*parts, nn.Flatten(), Delinear(4, 2, **options))
    network(torch.rand(8, 3, 9, 9))
    return network.eval()


@loop_over("norm", NORMS)
@loop_over("is_fused", [False, True])
def test_export_for_any_batch_keeps_the_normalisation(norm, is_fused):
    network = make_network(input_norm=norm)
    served, x = fuse(network) if is_fused else network, 7 * torch.rand(5, 3, 9, 9)
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(served, (torch.rand(2, 3, 9, 9),), dynamic_shapes=shapes)
    torch.testing.assert_close(program.module()(x), network(x), rtol=1e-4, atol=1e-5)


def test_a_fused_network_is_traced_by_fx():
    network, x = fuse(make_network(input_norm="layer")), 7 * torch.rand(5, 3, 9, 9)
    torch.testing.assert_close(torch.fx.symbolic_trace(network)(x), network(x))


@pytest.mark.slow
@loop_over("norm", NORMS)
def test_onnx_keeps_the_normalisation(norm):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    network, x, file = make_network(input_norm=norm), 7 * torch.rand(2, 3, 9, 9), io.BytesIO()
    torch.onnx.export(fuse(network), (x,), dynamo=True, verbose=False).save(file)
    session = runtime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (given,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(given), network(x), rtol=1e-4, atol=1e-5)


@loop_over("norm", NORMS)
def test_whiteness_and_recalibration_see_the_normalised_input(norm):
    layer, x = build(FastDeconv, input_norm=norm)
    plain, _ = build(FastDeconv)
    plain.load_state_dict(layer.state_dict())
    recalibrate(layer, [x, 2 * x]), recalibrate(plain, [normalize_by_hand(x, norm)] * 2)
    torch.testing.assert_close(layer.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-4)
    (given,), (expected,) = whiteness(layer, x), whiteness(plain, normalize_by_hand(x, norm))
    assert given.before == pytest.approx(expected.before)
    assert given.after == pytest.approx(expected.after, rel=1e-3)


def test_convert_passes_it_to_every_layer():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    converted = convert(model, linear=True, input_norm="l1")
    assert [converted[n].input_norm for n in (0, 3)] == ["l1", "l1"]


def test_an_unknown_norm_is_refused_by_name():
    for make in (
        lambda: FastDeconv(3, 4, 3, input_norm="l2"),
        lambda: Delinear(3, 4, input_norm=1),
    ):
        with pytest.raises(ValueError, match=r"^input_norm must be one of .*, got ('l2'|1)$"):
            make()


def test_published_layers_add_their_own_eps_to_the_divisor():
    x = torch.randn(5, 4, 3, 3)
    layer = published.NormalizedDeconv(4, 2, 1, eps=0.3, norm_type="layernorm")
    centred = x - x.mean((1, 2, 3), keepdim=True)
    expected = centred / (x.std((1, 2, 3), keepdim=True) + 0.3)
    torch.testing.assert_close(layer.normalize_input(x), expected)
    head = published.NormalizedDelinear(4, 2, eps=0.3, norm_type="l1norm")
    row = x[:, :, 0, 0]
    expected = row / (row.abs().mean(1, keepdim=True) + 0.3)
    torch.testing.assert_close(head.normalize_input(row), expected)
