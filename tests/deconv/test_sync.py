"""Statistics of 1, 2 and 3 gloo ranks against one rank with the whole batch."""

import copy
import pickle
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from itertools import accumulate, product

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from deconv import (
    Delinear,
    FastDeconv,
    batch_share,
    convert,
    group_statistics,
    published,
    recalibrate,
)
from deconv.sync import find_share
from tests.pairwise import loop_over

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


def train(layer, share, forward=None):
    """Run two steps on a share of two batches; return values by image, rank and layer."""
    outputs, inputs = [], []
    for x in batches(layer):
        inputs.append(x[share].requires_grad_())
        outputs.append((forward or layer)(inputs[-1]))
        loss(outputs[-1], share).backward()
    by_image = [y.detach() for y in outputs] + [x.grad for x in inputs]
    return by_image, gradients(layer), buffers(layer)


def train_published(share):
    torch.manual_seed(0)
    return train(published.NormalizedDeconv(4, 6, 3, block=2, sync=True).double(), share)


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
    with group_statistics(on_cpu=True):  # the second forward needs the statistics of the first
        two_forwards(net, DistributedDataParallel(net), share)
    pickled = pickle.loads(pickle.dumps(copy.deepcopy(net)))
    return summed(gradients(net)), buffers(pickled)


def summed(averaged, group=None):
    """Return the sum over ranks of gradients that DDP has averaged."""
    ranks = distributed.get_world_size(group)
    return {name: ranks * gradient for name, gradient in averaged.items()}


class Checkpointed(nn.Module):
    """Runs a model again in the backward; `reentrant` chooses the algorithm of torch."""

    def __init__(self, model, reentrant):
        super().__init__()
        self.model, self.reentrant = model, reentrant

    def forward(self, x):
        return checkpoint(self.model, x.requires_grad_(), use_reentrant=self.reentrant)


def checkpoint_under_ddp(share, reentrant):
    """Run a backward outside of the context of its forward."""
    net = build("few patches, mode 1")
    ddp = DistributedDataParallel(Checkpointed(net, reentrant))
    x = next(batches(net))[share]
    with batch_share(share.start, IMAGES):
        y = ddp(x)
    loss(y, share).backward()
    return summed(gradients(net)), buffers(net)


