"""FastDeconv in 1 to 3 dimensions against brute force and finite differences."""

import itertools
import pickle

import pytest
import torch
from torch.nn import functional as F

import deconv
from deconv import Delinear, FastDeconv, FastDeconvTranspose1d, fuse
from deconv.conv import MODES, ROOTS
from deconv.ops.gathering import gather, select_pixels
from deconv.ops.patches import PatchSubset
from deconv.surgery.plan import DECONVOLUTIONS
from deconv.sync import BatchShare
from tests.oracle import (
    CONVOLUTIONS,
    TRANSPOSED,
    brute_force,
    brute_force_joint,
    images,
    make_exact,
    make_maps,
)
from tests.pairwise import loop_over, pairwise

LAYOUTS = "contiguous", "interleaved"
VARIANTS = list(itertools.product(LAYOUTS, (True, False)))
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


@pytest.mark.parametrize(
    ("root", "mode", "geometry", "layout", "shared"),
    pairwise(ROOTS, [*MODES], GEOMETRIES, LAYOUTS, [True, False]),
)
def test_fold_then_convolve_equals_whiten_then_convolve(root, mode, geometry, layout, shared):
    options = dict(mode=mode, block=2, n_iter=15, eps=0.3, sampling_stride=2) | geometry
    options |= dict(root=root, rows_per_feature=0 if root == "newton" else 4)
    layer = FastDeconv(4, 8, **options, layout=layout, shared=shared)
    x = images()
    torch.testing.assert_close(layer(x), brute_force(layer, x), rtol=1e-8, atol=1e-8)


@loop_over(
    ("geometry", "kind", "mode"),
    pairwise(
        [
            dict(kernel_size=3, padding=1),
            dict(kernel_size=2, stride=2, dilation=2, groups=2, bias=False),
            dict(kernel_size=3, padding=2, padding_mode="reflect"),
            dict(kernel_size=2, stride=2, padding=1, padding_mode="replicate", groups=4),
            dict(kernel_size=3, padding="same", dilation=2, padding_mode="circular"),
        ],
        CONVOLUTIONS,
        [4, 5],
    ),
)
def test_convolutions_whiten_what_the_kernel_sees(geometry, kind, mode):
    dims = 1 + CONVOLUTIONS.index(kind)
    layer, x = make_exact(kind, 4, 8, mode=mode, sampling_stride=2, **geometry), make_maps(dims)
    y = layer(x)
    assert y.shape == kind.forward(layer, x).shape
    steps = (1 if mode == 4 else 2,) * dims
    torch.testing.assert_close(y, brute_force_joint(layer, x, steps), rtol=1e-7, atol=1e-7)


@loop_over(("layout", "shared"), VARIANTS)
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


@loop_over(
    ("kind", "root", "mode", "groups", "rows_per_feature"),  # 0: all patches, 0.5: a subset
    pairwise([*CONVOLUTIONS, *TRANSPOSED], ROOTS, [1, 2, 3, 5], [1, 2], [0, 0.5]),
)
def test_gradients_of_every_kind_match_finite_differences(
    kind, root, mode, groups, rows_per_feature
):
    options = dict(stride=2, n_iter=5, sampling_stride=1, rows_per_feature=rows_per_feature)
    layer = make_exact(kind, 4, 2, 2, mode=mode, root=root, groups=groups, block=2, **options)

    def f(x, weight, bias):
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, x)

    x = make_maps(layer.weight.dim() - 2, 2)
    some = isinstance(layer.choose_patches(x)[0], PatchSubset)
    assert some == (rows_per_feature > 0 and mode != 3)
    x.requires_grad_()
    assert torch.autograd.gradcheck(f, (x, *layer.parameters()), fast_mode=True)


@pytest.mark.parametrize(
    ("root", "mode", "layout", "shared"), pairwise(ROOTS, [*MODES], LAYOUTS, [True, False])
)
def test_gradients_match_finite_differences(root, mode, layout, shared):
    layer = FastDeconv(
        *(4, 2, 2), mode=mode, block=2, sampling_stride=2, root=root, layout=layout, shared=shared
    )

    def f(x, weight, bias):
        parameters = {"weight": weight, "bias": bias}
        return torch.func.functional_call(layer, parameters, x)

    x = images(2, 4, 4, 3).requires_grad_()
    assert torch.autograd.gradcheck(f, (x, *layer.parameters()), fast_mode=True)


@loop_over(("layout", "shared"), VARIANTS)
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


@loop_over(
    ("layer", "patches"),
    [
        (FastDeconv(16, 8, 3), 24 * 144),
        (FastDeconv(32, 8, 3), 24 * 144 / 2),  # two blocks share a matrix
        (FastDeconv(32, 32, 3, groups=32), 2048),
        (FastDeconv(32, 8, 1), 2048 / 2),
        (FastDeconv(32, 32, 3, groups=32, rows_per_feature=24), 24 * 9),
    ],
)
def test_by_default_small_matrices_are_estimated_from_2048_rows(layer, patches):
    x = torch.empty(8, layer.in_channels, 100, 100, device="meta")
    sampling, _ = layer.choose_patches(x)
    assert sampling.per_image == round(patches / 8)


