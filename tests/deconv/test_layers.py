"""FastDeconv and Delinear against brute force, eigenvalues and finite differences."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from deconv import Delinear, FastDeconv, FastDeconvTranspose1d
from deconv.conv import ROOTS
from deconv.ops.inverse_sqrt import inverse_sqrt
from deconv.ops.patches import PatchSubset, gather, select_pixels
from tests.matrices import follow

MODES = [1, 2, 3, 4, 5]
VARIANTS = list(itertools.product(("contiguous", "interleaved"), (True, False)))
GEOMETRIES = [
    dict(kernel_size=3, padding=1),
    dict(kernel_size=(3, 2), stride=(2, 1), padding=(2, 0)),
    dict(kernel_size=3, dilation=2, padding="same", groups=2),
    dict(kernel_size=(4, 1), padding="same", bias=False),
    dict(kernel_size=1, stride=2, padding="valid"),
    dict(kernel_size=3, padding=1, groups=4, block=1),
]


@pytest.fixture(autouse=True)
def _double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def images(n=6, c=4, h=9, w=11):
    """Correlated images with an offset, so that neither mean nor covariance is trivial."""
    noise = torch.randn(n, c, h + 4, w + 4)
    mixed = torch.einsum("dc,nchw->ndhw", torch.randn(c, c), F.avg_pool2d(noise, 5, stride=1))
    return 3 * mixed + torch.arange(c).reshape(1, c, 1, 1)


def exact_root(layer, cov):
    """D of a covariance: the root, its documented approximation, or the factor's with its floor."""
    cov = cov + layer.eps * torch.eye(len(cov))
    if layer.root == "cholesky":
        floor = cov.norm() / 1.5 ** (2 * layer.n_iter)
        factor = torch.linalg.cholesky(cov + floor * torch.eye(len(cov)))
        return torch.linalg.inv(factor).contiguous()
    values, basis = torch.linalg.eigh(cov)
    if layer.root == "resolvent":
        response = follow(values / cov.norm(), layer.n_iter)
        return basis @ torch.diag(response / cov.norm().sqrt()) @ basis.T
    return basis @ torch.diag(values**-0.5) @ basis.T


def brute_force(layer, x):
    """Whiten every patch block by block with exact roots, then apply the raw weight."""

    def patches(image, kernel, dilation, stride):  # N L C*T
        return F.unfold(image, kernel, dilation=dilation, stride=stride).transpose(1, 2)

    kernel = layer.kernel_size, layer.dilation
    seen = patches(F.pad(x, layer._reversed_padding_repeated_twice), *kernel, layer.stride)
    sampling, _ = layer.choose_patches(x)
    if layer.mode == 3:  # single pixels of the raw image, repeated for every tap
        sample = patches(x, 1, 1, layer.sampling_stride).flatten(0, 1)
        sample = sample.repeat_interleave(kernel[0][0] * kernel[0][1], dim=1)
        mean = sample.mean(0)
    else:
        some = isinstance(sampling, PatchSubset)
        window = sampling.grid if some else sampling
        sample = patches(F.pad(x, window.padding), *kernel, window.stride)
        mean = sample.mean((0, 1))  # of all, however few the covariance is of
        if some:
            numbers = sampling.choose(len(x), x.shape[2:], x.device)
            sample = torch.stack([rows[n] for rows, n in zip(sample, numbers, strict=True)])
        sample = sample.flatten(0, 1)
    white = torch.zeros_like(seen)
    for blocks in columns_of(layer):  # one group
        parts = [sample[:, block] - sample[:, block].mean(0) for block in blocks]  # M B T
        for block, D in zip(blocks, exact_whitening(layer, parts), strict=True):
            off_centre = seen[..., block] - mean[block]
            white[..., block.flatten()] = off_centre.flatten(-2) @ D.T
    out = [
        part @ weight.T
        for part, weight in zip(
            white.chunk(layer.groups, dim=-1),
            layer.weight.flatten(1).chunk(layer.groups),
            strict=True,
        )
    ]
    out = torch.cat(out, dim=-1).transpose(1, 2).reshape(nn.Conv2d.forward(layer, x).shape)
    return out + (0 if layer.bias is None else layer.bias.reshape(1, -1, 1, 1))


