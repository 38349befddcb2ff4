"""Statistics of 1, 2 and 3 gloo ranks against one rank with the whole batch."""

from datetime import timedelta
from functools import partial
from itertools import accumulate, product

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from deconv import Delinear, FastDeconv, batch_share
from deconv.sync import is_distributed

IMAGES = 7
SHARINGS = [(7,), (5, 2), (0, 7), (4, 0, 3), (1, 3, 3)]  # images of each process
CONV = dict(kernel_size=3, padding=1, block=2, sampling_stride=2, rows_per_feature=0)
VARIANTS = product((1, 2, 3, 4, 5), ("contiguous", "interleaved"), (True, False))
CASES = {
    f"mode {mode}, {layout}, {'shared' if shared else 'own'}": partial(
        FastDeconv, 4, 6, **CONV, mode=mode, layout=layout, shared=shared
    )
    for mode, layout, shared in VARIANTS
}
CASES |= {
    "groups": partial(FastDeconv, 4, 6, **CONV, groups=2),
    "groups, mode 1": partial(FastDeconv, 4, 6, **CONV, groups=2, mode=1),
    "few patches": partial(FastDeconv, 4, 6, **CONV | {"rows_per_feature": 2}),
    "few patches, mode 1": partial(FastDeconv, 4, 6, **CONV | {"rows_per_feature": 2}, mode=1),
    "rectangular": partial(FastDeconv, 4, 6, (2, 3), (1, 2), (0, 1), bias=False),
    "linear": partial(Delinear, 12, 3, block=4),
    "linear, own": partial(Delinear, 12, 3, block=4, shared=False, bias=False),
    "linear, fewer rows than features": partial(Delinear, 40, 3),
}
MESSAGES = []  # every all_reduce of this process: elements and dtype


def build(case, **options):
    torch.manual_seed(0)
    return CASES[case](**options).double()


def batches(layer):
    """Yield two correlated float64 batches, whose means differ by feature and batch."""
    generator = torch.Generator().manual_seed(0)
    size = (layer.in_features,) if isinstance(layer, nn.Linear) else (4, 9, 8)
    for number in range(2):
        noise = torch.randn(IMAGES, *size, generator=generator, dtype=torch.float64)
        yield noise.cumsum(-1) + number + torch.arange(size[0]).reshape(-1, *[1] * (len(size) - 1))