@pytest.mark.parametrize(("shares", "per_feature"), [(1, 8), (2, 8), (3, 8), (2, 0), (2, 1e9)])
def test_ranks_with_equal_shares_sample_the_patches_that_one_rank_would(
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
    monkeypatch.setattr("deconv.whitening.find_share", BatchShare)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda group: shares)
    parts = []
    for rank, share in enumerate(x.chunk(shares)):
        monkeypatch.setattr("torch.distributed.get_rank", lambda group, rank=rank: rank)
        parts.append(seen(share))
    torch.testing.assert_close(torch.cat(parts).sort(dim=0)[0], alone.sort(dim=0)[0])
    # two blocks of 18 features: 72 patches, so 24 images have 3 each of their 9
    assert len(alone) == (72 if per_feature == 8 else 216)


def test_small_maps_keep_their_memory_format():
    layer = FastDeconv(8, 64, 3, mode=3).to(memory_format=torch.channels_last)
    x = images(n=3, c=8, h=4, w=4).contiguous(memory_format=torch.channels_last)
    assert x.numel() < layer.weight.numel()
    assert layer(x).is_contiguous(memory_format=torch.channels_last)


def test_channels_last_gives_the_same_output():
    layer = FastDeconv(4, 8, 3, padding=1)
    x = images()
    expected = layer(x)
    torch.testing.assert_close(layer(x.to(memory_format=torch.channels_last)), expected)
    layer.to(memory_format=torch.channels_last)
    torch.testing.assert_close(layer(x), expected)


def test_single_image_needs_no_batch_dimension():
    layer = FastDeconv(4, 8, 3)
    x = images(1)
    torch.testing.assert_close(layer(x[0]), layer(x)[0])


@pytest.mark.parametrize("kind", DECONVOLUTIONS)
@pytest.mark.parametrize("modes", [(1, 2), (3, 4, 5)])
def test_every_kind_is_the_plain_layer_before_training_and_fused(kind, modes):
    for mode in modes:
        dims = 1 + (CONVOLUTIONS.index(kind) if kind in CONVOLUTIONS else TRANSPOSED.index(kind))
        layer, x = (
            make_exact(kind, 4, 6, 3, stride=2, padding=1, groups=2, mode=mode),
            make_maps(dims),
        )
        torch.testing.assert_close(layer.eval()(x), kind.forward(layer, x), rtol=1e-10, atol=1e-10)
        y = layer.train()(x)
        torch.testing.assert_close(layer.eval()(x), y)
        torch.testing.assert_close(layer(x[0]), y[0])  # without a batch
        plain = fuse(layer)
        assert type(plain) is kind and b"deconv" not in pickle.dumps(plain)
        torch.testing.assert_close(plain(x), layer(x), rtol=1e-10, atol=1e-10)


@loop_over(
    ("options", "message"),
    [
        (dict(mode=6), "mode.*6"),
        (dict(mode=True), "mode.*True"),
        (dict(block=0), "block.*0"),
        (dict(block=None), "block.*None"),
        (dict(eps=0.0), "eps.*0"),
        (dict(eps=None), "eps.*None"),
        (dict(shared="no"), "shared.*'no'"),
        (dict(sync_stats=None), "sync_stats.*None"),
        (dict(track_running_stats="no"), "track_running_stats.*'no'"),
        (dict(freeze=1), "freeze.*1"),
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


@loop_over("kind", [FastDeconv, FastDeconvTranspose1d, Delinear])
@loop_over("wrong", [0, 1])
def test_layers_of_nothing_are_refused_by_name(kind, wrong):
    side, sizes = ("in", "out")[wrong], [4, 4]
    sizes[wrong] = 0
    name = f"{side}_features" if kind is Delinear else f"{side}_channels"
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        kind(*sizes, *(() if kind is Delinear else (3,)))


def test_wrong_number_of_channels_is_named():
    with pytest.raises(ValueError, match=r"4 channels.*\(2, 1, 9, 9\)"):
        FastDeconv(4, 8, 3)(torch.randn(2, 1, 9, 9))


def test_a_layer_shows_what_it_looks_at_and_by_which_root_it_whitens():
    assert "sampling_stride=3, root=cholesky" in repr(FastDeconv(4, 8, 3))
    shown = repr(FastDeconv(4, 8, 3, rows_per_feature=4, root="newton"))
    assert "rows_per_feature=4, root=newton" in shown


@loop_over("name", [name for name in deconv.__all__ if name.startswith("FastDeconv")])
def test_unknown_and_missing_arguments_are_named_with_the_layer(name):
    kind = getattr(deconv, name)
    with pytest.raises(TypeError, match=r"FastDeconv.*__init__\(\) got .*'bloc'"):
        kind(4, 8, 3, bloc=2)
    with pytest.raises(TypeError, match=r"FastDeconv.*__init__\(\) missing .*'kernel_size'"):
        kind(4, 8)
    assert kind(4, 8, 3, block=2, device="meta", dtype=torch.float32).weight.is_meta


@loop_over("shape", [(2, 4, 9), (2, 3, 9, 9), (2, 4, 9, 9, 9)])
def test_input_of_another_kind_is_named(shape):
    for layer in (FastDeconv(4, 8, 3), deconv.FastDeconvTranspose2d(4, 8, 3)):
        with pytest.raises(ValueError, match=r"4 channels and 2 dimensions.*\(2, "):
            layer(torch.randn(shape))