def columns_of(layer):
    """For every group a list of blocks, each the (B, T) column numbers of its features."""
    taps = layer.weight[0, 0].numel()
    for columns in torch.arange(layer.in_channels * taps).chunk(layer.groups):
        count = len(columns) // taps // layer.block
        if layer.layout == "contiguous":
            blocks = columns.chunk(count)
        elif layer.mode in (4, 5):
            blocks = [columns[first::count] for first in range(count)]
        else:
            blocks = [columns.reshape(-1, taps)[first::count] for first in range(count)]
        yield [block.reshape(-1, taps) for block in blocks]


def exact_whitening(layer, parts):
    """D of every block of a group, from centred samples (M, B, T)."""

    def roots(equation):
        covs = [torch.einsum(equation, p, p) for p in parts]
        covs = [cov * len(cov) / parts[0].numel() for cov in covs]
        covs = [sum(covs) / len(covs)] * len(covs) if layer.shared else covs
        return [exact_root(layer, cov) for cov in covs]

    channels, taps = parts[0].shape[1:]
    if layer.mode in (4, 5):
        parts = [p.flatten(1) for p in parts]
        return roots("mf,mg->fg")
    by_channel = [torch.eye(channels)] * len(parts)
    if layer.mode in (1, 3):
        by_channel = roots("mct,mdt->cd")
        parts = [D @ p for D, p in zip(by_channel, parts, strict=True)]
    by_tap = roots("mct,mcu->tu") if layer.mode in (1, 2) else [torch.eye(taps)] * len(parts)
    return [torch.kron(c, t) for c, t in zip(by_channel, by_tap, strict=True)]


