"""Deconvolution in one to three dimensions, transposed, padded in every way, by brute force."""

import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import deconv
from deconv import FastDeconv, FastDeconvTranspose2d, convert, fuse, plan
from deconv.ops.inverse_sqrt import ROOTS
from deconv.ops.patches import PatchSubset
from deconv.surgery.batchnorm import ChannelAffine
from deconv.surgery.plan import DECONVOLUTIONS

SIZES = {1: (11,), 2: (6, 7), 3: (5, 4, 5)}
CONVOLUTIONS = [nn.Conv1d, nn.Conv2d, nn.Conv3d]
TRANSPOSED = [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d]


@pytest.fixture(autouse=True)
def _double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make_maps(dims, count=5):
    """Correlated maps with an offset, so that neither mean nor covariance is trivial."""
    x = torch.randn(count, 4, *SIZES[dims])
    return x + 0.7 * x.roll(1, -1) + x.flip(1) + torch.arange(4.0).reshape(4, *(1,) * dims)


def spread_out(x, layer):
    """x with the zeros that a transposed convolution puts between pixels and around them."""
    shape = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], layer.stride, strict=True)]
    wide = x.new_zeros(*x.shape[:2], *shape)
    wide[(..., *(slice(None, None, s) for s in layer.stride))] = x
    sides = []
    for k, d, p, more in zip(
        layer.kernel_size, layer.dilation, layer.padding, layer.output_padding, strict=True
    ):
        sides = [d * (k - 1) - p, d * (k - 1) - p + more, *sides]
    return F.pad(wide, sides)


def patches_of(layer, x):
    """All that the kernel sees, (N, *positions, groups, C, T), and its weight (out, C, T)."""
    dims, weight, stride = len(layer.kernel_size), layer.weight, layer.stride
    if layer.transposed:
        x, stride = spread_out(x, layer), (1,) * dims
        parts = [part.transpose(0, 1) for part in weight.chunk(layer.groups)]
        weight = torch.cat(parts).flip(*range(2, dims + 2))
    else:
        mode = {"zeros": "constant"}.get(layer.padding_mode, layer.padding_mode)
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode)
    for d, (k, s, dilation) in enumerate(
        zip(layer.kernel_size, stride, layer.dilation, strict=True)
    ):
        x = x.unfold(2 + d, (k - 1) * dilation + 1, s)[..., ::dilation]
    x = x.flatten(2 + dims).movedim(1, -2)  # N *positions C T
    return x.unflatten(-2, (layer.groups, -1)), weight.flatten(2)


def brute_force(layer, x, steps):
    """Whiten all channels of a group by an exact root over every `steps`-th patch, then weigh."""
    patches, weight = patches_of(layer, x)
    looked_at = patches[(slice(None), *(slice(None, None, step) for step in steps))]
    out = []
    for group, kernel in enumerate(weight.chunk(layer.groups)):
        rows = looked_at[..., group, :, :].flatten(-2).flatten(0, -2)
        mean, cov = rows.mean(0), torch.cov(rows.T, correction=0)
        values, basis = torch.linalg.eigh(cov + layer.eps * torch.eye(len(cov)))
        white = (patches[..., group, :, :].flatten(-2) - mean) @ basis @ torch.diag(values**-0.5)
        out.append(white @ basis.T @ kernel.flatten(1).T)
    out = torch.cat(out, -1) + (0 if layer.bias is None else layer.bias)
    return out.movedim(-1, 1)


def make(kind, *args, **options):
    exact = dict(eps=0.3, n_iter=15, root="newton", rows_per_feature=0)
    options = dict(block=4) | exact | options
    return DECONVOLUTIONS[kind](*args, **options)


