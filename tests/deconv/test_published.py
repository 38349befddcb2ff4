"""Published layers and their checkpoints."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import deconv
from deconv import PUBLISHED, published, whiteness
from deconv.ops.inverse_sqrt import inverse_sqrt
from deconv.published import covariance_behind
from tests.oracle import brute_force, images
from tests.pairwise import loop_over


def root(cov, eps, n_iter):
    """Return D by Newton-Schulz as published, scaled by the Frobenius norm."""
    cov = cov + eps * torch.eye(len(cov)).to(cov)
    Y, Z, identity = cov / cov.norm(), torch.eye(len(cov)).to(cov), torch.eye(len(cov)).to(cov)
    for _ in range(n_iter):
        T = (3 * identity - Z @ Y) / 2
        Y, Z = Y @ T, T @ Z
    return Z / cov.norm().sqrt()


def find_rows(x, layer, step):
    """Return the patches at every `step`-th position, (N, L, features), of images or signals."""
    single = (1,) * (2 - len(layer.kernel_size))
    kernel, stride, dilation = (
        (*single, *getattr(layer, name)) for name in ("kernel_size", "stride", "dilation")
    )
    padding = (0,) * len(single) + layer.padding
    stride = [step * s for s in stride]
    x = x if x.dim() == 4 else x[:, :, None]
    return F.unfold(x, kernel, dilation, padding, stride).mT


def published_conv(x, layer, block, eps, n_iter, running=None, year=2020, step=3):
    """Whiten every patch as published, then apply the weight; return y, mean and D of groups.

    2020: the mean is that of pooled blocks. 2019: channels c mod G lose theirs before padding.
    """
    if year == 2019:
        means = x.mean((0, 2, 3)).reshape(-1, block).mean(0) if running is None else running[0][0]
        x = x - means.repeat(x.shape[1] // block)[:, None, None]
    sampled, seen = (find_rows(x, layer, s).chunk(layer.groups, -1) for s in (step, 1))
    out, stats = [], []
    for g, weight in enumerate(layer.weight.flatten(1).chunk(layer.groups)):
        features = block * layer.weight[0, 0].numel()
        rows = sampled[g].flatten(0, 1).unflatten(1, (features, -1)).mT.flatten(0, 1)
        mean = torch.zeros_like(rows[0]) if year == 2019 else rows.mean(0)
        D = root((rows - mean).T @ (rows - mean) / len(rows), eps, n_iter)
        if running is not None:
            mean, D = (mean if year == 2019 else running[g][0]), running[g][1]
        white = (seen[g].unflatten(2, (features, -1)).mT - mean) @ D.T  # N L blocks features
        weight = weight.unflatten(1, (features, -1)).mT
        out.append(torch.einsum("nlbf,obf->nol", white, weight))
        stats.append((means if year == 2019 else mean, D))
    bias = 0 if layer.bias is None else layer.bias[:, None]
    return torch.cat(out, 1) + bias, stats


def published_linear(x, layer, block, eps, n_iter, running=None):
    """Whiten blocks of neighbouring features as published, then apply the weight."""
    rows = x.reshape(-1, block)
    mean = rows.mean(0)
    D = root((rows - mean).T @ (rows - mean) / len(rows), eps, n_iter)
    mean, D = running[0] if running is not None else (mean, D)
    return F.linear(((rows - mean) @ D.T).reshape(x.shape), layer.weight, layer.bias), [(mean, D)]


def follow_published(layer, oracle, batches):
    """Compare values and gradients of five steps, then running statistics and evaluation."""
    running, matrix = None, getattr(layer, "matrix_name", "running_deconv")
    for x in batches:
        x, again = x.clone().requires_grad_(), x.clone().requires_grad_()
        expected, stats = oracle(again, layer)
        y, factor = layer(x), torch.linspace(-1, 1, expected.numel()).reshape(expected.shape)
        torch.testing.assert_close(y.reshape(expected.shape), expected)
        expected_grads = torch.autograd.grad((expected * factor).sum(), [again, layer.weight])
        grads = torch.autograd.grad((y.reshape(expected.shape) * factor).sum(), [x, layer.weight])
        torch.testing.assert_close(grads, expected_grads)
        if running is None:
            running = [(torch.zeros_like(m), torch.eye(len(D)).to(D)) for m, D in stats]
        running = [
            tuple(0.9 * old + 0.1 * new.detach() for old, new in zip(*pair, strict=True))
            for pair in zip(running, stats, strict=True)
        ]
    mean, D = torch.cat([mean for mean, _ in running]), torch.stack([D for _, D in running])
    torch.testing.assert_close(layer.running_mean.flatten(), mean)
    torch.testing.assert_close(getattr(layer, matrix), D.squeeze(0) if len(D) == 1 else D)
    y = layer.eval()(batches[0])
    expected, _ = oracle(batches[0], layer, running=running)
    torch.testing.assert_close(y.reshape(expected.shape), expected)
    torch.testing.assert_close(deconv.fuse(layer)(batches[0]), y)


def doubles(channels, *size, count=6):
    """Return five batches of correlated inputs with an offset, float64."""
    if len(size) == 2:
        return [images(count, channels, *size).double() for _ in range(5)]
    x = [torch.randn(count, channels, *size, dtype=torch.float64) for _ in range(5)]
    offsets = torch.arange(channels).reshape(-1, *(1,) * len(size))
    return [batch + 0.7 * batch.roll(1, 1) + offsets for batch in x]


NAMED = partial(published.FastDeconv, num_groups=16, eps=1e-2, n_iter=5, bias=True)
CALLS_2020 = [  # call, its batches, block, eps, n_iter
    (lambda: published.FastDeconv(3, 3, kernel_size=3, stride=1, padding=1), (3, 9, 9), 3),
    (lambda: published.FastDeconv(8, 8, 3, padding=1), (8, 9, 9), 8),
    (lambda: published.FastDeconv(8, 6, 3, padding=1, block=4), (8, 9, 9), 4),
    (lambda: published.FastDeconv(12, 6, 3, 2, 1, block=8), (12, 9, 11), 4),  # gcd of 12 and 8
    (lambda: published.FastDeconv(8, 6, 3, 1, 2, 2, 2, True, 1e-5, 5, 0.1, 64, 2), (8, 9, 9), 4),
    (lambda: published.FastDeconv(6, 6, 1, bias=False), (6, 9, 9), 6),
    (lambda: published.FastDeconv(3, 8, kernel_size=7, stride=2, padding=3), (3, 24, 24), 3),
    (lambda: published.FastDeconv(2, 4, 9), (2, 60), 2),
    (lambda: published.FastDeconv(4, 4, 5, 2, 2, block=2), (4, 60), 2),
    (lambda: published.FastDeconv(4, 4, (5,)), (4, 60), 4),
    (lambda: published.FastDeconv1d(4, 6, 3, padding=1, groups=2), (4, 60), 2),
    (lambda: published.NormalizedDeconv(4, 4, 3, padding=1), (4, 9, 9), 4),
]


@loop_over("call, shape, block", CALLS_2020)
def test_calls_of_2020_equal_the_published_layer(call, shape, block):
    layer = call().double()
    if len(shape) == 2:
        layer.eval()(doubles(*shape)[0])  # the first signal decides, without statistics
        assert type(layer.train()) is published.FastDeconv1d
    step, eps = layer.sampling_stride, 1e-5
    oracle = partial(published_conv, block=block, eps=eps, n_iter=layer.n_iter, step=step)
    follow_published(layer, oracle, doubles(*shape))


@loop_over(
    "call, block",
    [
        (lambda: published.Delinear(6, 4), 6),
        (lambda: published.DeLinear(6, 4, False, 1e-5, 5, 0.1, 4), 2),
        (lambda: published.NormalizedDelinear(6, 4, block=3), 3),
    ],
)
def test_linear_calls_equal_the_published_layer(call, block):
    layer = call().double()
    oracle = partial(published_linear, block=block, eps=1e-5, n_iter=5)
    follow_published(layer, oracle, doubles(6, count=40))


@loop_over(
    "call, channels, block",
    [
        (lambda: NAMED(3, 8, kernel_size=3, padding=1, sampling_stride=3), 3, 3),
        (lambda: published.FastDeconv(8, 6, 3, 2, 1, 1, True, num_groups=4), 8, 4),
        (lambda: published.FastDeconv2019(8, 6, 3, 1, 0, 2, False, 1e-2, 5, 0.1, 4, 3), 8, 4),
    ],
)
def test_calls_of_2019_equal_the_published_layer(call, channels, block):
    layer = call().double()
    assert type(layer) is published.FastDeconv2019 and layer.eps == 1e-2
    assert layer.running_mean.shape == (1, block, 1, 1)
    oracle = partial(published_conv, block=block, eps=1e-2, n_iter=5, year=2019)
    follow_published(layer, oracle, doubles(channels, 11, 11))


@loop_over("tracks", [True, False])
def test_whiteness_of_a_layer_of_2019_pads_with_its_mean(tracks):
    options = dict(n_iter=15, momentum=1.0, num_groups=4, track_running_stats=tracks)
    layer, x = published.FastDeconv2019(4, 6, 3, padding=1, eps=1e-5, **options), images() + 100
    layer(x)
    (row,) = whiteness(layer, x)
    assert row.after > 0.9


def test_hooks_of_a_fused_layer_of_2019_run_once_on_its_input():
    layer, x = published.FastDeconv2019(4, 6, 3, padding=1, num_groups=4), doubles(4, 9, 9)[0]
    layer.double()(x)
    layer.register_forward_pre_hook(lambda module, args: (3 * args[0],))
    layer.register_forward_hook(lambda module, args, y: 2 * y)
    layer.eval()
    for fused in (layer.fuse(), deconv.fuse(layer), deconv.fuse(nn.Sequential(layer).eval())):
        torch.testing.assert_close(fused(x), layer(x))


def published_channels(x, layer, running=None):
    """Whiten blocks of channels by their uncentred second moment, normalise the rest."""
    B, n = layer.block, x.shape[1] // layer.block
    pixels = x.reshape(len(x), x.shape[1], -1).mT  # N P C
    first, rest = pixels[..., : n * B], pixels[..., n * B :]
    some = x[..., ::3, ::3].flatten(2).mT if x.dim() == 4 else pixels
    rows = some[..., : n * B].unflatten(-1, (B, n)).mT.flatten(0, 2)
    mean, D = rows.mean(0), root(rows.T @ rows / len(rows), layer.eps, layer.n_iter)
    stats = mean, D, rest.mean(), (rest - rest.mean()).square().mean()
    mean, D, rest_mean, var = stats if running is None else running
    white = ((first.unflatten(-1, (B, n)).mT - mean) @ D.T).mT.flatten(2)
    rest = (rest - rest_mean) / (var + layer.eps).sqrt()
    return torch.cat([white, rest], -1).mT.reshape(x.shape), stats


@loop_over("shape", [(8, 9, 9), (10, 9, 9), (10,), (4, 7, 7)])
def test_channel_deconv_equals_the_published_layer(shape):
    layer, running = published.ChannelDeconv(4).double(), None
    for x in doubles(*shape, count=40):
        x = x.requires_grad_()
        y, (expected, stats) = layer(x), published_channels(x, layer)
        torch.testing.assert_close(y, expected)
        factor = torch.linspace(-1, 1, y.numel()).reshape(y.shape)
        torch.testing.assert_close(
            *(torch.autograd.grad((each * factor).sum(), x) for each in (y, expected))
        )
        running = stats if running is None else running  # the first batch replaces 0 and I
        running = [0.9 * old + 0.1 * new.detach() for old, new in zip(running, stats, strict=True)]
    if shape[0] % 4:
        names = ("running_mean1", "running_deconv", "running_mean2", "running_var")
    else:
        names = ("running_mean1", "running_deconv")
    for name, value in zip(names, running, strict=False):
        torch.testing.assert_close(getattr(layer, name).squeeze(), value.squeeze().detach())
    running = [value.detach() for value in running]
    torch.testing.assert_close(layer.eval()(x), published_channels(x, layer, running)[0])


def test_channel_deconv_skips_batches_without_finite_statistics():
    layer, other, x = published.ChannelDeconv(4), published.ChannelDeconv(4), torch.randn(8, 6, 3)
    for batch in (x[:0], x * torch.nan, x, x[:0]):  # the first good batch replaces 0 and I
        layer(batch)
    other(x)
    torch.testing.assert_close(layer.state_dict(), other.state_dict())
    other.half()(400 * x.half())  # a variance of 160,000 is infinite
    torch.testing.assert_close(layer.half().state_dict(), other.state_dict())


@loop_over("mode", [1, 2, 4])
def test_deconv2d_is_the_mode_over_every_patch(mode):
    layer = published.DeConv2d(8, 6, 3, 1, 1, 1, True, 1e-2, 15, 0.1, mode, 4).double()
    x = doubles(8, 9, 9)[0]
    torch.testing.assert_close(layer(x), brute_force(layer, x), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="mode must be 1, 2 or 4, got 3"):
        published.DeConv2d(8, 6, 3, mode=3)


@loop_over("make", [published.FastDeconv, published.NormalizedDeconv])
def test_a_frozen_stem_estimates_and_then_keeps_its_statistics(make):
    stem = make(3, 64, kernel_size=7, stride=2, padding=3, freeze=True, freeze_iter=2, n_iter=15)
    stem = stem.double()
    oracle = partial(published_conv, block=3, eps=1e-5, n_iter=15)
    x = doubles(3, 24, 24)[0]
    for _ in range(2):
        expected, stats = oracle(x, stem)
        torch.testing.assert_close(stem(x).flatten(2), expected)
    weight = 0.1 + 0.9 * 0.1  # of two equal batches; the rest is mean 0 and D = I
    mean, D = weight * stats[0][0], weight * stats[0][1] + (1 - weight) * torch.eye(147)
    for _ in range(18):
        expected, _ = oracle(x, stem, running=[(mean, D)])
        torch.testing.assert_close(stem(x).flatten(2), expected)
    torch.testing.assert_close(stem(x).flatten(2), oracle(x, stem)[0])


@loop_over("norm_type", ["none", "l1norm", "layernorm"])
def test_norm_types_scale_each_sample_before_whitening(norm_type):
    calls = (
        (lambda **more: published.NormalizedDeconv(4, 6, 3, padding=1, **more), (4, 9, 9)),
        (lambda **more: published.NormalizedDelinear(6, 4, **more), (6,)),
    )
    for call, shape in calls:
        layer, plain = call(norm_type=norm_type).double(), call().double()
        plain.load_state_dict(layer.state_dict())
        x = doubles(*shape, count=40)[0]
        dims = tuple(range(1, x.dim()))
        if norm_type == "l1norm":
            scaled = x / (x.abs().mean(dims, keepdim=True) + 1e-5)
        elif norm_type == "layernorm":
            scaled = (x - x.mean(dims, keepdim=True)) / (x.std(dims, keepdim=True) + 1e-5)
        else:
            scaled = x
        torch.testing.assert_close(layer(x), plain(scaled))
        torch.testing.assert_close(deconv.fuse(layer.eval())(x), plain.eval()(scaled))
    with pytest.raises(ValueError, match="norm_type must be one of .*, got 'l2'"):
        published.NormalizedDeconv(4, 4, 3, norm_type="l2")


@loop_over(
    "make",
    [
        lambda: published.FastDeconv(4, 4, 3),
        lambda: published.FastDeconv(4, 4, 3, num_groups=2),
        lambda: published.NormalizedDelinear(4, 4),
        lambda: published.FastDeconv(4, 4, (3,)),
    ],
)
def test_published_layers_are_copied_pickled_and_recalibrated(make):
    layer = make()
    x = torch.randn(8, 4, *(7,) * (layer.weight.dim() - 2))
    layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(other) is type(layer)
        torch.testing.assert_close(other.eval()(x), layer.eval()(x))
    layer.reset_running_stats()
    state = {name: value for name, value in make().state_dict().items() if "running" in name}
    assert all(torch.equal(layer.state_dict()[name], value) for name, value in state.items())
    assert deconv.recalibrate(layer, [x]) == 1
    whitened = layer(x)
    torch.testing.assert_close(layer.train()(x), whitened, rtol=1e-4, atol=1e-4)


def test_calls_that_the_published_classes_cannot_take_are_refused():
    with pytest.raises(ValueError, match="at least 4 channels"):
        published.ChannelDeconv(4)(torch.randn(8, 3))
    for sizes in ((), (4, 4)):
        with pytest.raises(ValueError, match="give one of block and num_groups"):
            published.ChannelDeconv(**dict(zip(("block", "num_groups"), sizes, strict=False)))

    for call in (published.ChannelDeconv, partial(published.Delinear, 4, 4, block=0)):
        with pytest.raises(ValueError, match="block must be at least 1, got 0"):
            call(block=0)
    with pytest.raises(ValueError, match="the layer of 2019 takes no input_norm, got 'l1'"):
        published.FastDeconv(4, 4, 3, num_groups=2, input_norm="l1")

    with pytest.raises(TypeError, match="groups must be a number, got False: .* of 2019"):
        published.FastDeconv(4, 4, 3, 1, 1, 1, False)  # bias in the order of 2019

    class Own(published.FastDeconv):
        pass

    with pytest.raises(TypeError, match="subclass FastDeconv2019"):
        Own(4, 4, 3, num_groups=2)


LAYERS_1D = [
    {},
    dict(stride=2, padding=3, dilation=2),
    dict(groups=2, bias=False),
    dict(padding=2, padding_mode="reflect", block=2, freeze=True, freeze_iter=1),
    dict(padding="same", track_running_stats=False),
]


@loop_over("options", LAYERS_1D)
def test_a_layer_that_meets_signals_first_becomes_the_1d_layer(options):
    layer, other = (published.FastDeconv(4, 6, 5, **options) for _ in range(2))
    copied, weight = copy.deepcopy(layer), layer.weight
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    x = torch.randn(8, 4, 60)
    state = torch.get_rng_state()
    layer(x)
    assert torch.equal(state, torch.get_rng_state())  # checkpointing repeats the forward
    expected = published.FastDeconv1d(4, 6, 5, **options)
    for one_d in (layer, other, copied):
        one_d.load_state_dict(layer.state_dict() if one_d is other else expected.state_dict())
        assert type(one_d) is published.FastDeconv1d and repr(one_d) == repr(expected)
    other.load_state_dict(expected.state_dict())
    values = {name: value for name, value in vars(expected).items() if name[0] != "_"}
    assert values.items() <= vars(other).items()
    for _ in range(3):
        x = torch.randn(8, 4, 60)
        assert torch.equal(other(x), expected(x))
    optimizer.zero_grad()
    layer(x).square().mean().backward()
    optimizer.step()
    assert layer.weight is weight and not torch.equal(layer.weight, expected.weight)
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(again.eval()(x), layer.eval()(x))
        layer.train()


def test_the_weight_for_signals_is_distributed_as_that_of_a_new_1d_layer():
    layer, expected = published.FastDeconv(64, 64, 9), published.FastDeconv1d(64, 64, 9)
    layer(torch.randn(2, 64, 30))
    assert layer.weight.std().item() == pytest.approx(expected.weight.std().item(), rel=0.02)
    for new, old in ((layer.weight, expected.weight), (layer.bias, expected.bias)):
        assert new.abs().max().item() == pytest.approx(old.abs().max().item(), rel=0.1)


def test_layers_with_a_past_refuse_to_become_1d():
    signal, image = torch.randn(8, 4, 60), torch.randn(8, 4, 9, 9)

    def refuse(match, x=signal, prepare=lambda layer: None, call=published.FastDeconv):
        layer = call(4, 6, 3)
        prepare(layer)
        with pytest.raises(ValueError, match=match):
            layer(x)

    refuse("must be images .* import FastDeconv1d", prepare=lambda layer: layer(image))
    refuse("images .N, 4, H, W. or signals .N, 4, L.", x=signal.mT)
    refuse("bias was changed", prepare=lambda layer: nn.init.ones_(layer.weight))
    refuse("must be images", call=published.NormalizedDeconv)
    for duplicate in (copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))):
        layer, changed = published.FastDeconv(4, 6, 3), published.FastDeconv(4, 6, 3)
        nn.init.ones_(changed.bias)
        changed_later = duplicate(layer)
        nn.init.ones_(changed_later.bias)
        for copied in (duplicate(changed), changed_later):
            with pytest.raises(ValueError, match="bias was changed"):
                copied(signal)
    refuse("must be images", call=partial(published.FastDeconv, stride=(1, 1)))
    layer = published.FastDeconv(4, 6, 3)
    y = torch.compile(layer, backend="eager")(signal)  # the compiler leaves out the first signal
    torch.testing.assert_close(layer(signal), y)

    layer = published.FastDeconv(4, 6, 3)
    layer.load_state_dict(published.FastDeconv(4, 6, 3).state_dict())
    with pytest.raises(ValueError, match="must be images"):
        layer(signal)
    layer = published.FastDeconv(4, 6, 3)
    layer.reset_parameters()
    layer(signal)
    with pytest.raises(ValueError, match="4 channels and 1 dimensions of pixels"):
        layer(image)


@loop_over("n_iter", [1, 5, 15])
def test_covariance_behind_is_the_way_back_through_the_root(n_iter):
    basis = torch.linalg.qr(torch.randn(2, 12, 12, dtype=torch.float64)).Q
    cov = (basis * torch.logspace(1, -2, 12, dtype=torch.float64)) @ basis.mT
    whiten = inverse_sqrt(cov, n_iter, "newton", 1e-2)
    found = covariance_behind(whiten, n_iter, 1e-2)
    again = inverse_sqrt(found, n_iter, "newton", 1e-2)
    torch.testing.assert_close(again, whiten, rtol=0, atol=1e-9)
    if n_iter > 1:  # one step is not one to one in float64
        torch.testing.assert_close(found, cov, rtol=1e-5, atol=1e-7)


def test_published_numerics_whiten_images_in_0_to_1_more():
    def median(n_iter, **options):
        layer = deconv.FastDeconv(3, 8, 3, padding=1, n_iter=n_iter, **options)
        layer(images)
        (row,) = whiteness(layer, images)
        return torch.linalg.eigvalsh(row.covariances[1]).median()

    torch.manual_seed(0)  # colours that differ little, as in photographs
    noise = torch.randn(64, 1, 38, 38) + 0.2 * torch.randn(64, 3, 38, 38)
    images = (0.5 + F.avg_pool2d(noise, 7, stride=1)).clamp(0, 1)
    assert median(5, **PUBLISHED) > 1.2 * median(5)
    assert median(15, **PUBLISHED) > 0.9 and median(15) < 0.3


def test_published_numerics_fit_all_that_takes_keywords_of_a_layer():
    model = nn.Sequential(nn.Conv2d(80, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 2))
    assert "FastDeconv" in str(deconv.plan(model, **PUBLISHED))
    for layer in (
        deconv.convert(model, **PUBLISHED)[0],
        deconv.FastDeconv1d(80, 8, 3, **PUBLISHED),
    ):
        assert (layer.eps, layer.block, layer.root) == (1e-5, 64, "newton")
        assert layer.rows_per_feature == 0 and layer.layout == "interleaved" and layer.shared


def train(layer, batches, to=torch.float32):
    """Return the layer in evaluation, after steps on the batches."""
    layer.double()
    for x in batches:
        layer(x)
    return layer.to(to).eval()


CONV = dict(root="newton", eps=1e-5, rows_per_feature=0)
PAIRS = [  # published layer, layer of deconv, shape of a sample
    (
        lambda: published.FastDeconv(8, 6, 3, padding=1),
        lambda: deconv.FastDeconv(8, 6, 3, padding=1, block=8, **CONV),
        (8, 9, 9),
    ),
    (
        lambda: published.FastDeconv(8, 6, 3, block=4, n_iter=7),
        lambda: deconv.FastDeconv(8, 6, 3, block=4, n_iter=7, mode=4, **CONV),
        (8, 9, 9),
    ),
    (
        lambda: published.FastDeconv(8, 6, 3, groups=2),
        lambda: deconv.FastDeconv(8, 6, 3, groups=2, **CONV),
        (8, 9, 9),
    ),
    (
        lambda: published.NormalizedDeconv(4, 6, 1),
        lambda: deconv.FastDeconv(4, 6, 1, **CONV),
        (4, 9, 9),
    ),
    (
        lambda: published.FastDeconv2019(8, 6, 3, num_groups=4),
        lambda: deconv.FastDeconv(8, 6, 3, block=4, **{**CONV, "eps": 1e-2}),
        (8, 9, 9),
    ),
    (
        lambda: published.FastDeconv1d(4, 6, 5, padding=2),
        lambda: deconv.FastDeconv1d(4, 6, 5, padding=2, **CONV),
        (4, 40),
    ),
    (
        lambda: published.Delinear(6, 4, block=3),
        lambda: deconv.Delinear(6, 4, block=3, eps=1e-5, root="newton", layout="contiguous"),
        (6,),
    ),
]


@loop_over("old, new, shape", PAIRS)
def test_published_checkpoints_evaluate_the_same_in_layers_of_deconv(old, new, shape):
    batches = doubles(*shape, count=40)
    old = train(old(), batches, to=torch.float64)
    state, new = old.state_dict(), new()
    keys = {"weight", "bias", "running_mean", getattr(old, "matrix_name", "running_deconv")}
    assert set(state) == keys  # those of the published layer, and no others
    nn.Sequential(new).load_state_dict({f"0.{name}": value for name, value in state.items()})
    assert new.num_batches_tracked == 1
    y, x = new.eval()(batches[0].float()), batches[0]
    torch.testing.assert_close(y, old(x).float(), rtol=1e-4, atol=1e-4)
    new(x.float())
    new.train()(x.float()).square().mean().backward()  # the statistics go on


def test_a_mean_of_roots_has_a_covariance():
    stem = published.FastDeconv(3, 4, 3).double()
    for scale in (1, 3, 0.2, 2, 0.5):
        stem(scale * doubles(3, 9, 9)[0])
    new = deconv.FastDeconv(3, 4, 3, **CONV).double()
    new.load_state_dict(stem.state_dict())
    (x, *_) = doubles(3, 9, 9)
    torch.testing.assert_close(new.eval()(x), stem.eval()(x), rtol=1e-6, atol=1e-6)


@loop_over(
    "old, new, reason",
    [
        (PAIRS[0][0], lambda: deconv.FastDeconv(8, 6, 3, padding=1), "needs .* root='newton'"),
        (PAIRS[1][0], lambda: deconv.FastDeconv(8, 6, 3, **PUBLISHED), "needs .* block=4"),
        (
            PAIRS[1][0],
            lambda: deconv.FastDeconv(8, 6, 3, **{**PUBLISHED, "block": 4}, shared=False),
            "needs .* shared=True",
        ),
        (
            PAIRS[1][0],
            lambda: deconv.FastDeconv(8, 6, 3, **{**PUBLISHED, "block": 4}, layout="contiguous"),
            "needs .* layout='interleaved'",
        ),
        (PAIRS[0][0], lambda: deconv.FastDeconv(8, 6, 3, mode=1, **PUBLISHED), "needs .* mode=5"),
        (
            PAIRS[0][0],
            lambda: deconv.FastDeconv(8, 6, 3, **PUBLISHED, track_running_stats=False),
            "track_running_stats=True",
        ),
        (
            PAIRS[1][0],
            lambda: deconv.FastDeconv(8, 6, 3, block=4, n_iter=1, **CONV),
            "no covariance",
        ),
        (
            PAIRS[2][0],
            lambda: deconv.FastDeconv(4, 6, 3, **CONV),
            "has shape .*, which does not fit a layer",
        ),
        (
            lambda: published.FastDeconv2019(8, 6, 3, 1, 1, num_groups=4),
            lambda: deconv.FastDeconv(8, 6, 3, padding=1, block=4, **{**CONV, "eps": 1e-2}),
            "before zero padding, and padding is .1, 1.: use deconv.published.FastDeconv2019",
        ),
        (
            lambda: published.FastDeconv2019(8, 6, 3, num_groups=4),
            lambda: published.FastDeconv(8, 6, 3, block=4),
            "running_mean has shape .1, 4, 1, 1. in the checkpoint, .36,. in the layer",
        ),
        (
            lambda: published.FastDeconv(8, 6, 3, block=4),
            lambda: published.FastDeconv(8, 6, 3),
            "running_mean has shape .36,. in the checkpoint, .72,. in the layer: match block",
        ),
        (PAIRS[6][0], lambda: deconv.Delinear(6, 4, block=3, eps=1e-5), "layout='contiguous'"),
        (PAIRS[0][1], PAIRS[0][0], "has running_cov_joint: load it into a layer of deconv"),
    ],
)
def test_published_checkpoints_that_a_layer_cannot_equal_are_refused(old, new, reason):
    batches = doubles(8, 9, 9) if old is not PAIRS[6][0] else doubles(6, count=40)
    state = train(old(), batches).state_dict()
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=rf"the layer \(\w+\): .*{reason}"):
            new().load_state_dict(dict(state), strict=strict)


@pytest.mark.parametrize(
    "layer",
    [
        published.FastDeconv(4, 6, 3),
        published.FastDeconv2019(4, 6, 3, num_groups=4),
        published.ChannelDeconv(4),
        deconv.FastDeconv(4, 6, 3),
        deconv.Delinear(4, 6),
    ],
    ids=lambda layer: f"{type(layer).__module__}.{type(layer).__name__}",
)
def test_incomplete_running_statistics_are_refused_without_strict_too(layer):
    for lost in [name for name in layer.state_dict() if name.startswith("running_")]:
        state = layer.state_dict()
        del state[lost]
        with pytest.raises(RuntimeError, match=f"without {lost}|no running_mean"):
            layer.load_state_dict(state, strict=False)
    weights = {name: p for name, p in layer.state_dict().items() if "running" not in name}
    layer.load_state_dict(weights, strict=False)


def test_published_statistics_that_are_not_finite_are_refused():
    for name in ("running_mean", "running_deconv"):
        state = published.FastDeconv(4, 6, 3).state_dict()
        state[name][0] = torch.nan
        with pytest.raises(RuntimeError, match="is not finite: load an earlier checkpoint"):
            deconv.FastDeconv(4, 6, 3, **CONV).load_state_dict(state, strict=False)


def test_published_statistics_load_under_either_name_and_into_a_frozen_layer():
    state = train(published.FastDeconv(4, 6, 3), doubles(4, 9, 9)).state_dict()
    other = published.NormalizedDeconv(4, 6, 3, freeze=True)
    other.load_state_dict(state)
    assert torch.equal(other.running_cov_isqrt, state["running_deconv"])
    assert other.freeze_steps == 0
    published.FastDeconv(4, 6, 3).load_state_dict(
        {name: value for name, value in other.state_dict().items() if name != "freeze_steps"}
    )
    norm = published.ChannelDeconv(4)
    norm.load_state_dict({**norm.state_dict(), "running_mean1": torch.ones(4)})
    assert torch.equal(norm.running_mean1, torch.ones(4, 1))