@pytest.mark.parametrize(("layout", "shared"), VARIANTS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("root", ROOTS)
def test_fold_then_convolve_equals_whiten_then_convolve(root, mode, geometry, layout, shared):
    options = dict(mode=mode, block=2, n_iter=15, eps=0.3, sampling_stride=2) | geometry
    options |= dict(root=root, rows_per_feature=0 if root == "newton" else 4)
    layer = FastDeconv(4, 8, **options, layout=layout, shared=shared)
    x = images()
    torch.testing.assert_close(layer(x), brute_force(layer, x), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("layout", "shared"), VARIANTS)
def test_whitened_patches_have_identity_covariance(layout, shared):
    # With as many outputs as features and W = I, the outputs of mode 4 *are* the whitened patches.
    layer = FastDeconv(2, 18, 3, padding=1, mode=4, eps=1e-9, block=2, layout=layout, shared=shared)
    layer.n_iter = 30  # more than float32 could bear
    layer.weight.data = torch.eye(18).reshape(18, 2, 3, 3)
    layer.bias.data.zero_()
    rows = layer(images(40, 2)).permute(1, 0, 2, 3).flatten(1)
    torch.testing.assert_close(rows.mean(1), torch.zeros(18), atol=1e-7, rtol=0)
    torch.testing.assert_close(rows @ rows.T / rows.shape[1], torch.eye(18), atol=1e-5, rtol=0)


def test_five_steps_whiten_down_to_their_floor():
    layer = FastDeconv(2, 18, 3, padding=1, mode=4, eps=1e-9, block=2, root="newton")
    layer.weight.data = torch.eye(18).reshape(18, 2, 3, 3)
    x = images(40, 2)
    rows = layer(x).permute(1, 0, 2, 3).flatten(1)
    patches = F.unfold(x, 3, padding=1).transpose(0, 1).flatten(1)
    before, after = torch.cov(patches, correction=0), torch.cov(rows, correction=0)
    values, basis = torch.linalg.eigh(before)
    share = values / before.norm()
    std = (basis.T @ after @ basis).diagonal().sqrt()
    assert (std[share > 0.1] - 1).abs().max() < 4e-3
    assert std[share > 0.01].min() > 0.65 and std[share < 1e-3].max() < 0.25  # the known floor
    assert std.max() < 1.001


@pytest.mark.parametrize(("layout", "shared"), VARIANTS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("root", ROOTS)
def test_gradients_match_finite_differences(root, mode, layout, shared):
    layer = FastDeconv(
        *(4, 2, 2), mode=mode, block=2, sampling_stride=2, root=root, layout=layout, shared=shared
    )

    def f(x, weight, bias):
        parameters = {"weight": weight, "bias": bias}
        return torch.func.functional_call(layer, parameters, x)

    x = images(2, 4, 4, 3).requires_grad_()
    assert torch.autograd.gradcheck(f, (x, *layer.parameters()), fast_mode=True)


@pytest.mark.parametrize(("layout", "shared"), VARIANTS)
def test_mode_5_with_stride_1_is_mode_4(layout, shared):
    x = images()
    four, five = (
        FastDeconv(
            *(4, 5, 3),
            mode=m,
            block=2,
            sampling_stride=1,
            rows_per_feature=0,
            layout=layout,
            shared=shared,
        )
        for m in (4, 5)
    )
    five.load_state_dict(four.state_dict())
    torch.testing.assert_close(five(x), four(x), rtol=0, atol=0)


@pytest.mark.parametrize("mode", MODES)
def test_eval_before_training_is_the_plain_convolution(mode):
    layer = FastDeconv(6, 8, (3, 5), 2, 1, groups=2, mode=mode).eval()
    x = images(c=6)
    torch.testing.assert_close(layer(x), nn.Conv2d.forward(layer, x))
    linear = Delinear(6, 3).eval()
    torch.testing.assert_close(linear(x[:, :, 0, 0]), nn.Linear.forward(linear, x[:, :, 0, 0]))


@pytest.mark.parametrize("mode", MODES)
def test_eval_after_one_batch_equals_training_on_it(mode):
    layer = FastDeconv(4, 3, 3, padding=1, mode=mode, block=2)
    x = images()
    y = layer(x)
    torch.testing.assert_close(layer.eval()(x), y)


def test_later_batches_enter_with_the_momentum():
    layer = FastDeconv(4, 3, 3, momentum=0.25)
    layer(images())
    first = layer.running_cov_joint.clone()
    other = FastDeconv(4, 3, 3)
    x = images() * 2
    layer(x), other(x)
    torch.testing.assert_close(
        layer.running_cov_joint, 0.75 * first + 0.25 * other.running_cov_joint
    )


@pytest.mark.parametrize("root", ROOTS)
def test_evaluation_whitens_by_the_root_of_the_average_covariance(root):
    layer = FastDeconv(4, 3, 3, root=root, momentum=0.25, bias=False)
    for scale in 1, 3:
        layer(scale * images())
    whiten = inverse_sqrt(layer.running_cov_joint, layer.n_iter, root, layer.eps)
    expected = layer.weight.detach().flatten(1) @ whiten[0]
    torch.testing.assert_close(layer.whitened_weight().flatten(1), expected)


def test_few_rows_leave_the_covariance_that_many_do():
    x = torch.randn(7, 40)
    few, many = Delinear(40, 2, block=40), Delinear(40, 2, block=40)
    few(x), many(x.repeat(12, 1))
    torch.testing.assert_close(few.running_cov_joint, many.running_cov_joint)


@pytest.mark.parametrize("root", ROOTS)
def test_even_of_fewer_patches_than_features_the_mean_is_that_of_all(root):
    layer = FastDeconv(4, 3, 3, root=root, rows_per_feature=0.1)
    x = images()
    layer(x)
    window = layer.choose_patches(x)[0].grid
    torch.testing.assert_close(
        layer.running_mean, gather(x, window, select_pixels(x, window)).mean((0, 2))
    )


def test_whole_numbers_may_be_floats():
    layer, same = (FastDeconv(8, 3, 3, block=of(4), sampling_stride=of(2)) for of in (float, int))
    same.load_state_dict(layer.state_dict())
    x = images(c=8)
    torch.testing.assert_close(layer(x), same(x), rtol=0, atol=0)


def test_endless_rows_are_all_there_are():
    layer = FastDeconv(4, 3, 3, rows_per_feature=float("inf"))
    assert not isinstance(layer.choose_patches(images())[0], PatchSubset)


def test_input_of_other_features_is_refused_before_it_counts():
    layer = Delinear(8, 2)
    with pytest.raises(ValueError, match=r"8 features, got shape \(4, 6\)"):
        layer(torch.randn(4, 6))
    assert layer.num_batches_tracked == 0


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


@pytest.mark.parametrize("mode", MODES)
def test_batch_of_one_and_a_single_patch(mode):
    layer = FastDeconv(3, 2, 3, mode=mode)
    y = layer(torch.randn(1, 3, 3, 3, requires_grad=True))
    y.sum().backward()
    assert y.isfinite().all() and layer.weight.grad.isfinite().all()
    assert Delinear(5, 2)(torch.randn(1, 5)).isfinite().all()


def test_odd_block_is_visible_and_mixes_no_blocks():
    layer = FastDeconv(20, 4, 3, layout="contiguous", shared=False)
    assert "block=10 (largest divisor up to 16)" in repr(layer)
    assert "block=16" in repr(FastDeconv(32, 4, 3))
    x = images(c=20, n=30)
    layer(x)
    whole = layer.running_cov_joint[0].clone()
    x[:, 10:] = torch.randn_like(x[:, 10:])  # the second block must not reach the first
    layer.momentum = 1.0
    layer(x)
    torch.testing.assert_close(layer.running_cov_joint[0], whole)


def test_groups_whiten_like_separate_layers():
    layer = FastDeconv(8, 6, 3, groups=2, block=2)
    x = images(c=8)
    parts = []
    for half, xs in enumerate(x.chunk(2, dim=1)):
        part = FastDeconv(4, 3, 3, block=2)
        part.weight.data, part.bias.data = (
            p.data[3 * half : 3 * half + 3] for p in (layer.weight, layer.bias)
        )
        parts.append(part(xs))
    torch.testing.assert_close(layer(x), torch.cat(parts, dim=1))


def test_delinear_is_the_same_path_as_a_1x1_convolution():
    linear = Delinear(12, 5, block=4)
    conv = FastDeconv(12, 5, 1, block=4, sampling_stride=1, root="newton")
    conv.weight.data, conv.bias.data = linear.weight.data[..., None, None], linear.bias.data
    x = torch.randn(30, 12)
    torch.testing.assert_close(linear(x), conv(x[..., None, None]).flatten(1))
    torch.testing.assert_close(linear(x.reshape(5, 6, 12)).flatten(0, 1), linear(x))


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


def test_grouped_layers_keep_one_copy_of_their_matrices_for_the_backward():
    def count_kept(groups):
        kept, layer = {}, FastDeconv(256 * groups, 64 * groups, 3, groups=groups)

        def keep(saved):
            kept[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
            return saved

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
            layer(torch.randn(4, 256 * groups, 4, 4))
        return sum(kept.values())

    assert count_kept(2) < 2.5 * count_kept(1)


@pytest.mark.parametrize("mode", MODES)
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


def test_channels_last_gives_the_same_output():
    layer = FastDeconv(4, 8, 3, padding=1)
    x = images()
    expected = layer(x)
    torch.testing.assert_close(layer(x.to(memory_format=torch.channels_last)), expected)
    layer.to(memory_format=torch.channels_last)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("mode", MODES)
def test_forward_on_a_fake_cuda_device_mixes_no_devices(mode):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=False):
        layer = FastDeconv(4, 8, 3, padding=1, mode=mode, device="cuda")
        head = Delinear(8, 2, device="cuda")  # fewer rows than features
        y = head(layer(torch.randn(2, 4, 8, 8, device="cuda")).mean((2, 3)))
        assert y.device.type == "cuda" and y.shape == (2, 2)
        assert {b.device.type for m in (layer, head) for b in m.buffers()} == {"cuda"}
        assert layer.eval()(torch.randn(2, 4, 8, 8, device="cuda")).device.type == "cuda"


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_meta_device_propagates_shapes(mode, training):
    layer = FastDeconv(4, 8, 3, stride=2, mode=mode, device="meta").train(training)
    head = Delinear(8, 2, device="meta").train(training)
    y = layer(torch.randn(2, 4, 9, 9, device="meta"))
    assert y.is_meta and y.shape == (2, 8, 4, 4)
    assert head(y.mean((2, 3))).shape == (2, 2)


@pytest.mark.parametrize(
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(mode=6), "mode.*6"),
        (dict(block=0), "block.*0"),
        (dict(eps=0.0), "eps.*0"),
        (dict(eps=float("nan")), "eps.*nan"),
        (dict(n_iter=0), "n_iter.*0"),
        (dict(n_iter=16), "n_iter.*16"),
        (dict(n_iter=2.5), "n_iter.*whole.*2.5"),
        (dict(momentum=0.0), "momentum.*0"),
        (dict(sampling_stride=0), "sampling_stride.*0"),
        (dict(sampling_stride=1.5), "sampling_stride.*whole.*1.5"),
        (dict(block=2.5), "block.*whole.*2.5"),
        (dict(layout="diagonal"), "layout.*diagonal"),
        (dict(root="square"), "root.*square"),
        (dict(rows_per_feature=-1), "rows_per_feature.*-1"),
        (dict(stride=(1, 0)), "stride.*0"),
        (dict(dilation=0), "dilation.*0"),
        (dict(dtype=torch.complex64), "dtype .* real .*complex64"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        FastDeconv(4, 8, 3, **options)


@pytest.mark.parametrize("kind", [FastDeconv, FastDeconvTranspose1d, Delinear])
@pytest.mark.parametrize("wrong", [0, 1])
def test_layers_of_nothing_are_refused_by_name(kind, wrong):
    side, sizes = ("in", "out")[wrong], [4, 4]
    sizes[wrong] = 0
    name = f"{side}_features" if kind is Delinear else f"{side}_channels"
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        kind(*sizes, *(() if kind is Delinear else (3,)))


def test_wrong_number_of_channels_is_named():
    with pytest.raises(ValueError, match=r"4 channels.*\(2, 1, 9, 9\)"):
        FastDeconv(4, 8, 3)(torch.randn(2, 1, 9, 9))


def test_single_image_needs_no_batch_dimension():
    layer = FastDeconv(4, 8, 3)
    x = images(1)
    torch.testing.assert_close(layer(x[0]), layer(x)[0])


def test_fewer_rows_than_features_whiten_as_the_formula_says():
    layer, x = Delinear(40, 3), torch.randn(10, 40)
    off_centre = x - x.mean(0)
    D = inverse_sqrt((off_centre.T @ off_centre / 10 + layer.eps * torch.eye(40))[None])[0]
    torch.testing.assert_close(layer(x), off_centre @ D @ layer.weight.T + layer.bias)


def test_half_precision_networks_whiten_in_float32():
    layer = FastDeconv(4, 8, 3).float()
    x = 300 * images().float()  # squares overflow float16
    expected = layer(x)
    torch.testing.assert_close(layer.half()(x.half()).float(), expected, atol=0.05, rtol=0.05)


def test_an_update_between_evaluation_and_its_backward_does_no_harm():
    layer, x = FastDeconv(4, 8, 3), images()
    layer(x)
    y = layer.eval()(x).sum()
    layer.train()(x)
    y.backward()
    assert layer.weight.grad.isfinite().all()


@pytest.mark.parametrize(("shares", "per_feature"), [(1, 8), (2, 8), (3, 8), (2, 0), (2, 1e9)])
def test_processes_with_equal_shares_look_at_the_images_that_one_would(
    monkeypatch, shares, per_feature
):
    layer = FastDeconv(4, 8, 3, block=2, rows_per_feature=per_feature)
    x = torch.arange(24.0 * 81).reshape(24, 1, 9, 9).expand(24, 4, 9, 9)

    def seen(images):
        sampling, _ = layer.choose_patches(images)
        return (
            gather(images, sampling, select_pixels(images, sampling)).transpose(1, 2).flatten(0, 1)
        )

    alone = seen(x)
    monkeypatch.setattr("deconv.whitening.is_distributed", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: shares)
    parts = []
    for rank, share in enumerate(x.chunk(shares)):
        monkeypatch.setattr("torch.distributed.get_rank", lambda rank=rank: rank)
        parts.append(seen(share))
    torch.testing.assert_close(torch.cat(parts).sort(dim=0)[0], alone.sort(dim=0)[0])
    # two blocks of 18 features: 72 patches, so 24 images have 3 each of their 9
    assert len(alone) == (72 if per_feature == 8 else 216)


def test_a_layer_shows_what_it_looks_at_and_by_which_root_it_whitens():
    assert "rows_per_feature=24, root=cholesky" in repr(FastDeconv(4, 8, 3))
    shown = repr(FastDeconv(4, 8, 3, rows_per_feature=4, root="newton"))
    assert "rows_per_feature=4, root=newton" in shown


def test_small_maps_keep_their_memory_format():
    layer = FastDeconv(8, 64, 3, mode=3).to(memory_format=torch.channels_last)
    x = images(n=3, c=8, h=4, w=4).contiguous(memory_format=torch.channels_last)
    assert x.numel() < layer.weight.numel()
    assert layer(x).is_contiguous(memory_format=torch.channels_last)