def loss(y, share):
    """Weigh every output by a random number that does not depend on the shares."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(IMAGES, *y.shape[1:], generator=generator, dtype=torch.float64)
    return (y * weight[share]).sum()


def buffers(layer):
    return {name: buffer.clone() for name, buffer in layer.named_buffers()}


def gradients(layer):
    return {name: parameter.grad for name, parameter in layer.named_parameters()}


def train(layer, share):
    """Run two steps on a share of two batches; return values by image, rank and layer."""
    outputs, inputs = [], []
    for x in batches(layer):
        inputs.append(x[share].requires_grad_())
        outputs.append(layer(inputs[-1]))
        loss(outputs[-1], share).backward()
    by_image = [y.detach() for y in outputs] + [x.grad for x in inputs]
    return by_image, gradients(layer), buffers(layer)


def train_alone(share):
    return train(build("mode 1, contiguous, own", sync_stats=False), share)


def network():
    torch.manual_seed(0)
    first, second = FastDeconv(4, 6, 3, block=2), FastDeconv(6, 2, 3, mode=1, block=3)
    head = Delinear(40, 3, block=8)
    return nn.Sequential(first, nn.ReLU(), second, nn.Flatten(), head).double()


def two_forwards(net, forward, share):
    """Run two forwards and one backward of the sum of their losses."""
    sum(loss(forward(x[share]), share) for x in batches(net)).backward()
    return gradients(net), buffers(net)


def two_forwards_under_ddp(share):
    net = network()
    averaged, statistics = two_forwards(net, DistributedDataParallel(net), share)
    processes = distributed.get_world_size()
    return {name: processes * gradient for name, gradient in averaged.items()}, statistics


def sent(action):
    """Return the messages of an action as (elements, dtype)."""
    MESSAGES.clear()
    action()
    return list(MESSAGES)


def messages(case, share):
    """Return the messages of a training forward, its backward and an evaluation."""
    layer = build(case)
    x = next(batches(layer))[share].requires_grad_()
    y = []
    forward = sent(lambda: y.append(layer(x)))
    backward = sent(lambda: y[0].sum().backward())
    return forward, backward, sent(lambda: layer.eval()(x).sum().backward())


def messages_under_autocast(share):
    layer = build("mode 5, interleaved, shared").float()
    x = next(batches(layer))[share].float()
    with torch.autocast("cpu", torch.bfloat16):
        return sent(lambda: layer(x))


def unusable(spoil):
    """Return buffers before and after a batch changed by `spoil`, and the gradient."""
    layer = build("mode 1, interleaved, shared")
    x = next(batches(layer))
    layer(x)
    before = buffers(layer)
    layer(spoil(x)).sum().backward()
    return before, buffers(layer), layer.weight.grad


def poison(x):
    x[0, 0, 0, 0] = torch.nan
    return x


def whitening_far_from_zero(share):
    """Return the float32 covariance of a batch 3000 deviations from 0 but near the running mean."""
    torch.manual_seed(0)
    layer = FastDeconv(4, 6, 3, momentum=1.0)
    layer.running_mean.fill_(3000)
    layer((next(batches(layer)) + 3000)[share].float())
    return layer.running_cov_joint


def crop(x, rank):
    """Return images of another size for each rank."""
    return x[..., : 9 - 2 * rank, : 8 - 2 * rank]


def statistics_of_sizes(share, rank, rows):
    """Return the running statistics of images whose size and number differ by rank."""
    torch.manual_seed(0)
    layer = FastDeconv(4, 6, 3, padding=1, sampling_stride=1, rows_per_feature=rows).double()
    x = next(batches(layer))
    layer(crop(x, rank)[share]).sum().backward()
    return layer.running_mean, layer.running_cov_joint[0]


def experiments(share, rank):
    sizes = {rows: statistics_of_sizes(share, rank, rows) for rows in (0, 1)}
    with batch_share(share.start, IMAGES):
        return {
            "train": {case: train(build(case), share) for case in CASES},
            "train alone": train_alone(share),
            "messages alone": sent(lambda: train_alone(share)),
            "two forwards": two_forwards_under_ddp(share),
            "messages": {case: messages(case, share) for case in CASES},
            "messages under autocast": messages_under_autocast(share),
            "empty": unusable(lambda x: x[:0]),
            "poisoned": unusable(lambda x: poison(x)[share]),
            "sizes": sizes,
            "far": whitening_far_from_zero(share),
        }


def pieces(sharing):
    return [slice(end - size, end) for size, end in zip(sharing, accumulate(sharing), strict=True)]


def process(rank, folder):
    """Join a group for every sharing with a share for this rank, and save the results."""
    torch.set_num_threads(1)
    all_reduce = distributed.all_reduce

    def counted(x):
        MESSAGES.append((x.numel(), x.dtype))
        return all_reduce(x)

    distributed.all_reduce = counted
    for number, sharing in enumerate(SHARINGS):
        if rank < len(sharing):
            distributed.init_process_group(
                "gloo",
                init_method=f"file://{folder}/{number}",
                rank=rank,
                world_size=len(sharing),
                timeout=timedelta(seconds=60),
            )
            torch.save(experiments(pieces(sharing)[rank], rank), f"{folder}/{number}-{rank}.pt")
            distributed.destroy_process_group()


@pytest.fixture(scope="module")
def spawned(tmp_path_factory):
    """Return by sharing the results of each rank."""
    folder = tmp_path_factory.mktemp("sync")
    torch.multiprocessing.start_processes(
        process, (str(folder),), nprocs=max(map(len, SHARINGS)), start_method="fork"
    )
    return {
        sharing: [torch.load(folder / f"{number}-{rank}.pt") for rank in range(len(sharing))]
        for number, sharing in enumerate(SHARINGS)
    }


@pytest.fixture(params=SHARINGS, ids=str)
def found(request, spawned):
    return spawned[request.param]


@pytest.fixture
def sharing(found, spawned):
    return next(sharing for sharing, parts in spawned.items() if parts is found)


close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
WHOLE = slice(0, IMAGES)


def total(parts):
    return {name: sum(part[name] for part in parts) for name in parts[0]}


def test_ranks_equal_one_with_the_whole_batch(found):
    for case in CASES:
        by_image, gradient, statistics = train(build(case), WHOLE)
        parts = [part["train"][case] for part in found]
        together = [torch.cat(shares) for shares in zip(*(part[0] for part in parts), strict=True)]
        expect = partial(close, msg=lambda error, case=case: f"{case}: {error}")
        expect(together, by_image)
        expect(total([part[1] for part in parts]), gradient)
        for part in parts:
            expect(part[2], statistics)


def test_two_forwards_and_one_backward_under_ddp_equal_one_process(found):
    net = network()
    gradient, statistics = two_forwards(net, net, WHOLE)
    for part in found:
        close(part["two forwards"], (gradient, statistics))


def documented_message(layer):
    """Return 1 + 2 C T + G d^2 for every whitened axis."""
    matrices = [getattr(layer, f"running_cov_{axis}").numel() for axis in layer.axes]
    if isinstance(layer, nn.Linear):
        return [1 + 2 * layer.in_features + matrix for matrix in matrices]
    taps = 1 if layer.mode == 3 else layer.kernel_size[0] * layer.kernel_size[1]
    return [1 + 2 * layer.in_channels * taps + matrix for matrix in matrices]


def test_one_message_a_layer_of_the_documented_size_two_in_mode_1(found):
    for case in CASES:
        sizes = documented_message(build(case)) if len(found) > 1 else []
        assert len(sizes) == (0 if len(found) == 1 else 2 if "mode 1" in case else 1), case
        for part in found:
            forward, backward, evaluation = part["messages"][case]
            assert forward == [(size, torch.float64) for size in sizes], case
            assert backward == forward[::-1], case
            assert evaluation == [], case


def test_ranks_with_images_of_different_size_and_number_pool_all_patches(found, sharing):
    x = next(batches(build("groups")))
    unfold = partial(nn.functional.unfold, kernel_size=3, padding=1)
    parts = [unfold(crop(x, rank)[share]) for rank, share in enumerate(pieces(sharing))]
    patches = torch.cat([part.transpose(1, 2).flatten(0, 1) for part in parts])
    for part in found:
        mean, cov = part["sizes"][0]
        close(mean, patches.mean(0))
        close(cov, torch.cov(patches.T, correction=0))
        close(part["sizes"][1][0], patches.mean(0))  # few patches leave the mean exact


def test_statistics_travel_in_float32_under_autocast(found):
    size = documented_message(build("mode 5, interleaved, shared"))
    expected = [(n, torch.float32) for n in size] if len(found) > 1 else []
    assert all(part["messages under autocast"] == expected for part in found)


def test_without_sync_every_rank_is_alone(found, sharing):
    for part, share in zip(found, pieces(sharing), strict=True):
        close(part["train alone"], train_alone(share))
        assert part["messages alone"] == []


def test_a_batch_that_is_empty_everywhere_is_skipped(found):
    for part in found:
        before, after, gradient = part["empty"]
        close(after, before, rtol=0, atol=0)
        assert not gradient.any()


def test_a_non_finite_share_of_one_rank_spares_the_statistics_of_all(found):
    for part in found:
        before, after, _ = part["poisoned"]
        close(after, before, rtol=0, atol=0)


def test_float32_survives_an_offset_far_from_zero_once_the_running_mean_is_near(found):
    layer = FastDeconv(4, 6, 3).double()
    layer(next(batches(layer)))
    for part in found:
        torch.testing.assert_close(
            part["far"], layer.running_cov_joint.float(), rtol=1e-3, atol=1e-3
        )


def test_torch_without_distributed_is_one_rank(monkeypatch):
    monkeypatch.setattr(distributed, "is_available", lambda: False)
    monkeypatch.delattr(distributed, "is_initialized")
    assert not is_distributed()


def test_only_layers_without_sync_show_it():
    assert "sync_stats" not in repr(nn.Sequential(FastDeconv(4, 6, 3), Delinear(4, 2)))
    assert "sync_stats=False" in repr(FastDeconv(4, 6, 3, sync_stats=False))
    assert "sync_stats=False" in repr(Delinear(4, 2, sync_stats=False))