@pytest.mark.parametrize("mode", [4, 5])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
@pytest.mark.parametrize(
    "geometry",
    [
        dict(kernel_size=3, padding=1),
        dict(kernel_size=2, stride=2, dilation=2, groups=2, bias=False),
        dict(kernel_size=3, padding=2, padding_mode="reflect"),
        dict(kernel_size=2, stride=2, padding=1, padding_mode="replicate", groups=4),
        dict(kernel_size=3, padding="same", dilation=2, padding_mode="circular"),
    ],
)
def test_convolutions_whiten_what_the_kernel_sees(geometry, kind, mode):
    dims = 1 + CONVOLUTIONS.index(kind)
    layer, x = make(kind, 4, 8, mode=mode, sampling_stride=2, **geometry), make_maps(dims)
    y = layer(x)
    assert y.shape == kind.forward(layer, x).shape
    steps = (1 if mode == 4 else 2,) * dims
    torch.testing.assert_close(y, brute_force(layer, x, steps), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("mode", [4, 5])
@pytest.mark.parametrize("kind", TRANSPOSED)
@pytest.mark.parametrize(
    ("geometry", "step"),  # of mode 5: 2 would see one phase of two
    [
        (dict(kernel_size=3, padding=1), 2),
        (dict(kernel_size=4, stride=2, padding=1), 3),
        (dict(kernel_size=3, stride=2, padding=1, output_padding=1, groups=2, bias=False), 3),
        (dict(kernel_size=2, stride=3, dilation=2, output_padding=2), 2),
        (dict(kernel_size=2, stride=2, groups=4), 3),
    ],
)
def test_transposed_ones_whiten_the_map_with_zeros_in_between(geometry, step, kind, mode):
    dims = 1 + TRANSPOSED.index(kind)
    layer, x = make(kind, 4, 8, mode=mode, sampling_stride=2, **geometry), make_maps(dims)
    y = layer(x)
    assert y.shape == kind.forward(layer, x).shape
    steps = (1 if mode == 4 else step,) * dims
    torch.testing.assert_close(y, brute_force(layer, x, steps), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("rows_per_feature", [0, 1])
@pytest.mark.parametrize("mode", [1, 2, 3, 5])
def test_a_transposed_layer_is_that_of_the_wider_map(mode, rows_per_feature):
    options = dict(mode=mode, block=2, rows_per_feature=rows_per_feature)
    up = make(nn.ConvTranspose2d, 4, 6, 4, stride=2, padding=3, **options)  # no zeros outside
    flat = make(nn.Conv2d, 4, 6, 4, **options)
    flat.weight.data, flat.bias.data = up.to_conv_layout(up.weight).detach(), up.bias.detach()
    x = make_maps(2)
    torch.testing.assert_close(up(x), flat(spread_out(x, up)))


def test_outputs_of_a_transposed_layer_are_white_over_all_phases():
    up = make(nn.ConvTranspose2d, 4, 36, 3, stride=2, mode=4, eps=1e-9)
    up.n_iter = 40  # more than float32 could bear
    up.weight.data = up.to_conv_layout(torch.eye(36).reshape(36, 4, 3, 3))
    up.bias.data.zero_()
    rows = up(make_maps(2, 40)).movedim(1, 0).flatten(1)
    torch.testing.assert_close(rows.mean(1), torch.zeros(36), atol=1e-7, rtol=0)
    torch.testing.assert_close(rows @ rows.T / rows.shape[1], torch.eye(36), atol=1e-4, rtol=0)


@pytest.mark.parametrize("rows_per_feature", [0, 0.5])  # all patches, some of them
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("mode", [1, 2, 3, 5])
@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("kind", [*CONVOLUTIONS, *TRANSPOSED])
def test_gradients_match_finite_differences(kind, root, mode, groups, rows_per_feature):
    options = dict(stride=2, n_iter=5, sampling_stride=1, rows_per_feature=rows_per_feature)
    layer = make(kind, 4, 2, 2, mode=mode, root=root, groups=groups, block=2, **options)

    def f(x, weight, bias):
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, x)

    x = make_maps(layer.weight.dim() - 2, 2)
    some = isinstance(layer.choose_patches(x)[0], PatchSubset)
    assert some == (rows_per_feature > 0 and mode != 3)
    x.requires_grad_()
    assert torch.autograd.gradcheck(f, (x, *layer.parameters()), fast_mode=True)


@pytest.mark.parametrize("mode", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("kind", DECONVOLUTIONS)
def test_every_kind_is_the_plain_layer_before_training_and_fused(kind, mode):
    dims = 1 + (CONVOLUTIONS.index(kind) if kind in CONVOLUTIONS else TRANSPOSED.index(kind))
    layer, x = make(kind, 4, 6, 3, stride=2, padding=1, groups=2, mode=mode), make_maps(dims)
    torch.testing.assert_close(layer.eval()(x), kind.forward(layer, x), rtol=1e-10, atol=1e-10)
    y = layer.train()(x)
    torch.testing.assert_close(layer.eval()(x), y)
    torch.testing.assert_close(layer(x[0]), y[0])  # without a batch
    plain = fuse(layer)
    assert type(plain) is kind and b"deconv" not in pickle.dumps(plain)
    torch.testing.assert_close(plain(x), layer(x), rtol=1e-10, atol=1e-10)


def test_the_size_of_the_output_can_be_asked_for():
    layer = make(nn.ConvTranspose2d, 4, 2, 3, stride=2)
    x = make_maps(2)
    for size in ([14, 15], [5, 2, 14, 15]):
        assert layer(x, output_size=size).shape == (5, 2, 14, 15)
    assert layer(x[0], output_size=[2, 14, 15]).shape == (2, 14, 15)
    with pytest.raises(ValueError, match="output size"):
        layer(x, output_size=[90, 90])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(padding_mode="reflect"), "zeros.*FastDeconvTranspose2d"),
        (dict(mode=9), "mode.*9"),
    ],
)
def test_bad_arguments_of_transposed_layers_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        deconv.FastDeconvTranspose2d(4, 8, 3, **given)


@pytest.mark.parametrize("name", [name for name in deconv.__all__ if name.startswith("FastDeconv")])
def test_unknown_arguments_are_named(name):
    kind = getattr(deconv, name)
    with pytest.raises(TypeError, match=r"Convolution.__init__\(\) got .*'bloc'"):
        kind(4, 8, 3, bloc=2)
    assert kind(4, 8, 3, block=2, device="meta", dtype=torch.float32).weight.is_meta