def compile_under_ddp(rank, folder):
    """Save gradients and buffers of a compiled layer, and the error of a checkpointed one."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    share = pieces((5, 2))[rank]
    layer, again = build("mode 5, interleaved, shared"), build("mode 5, interleaved, shared")
    x = next(batches(layer))[share].requires_grad_()
    ddp = DistributedDataParallel(torch.compile(layer, fullgraph=True, backend="aot_eager"))
    loss(ddp(x), share).backward()
    ddp = DistributedDataParallel(Checkpointed(torch.compile(again, backend="aot_eager"), True))
    y = ddp(x)
    with pytest.raises(RuntimeError) as error:
        y.sum().backward()
    found = summed(gradients(layer)), buffers(layer), str(error.value)
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


GROUPS = [0], [1, 2]  # of three ranks
WAYS = ("process_group", "batch_share", "DDP")


def train_in_groups(share, rank):
    """Train a layer in each of two groups of ranks; return results by case and way."""
    groups = [distributed.new_group(ranks) for ranks in GROUPS]
    mine = groups[rank > 0]
    start = min(share.start, 1)  # rank 0 holds the first image, the other two hold six
    found = {}
    for case, way in product(("few patches, mode 1", "linear"), WAYS):
        layer = build(case, **{"process_group": mine} if way == "process_group" else {})
        ddp = DistributedDataParallel(layer, process_group=mine) if way == "DDP" else None
        own = batch_share(share.start - start, (1, 6)[start], mine)
        with own if way == "batch_share" else nullcontext():
            by_image, gradient, statistics = train(layer, share, ddp)
        gradient = summed(gradient, mine) if way == "DDP" else gradient
        found[case, way] = by_image, gradient, statistics
    return found


def refuse_foreign_groups(rank):
    """Return the errors of a rank for a group that leaves the rank out."""
    group, errors = distributed.new_group([1]), []
    make = partial(FastDeconv, 4, 6, 3, process_group=group)
    for action in (make, batch_share(0, 7, group).__enter__):
        try:
            action()
        except ValueError as error:
            errors.append(str(error))
    return errors


def train_apart(rank):
    """Train and recalibrate a model on images of this rank; return all values."""
    net = network()
    share = slice(rank, None, 3)
    by_image, *trained = train(net, share)
    recalibrate(net, [x[share] for x in batches(net)])
    return by_image, *trained, buffers(net)


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


def train_frozen(share):
    """Run a step that estimates and a frozen one; return the messages of each, and values."""
    layer = build("few patches", freeze=True, freeze_iter=1)
    step = lambda x: loss(layer(x[share].requires_grad_()), share).backward()
    return [sent(partial(step, x)) for x in batches(layer)], gradients(layer), buffers(layer)


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
    options = dict(padding=1, sampling_stride=1, rows_per_feature=rows)
    layer = FastDeconv(4, 6, 3, **options, process_group=distributed.group.WORLD).double()
    x = next(batches(layer))
    layer(crop(x, rank)[share]).sum().backward()
    return layer.running_mean, layer.running_cov_joint[0]


def experiments(share, rank):
    sizes = {rows: statistics_of_sizes(share, rank, rows) for rows in (0, 1)}
    apart = []
    outside = {
        "messages apart": sent(lambda: apart.append(train_apart(rank))),
        "apart": apart[0],
        "two forwards": two_forwards_under_ddp(share),
        "checkpoint": {how: checkpoint_under_ddp(share, how) for how in (False, True)},
    }
    if distributed.get_world_size() == 3:
        outside |= {"groups": train_in_groups(share, rank), "foreign": refuse_foreign_groups(rank)}
    with batch_share(share.start, IMAGES):
        return outside | {
            "train": {case: train(build(case), share) for case in CASES},
            "train published": train_published(share),
            "train alone": train_alone(share),
            "messages alone": sent(lambda: train_alone(share)),
            "messages": {case: messages(case, share) for case in CASES},
            "frozen": train_frozen(share),
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

    def counted(x, group):
        MESSAGES.append((x.numel(), x.dtype))
        return all_reduce(x, group=group)

    distributed.all_reduce = counted
    torch.save(train_apart(rank), f"{folder}/alone-{rank}.pt")
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
    results = {
        sharing: [torch.load(folder / f"{number}-{rank}.pt") for rank in range(len(sharing))]
        for number, sharing in enumerate(SHARINGS)
    }
    for parts in results.values():
        for rank, part in enumerate(parts):
            part["alone"] = torch.load(folder / f"alone-{rank}.pt")
    return results


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


def test_frozen_steps_of_ranks_equal_one_with_the_whole_batch_and_send_nothing(found):
    _, gradient, statistics = train_frozen(WHOLE)
    estimated, frozen = zip(*(part["frozen"][0] for part in found), strict=True)
    assert not any(frozen) and all(len(each) == 2 * (len(found) > 1) for each in estimated)
    close(total([part["frozen"][1] for part in found]), gradient)
    for part in found:
        close(part["frozen"][2], statistics)


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


def test_ranks_of_the_published_layer_with_sync_equal_one_with_the_whole_batch(found):
    by_image, gradient, statistics = train_published(WHOLE)
    parts = [part["train published"] for part in found]
    together = [torch.cat(shares) for shares in zip(*(part[0] for part in parts), strict=True)]
    close(together, by_image)
    close(total([part[1] for part in parts]), gradient)
    for part in parts:
        close(part[2], statistics)


def test_two_forwards_and_one_backward_under_ddp_equal_one_process(found):
    net = network()
    gradient, statistics = two_forwards(net, net, WHOLE)
    for part in found:
        close(part["two forwards"], (gradient, statistics))


def test_checkpoints_under_ddp_run_again_with_the_ranks_of_their_forward(found):
    layer = build("few patches, mode 1")
    x = next(batches(layer))
    loss(layer(x), WHOLE).backward()
    for part in found:
        for how in (False, True):
            close(part["checkpoint"][how], (gradients(layer), buffers(layer)))


@pytest.mark.slow
def test_compiled_layers_share_under_ddp_and_refuse_to_be_run_again_without(tmp_path):
    args = (str(tmp_path),)
    torch.multiprocessing.start_processes(compile_under_ddp, args, nprocs=2, start_method="fork")
    layer = build("mode 5, interleaved, shared")
    loss(layer(next(batches(layer))), WHOLE).backward()
    for rank in range(2):
        *values, error = torch.load(tmp_path / f"{rank}.pt")
        close(values, [gradients(layer), buffers(layer)])
        assert "activation checkpointing recomputes compiled layers" in error


def test_models_that_ranks_train_apart_do_not_mix(found):
    for part in found:
        close(part["apart"], part["alone"], rtol=0, atol=0)
        assert part["messages apart"] == []


@loop_over("case, way", product(("few patches, mode 1", "linear"), WAYS))
def test_groups_of_ranks_equal_one_rank_each_with_their_images(spawned, case, way):
    parts = [part["groups"][case, way] for part in spawned[1, 3, 3]]
    for ranks, share in zip(GROUPS, (slice(0, 1), slice(1, IMAGES)), strict=True):
        by_image, gradient, statistics = train(build(case), share)
        own = [parts[rank] for rank in ranks]
        together = [torch.cat(shares) for shares in zip(*(part[0] for part in own), strict=True)]
        close(together, by_image)
        close(total([part[1] for part in own]) if way != "DDP" else own[0][1], gradient)
        for part in own:
            close(part[2], statistics)


def test_groups_without_this_rank_are_refused(spawned):
    for rank, part in enumerate(spawned[1, 3, 3]):
        names = [] if rank == 1 else ["process_group", "group"]
        assert [
            error.split(" must be None or a process group")[0] for error in part["foreign"]
        ] == names


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
    assert find_share(None) is None


def test_a_torch_that_does_not_tell_which_ddp_runs_is_refused(monkeypatch):
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda group=None: 2)
    assert find_share(None) is None
    hidden = torch._dynamo.config.patch(optimize_ddp="python_reducer")
    with hidden, pytest.raises(RuntimeError, match="python_reducer"):
        find_share(None)
    monkeypatch.delattr(DistributedDataParallel, "_get_active_ddp_module")
    with pytest.raises(RuntimeError, match="give the layers a process_group"):
        find_share(None)


@pytest.fixture
def process_group():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield distributed.group.WORLD
    distributed.destroy_process_group()


def test_copies_keep_the_process_group_and_pickles_are_refused(process_group):
    net = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Linear(4, 2))
    net = convert(net, linear=True, process_group=process_group)
    for layer in (net[0], net[2]):
        assert layer.process_group is copy.deepcopy(layer).process_group is process_group
        assert "process_group of 1" in repr(layer)
        with pytest.raises(
            TypeError, match="save its state_dict, or set its process_group to None"
        ):
            pickle.dumps(layer)
        layer.process_group = None
        assert "process_group" not in repr(layer)
    pickle.loads(pickle.dumps(net))(torch.randn(2, 4, 4, 6))


def test_only_layers_without_sync_show_it():
    assert "sync_stats" not in repr(nn.Sequential(FastDeconv(4, 6, 3), Delinear(4, 2)))
    assert "sync_stats=False" in repr(FastDeconv(4, 6, 3, sync_stats=False))
    assert "sync_stats=False" in repr(Delinear(4, 2, sync_stats=False))