@pytest.mark.parametrize("shape", [(2, 4, 9), (2, 3, 9, 9), (2, 4, 9, 9, 9)])
def test_input_of_another_kind_is_named(shape):
    for layer in (FastDeconv(4, 8, 3), deconv.FastDeconvTranspose2d(4, 8, 3)):
        with pytest.raises(ValueError, match=r"4 channels and 2 dimensions.*\(2, "):
            layer(torch.randn(shape))


NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def make_network(dims):
    """Down and up again; BatchNorm after the convolutions, and before the last one."""
    down, up, norm = CONVOLUTIONS[dims - 1], TRANSPOSED[dims - 1], NORMS[dims]
    layers = [down(4, 6, 3, 2, 1, padding_mode="reflect", bias=False), norm(6), nn.ReLU()]
    layers += [up(6, 4, 4, 2, 1, groups=2, bias=False), norm(4), nn.ReLU()]
    layers += [nn.AvgPool1d(1) if dims == 1 else nn.Identity(), norm(4), nn.ReLU(), down(4, 2, 1)]
    model = nn.Sequential(*layers)
    for module in model.modules():
        if isinstance(module, norm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
    return model.eval()


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_networks_of_all_dimensions_are_converted_and_fused(dims):
    model, x = make_network(dims), make_maps(dims)
    names = [DECONVOLUTIONS[k].__name__ for k in (CONVOLUTIONS[dims - 1], TRANSPOSED[dims - 1])]
    new = convert(model)
    kinds = [type(module).__name__ for module in new]
    assert kinds[0] == kinds[-1] == names[0] and kinds[3] == names[1]
    assert [kinds[number] for number in (1, 4, 7)] == ["Identity"] * 3
    assert new[0].bias is not None and new[3].bias.shape == (4,)  # BatchNorm's shift is gone
    new(x).square().mean().backward()
    assert all(p.grad.isfinite().all() for p in new.parameters())
    kept = convert(model, pretrained=True)
    torch.testing.assert_close(kept(x), model(x), rtol=1e-9, atol=1e-9)
    plain = fuse(kept)
    torch.testing.assert_close(plain(x), model(x), rtol=1e-9, atol=1e-9)
    assert b"deconv" not in pickle.dumps(plain)


def test_batchnorm_of_vectors_stays_and_that_of_maps_goes():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.maps, self.conv = nn.BatchNorm1d(4), nn.Conv1d(4, 4, 3)
            self.vectors, self.head = nn.BatchNorm1d(4), nn.Linear(4, 2)

        def forward(self, x):
            x = F.relu(self.maps(x))
            x = x.mean(2) + self.conv(x).mean(2)
            return self.head(self.vectors(x))

    rows = {row.name: (row.action, row.reason) for row in plan(Both())}
    assert rows["vectors"] == ("kept", "may be of vectors, which nothing after it whitens")
    assert rows["maps"][0] == "kept"  # its output goes past the convolution as well
    ordered = plan(nn.Sequential(nn.BatchNorm1d(4), nn.ReLU(), nn.Conv1d(4, 2, 3)))
    assert ordered[0].action == "replaced"


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("inner", [False, True])
def test_batchnorm_after_the_activation_goes_in_all_dimensions(dims, inner):
    """A convolution's maps are maps behind layers that leave them so, whatever follows."""
    conv, pool = CONVOLUTIONS[dims - 1](4, 4, 2), [nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d]
    before = [conv, nn.ReLU(), pool[dims - 1](2), nn.Dropout()]
    before = [nn.Sequential(*before)] if inner else before
    model = nn.Sequential(*before, NORMS[dims](4), nn.Flatten(), nn.LazyLinear(2)).eval()
    model(make_maps(dims))
    nn.init.normal_(model[-3].running_mean)
    row = next(row for row in plan(model) if isinstance(row.module, NORMS[dims]))
    assert (row.action, row.reason) == ("replaced", "every BatchNorm of maps does")
    kept, x = convert(model, pretrained=True), make_maps(dims)
    assert type(kept[-3]) is ChannelAffine
    torch.testing.assert_close(kept(x), model(x))


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.SyncBatchNorm])
@pytest.mark.parametrize("last", [nn.Flatten, lambda: nn.Linear(4, 4)])
def test_a_batchnorm_that_sees_vectors_for_certain_stays(norm, last):
    pool = [nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*pool, last(), nn.ReLU(), norm(4), nn.Linear(4, 2)).eval()
    new, x = convert(model, pretrained=True), make_maps(2)
    assert type(new[5]) is norm
    torch.testing.assert_close(new(x), model(x))


def test_output_padding_may_be_a_list_as_torch_takes_it():
    layer = FastDeconvTranspose2d(3, 4, 3, stride=2, output_padding=[1, 0])
    like = nn.ConvTranspose2d(3, 4, 3, stride=2, output_padding=[1, 0])
    x = torch.randn(2, 3, 5, 6)
    assert layer(x).shape == like(x).shape
