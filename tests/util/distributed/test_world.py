"""The world of several processes, and the scripts run in it: gloo on this machine's loopback."""

import os
import socket
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing, nn

from deconv import FastDeconv, batch_share
from models import build_model, make_layers, model_hooks
from util.data.datasets import build_loaders
from util.data.loader import LoaderOptions
from util.data.sampler import EpochBatches
from util.distributed.launcher import check_agreement, init_processes
from util.distributed.world import World
from util.errors import PeerFailed, RunError, Stopped, TrainingDiverged
from util.training.accelerator import Accelerator
from util.training.engine import evaluate, train_one_epoch
from util.training.hooks import ModelHooks
from util.training.metrics import EpochMetrics
from util.training.optim import build_criterion, build_optimizer, build_scheduler

ROOT = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")
MICRO_BATCHES = (None, 120)


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def in_world(rank, size, port, action, *args):
    names = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}
    os.environ |= {name: str(value) for name, value in names.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with init_processes(CPU) as world:
        action(world, *args)


def run_world(size, action, *args):
    """Fork the processes, which then need no imports: see tests/conftest.py."""
    args = size, free_port(), action, *args
    multiprocessing.start_processes(in_world, args, nprocs=size, start_method="fork")


def use_every_operation(world, folder):
    first, total = world.batch_offset((4, 0, 3)[world.rank])
    assert (first, total) == ((0, 4, 4)[world.rank], 7)
    assert (world.rank, world.size, world.local_size) == (dist.get_rank(), 3, 3)
    mine = torch.full((2,), float(world.rank))
    assert world.sum(mine).tolist() == [3, 3]
    assert mine.tolist() == [world.rank] * 2  # left as it was
    assert world.gather({"rank": world.rank}) == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
    assert world.on_rank0(lambda: world.rank) == 0
    assert world.workers_per_process(4) == 2

    norm = nn.BatchNorm1d(2)
    norm.running_var.fill_(world.rank)
    own = world.gather_own_buffers(norm)
    assert [part.keys() for part in own] == [set(), {"running_var"}, {"running_var"}]
    again = nn.BatchNorm1d(2)
    world.take_own_buffers(again, own)
    assert again.running_var.tolist() == [max(world.rank, 1)] * 2  # the first keeps what it has
    world.take_own_buffers(norm, own[:2])  # of other processes than these
    assert norm.running_var.tolist() == [world.rank] * 2

    def fail():
        raise FileNotFoundError("first")

    with pytest.raises(FileNotFoundError if world.is_first else PeerFailed):
        world.on_rank0(fail)
    with pytest.raises(FileNotFoundError if world.is_first else PeerFailed):
        world.rank0_first(fail)

    def visit():  # the first process comes before all others
        (folder / str(world.rank)).touch()
        return (folder / "0").exists(), world.rank

    assert world.rank0_first(visit) == (True, world.rank)

    with pytest.raises(RunError, match="different checkpoints .none, step 5, step 10."):
        check_agreement(world, 5 * world.rank or None)
    check_agreement(world, 5)

    model = nn.BatchNorm1d(2)
    model.running_mean += world.rank
    world.average_buffers(model)
    assert model.running_mean.tolist() == [1, 1]
    assert model.running_var.tolist() == [1, 1]

    model = nn.Linear(2, 1, bias=False)
    nn.init.constant_(model.weight, 1.0 + world.rank)
    replica = world.replicate(model)
    assert model.weight.tolist() == [[1, 1]]  # those of the first process
    replica(torch.full((1, 2), float(world.rank))).sum().backward()
    assert model.weight.grad.tolist() == [[1, 1]]


def test_three_processes(tmp_path):
    run_world(3, use_every_operation, tmp_path)


class Double(Accelerator):
    """Computes in float64, where sums in another order differ by less than 1e-10."""

    reads_late = True  # as on GPUs

    def batch_to_device(self, images, targets):
        return images.double(), targets


def train_digits(world, batch_size, micro_batch):
    """Three steps of a small network, and a test; its state and the figures of both."""
    options = LoaderOptions(batch_size=batch_size, rank=world.rank, processes=world.size)
    spec, train, test = build_loaders("digits", "", options, cache_dir="")
    torch.manual_seed(0)
    layers = make_layers(deconv=True, block=4, block_final=16)
    model = build_model("simple_v2", layers, in_channels=spec.in_channels).double()
    criterion = build_criterion("CE", spec.num_classes)
    optimizer = build_optimizer("SGD", model.parameters(), lr=0.1)
    scheduler = build_scheduler("cosine", optimizer, total_steps=3, epoch_steps=3)
    accelerator, args = Double(CPU), (criterion, optimizer, scheduler)
    train.batch_sampler.set_epoch(1, start_batch=len(train) - 3)
    replica, sends = world.replicate(model), []
    replica.register_forward_pre_hook(
        lambda replica, _: sends.append(getattr(replica, "require_backward_grad_sync", None))
    )
    trained = train_one_epoch(
        replica,
        train,
        *args,
        accelerator=accelerator,
        world=world,
        micro_batch=micro_batch,
        batch_context=batch_share,
    )
    assert sends in ([True] * 3, [False, False, True] * 2 + [True], [None] * len(sends))
    tested = evaluate(model, test, criterion, accelerator=accelerator, world=world)
    state = [value.double() for value in model.state_dict().values()]
    for figures in (trained, tested):
        del figures["seconds"]
    return torch.cat([value.flatten() for value in state]), trained, tested


def figures_of_a_test(world, batch_size):
    """The figures of a test, without the seconds."""
    options = LoaderOptions(batch_size=batch_size, rank=world.rank, processes=world.size)
    spec, _, test = build_loaders("digits", "", options, cache_dir="")
    torch.manual_seed(0)
    model = build_model("simple_v2", make_layers(deconv=True), in_channels=spec.in_channels)
    criterion = build_criterion("CE", spec.num_classes)
    figures = evaluate(model, test, criterion, accelerator=Accelerator(CPU), world=world)
    return {name: value for name, value in figures.items() if name != "seconds"}


def compare_with_one_process(world, folder):
    assert figures_of_a_test(world, 50) == torch.load(folder / "tested.pt")  # to the last bit
    for micro_batch in MICRO_BATCHES:
        state, trained, tested = train_digits(world, 359, micro_batch)
        whole, whole_trained, whole_tested = torch.load(folder / f"trained{micro_batch}.pt")
        torch.testing.assert_close(state, whole, rtol=0, atol=1e-10)
        assert trained == pytest.approx(whole_trained, abs=1e-10)
        assert tested == pytest.approx(whole_tested, abs=1e-10)


def test_processes_that_share_batches_train_and_test_as_one(tmp_path):
    """1437 images in batches of 359: the last is of one, and two processes have none of it.

    Micro-batches of 120 images or fewer hold the same images in any number of processes.
    """
    torch.save(figures_of_a_test(World(), 50), tmp_path / "tested.pt")
    for micro_batch in MICRO_BATCHES:
        trained = train_digits(World(), 359, micro_batch)
        torch.save(trained, tmp_path / f"trained{micro_batch}.pt")
    run_world(3, compare_with_one_process, tmp_path)


def capture_as_one_function(step, args):
    """Return what a captured step is: one function, whose backward returns all gradients."""
    forward, parameters = step.forward, tuple(step.parameters())

    class Captured(torch.autograd.Function):
        @staticmethod
        def forward(ctx, images, *parameters):
            with torch.enable_grad():
                ctx.logits = forward(images)
            return ctx.logits.detach()

        @staticmethod
        def backward(ctx, grad):
            return None, *torch.autograd.grad(ctx.logits, parameters, grad)

    return lambda images: replays.append(len(images)) or Captured.apply(images, *parameters)


replays = []


def train_with_graphs(world):
    """Batches of 5 and 4 images; of 5 images, process 0 has 3."""
    hooks, states = ModelHooks(**model_hooks()), []
    for is_captured in (True, False):
        torch.manual_seed(0)
        layers = FastDeconv(2, 3, 3, sync_stats=False), nn.BatchNorm2d(3)
        model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(27, 2)).double()
        full = world.shard_count(5)
        batches = [torch.randn(5, 2, 5, 5), torch.randn(4, 2, 5, 5), torch.randn(5, 2, 5, 5)]
        parts = [batch.chunk(2)[world.rank] for batch in batches]
        accelerator = Double(CPU, cuda_graphs=is_captured)
        with patch.object(torch.cuda, "make_graphed_callables", capture_as_one_function):
            network = accelerator.compile_for_training(model.double(), (full, 2, 5, 5), hooks)
        optimizer = build_optimizer("SGD", model.parameters(), lr=0.1)
        train_one_epoch(
            world.replicate(network),
            [(part, torch.arange(len(part)) % 2) for part in parts],
            build_criterion("CE", 2),
            optimizer,
            build_scheduler("cosine", optimizer, total_steps=3, epoch_steps=3),
            accelerator=accelerator,
            world=world,
            batch_context=hooks.batch_context,
        )
        states.append(model.state_dict())
    assert replays == [[3, 3], [2, 2, 2]][world.rank]
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_captured_steps_average_their_gradients_over_processes():
    run_world(2, train_with_graphs)


def end_together(world):
    """In process 1 alone the third batch is bad, or a stop is requested in the third step."""
    for fault, error in (("batch", TrainingDiverged), ("stop", Stopped)):
        torch.manual_seed(0)
        model = nn.Linear(2, 3).double()
        batches = [(torch.randn(2, 2), torch.tensor([0, 1])) for _ in range(6)]
        if world.rank == 1 and fault == "batch":
            batches[2][0].fill_(torch.nan)
        requests = iter([0, 0, 15] if world.rank == 1 and fault == "stop" else [0] * 7)
        optimizer = build_optimizer("SGD", model.parameters(), lr=0.1)
        scheduler = build_scheduler("cosine", optimizer, total_steps=6, epoch_steps=6)
        metrics, weights = EpochMetrics(), []
        keep = lambda weights=weights, model=model: weights.append(model.weight.tolist())
        with pytest.raises(error) as caught:
            train_one_epoch(
                world.replicate(model),
                batches,
                build_criterion("CE", 3),
                optimizer,
                scheduler,
                accelerator=Double(CPU),
                world=world,
                epoch_metrics=metrics,
                on_update=keep,
                stop_request=lambda requests=requests: next(requests, 15),
            )
        if fault == "batch":
            assert caught.value.batch == 3 and weights[1] == weights[2] == model.weight.tolist()
        assert world.gather(metrics.steps) == ([2, 2] if fault == "batch" else [4, 4])


def test_results_read_late_end_all_processes_at_the_same_step():
    run_world(2, end_together)


@pytest.mark.parametrize("processes", [1, 2, 3, 6])
def test_some_batches_of_a_test_are_the_same_on_any_number_of_processes(processes):
    """--test-iter 4 of 7 batches."""
    dealt = [
        list(EpochBatches(7, 1, train=False, rank=rank, processes=processes))
        for rank in range(processes)
    ]
    tested = [b[: World(rank, processes).shard_count(4)] for rank, b in enumerate(dealt)]
    assert sorted(index for part in tested for ((_, index, _),) in part) == [0, 1, 2, 3]


def test_a_world_of_one_needs_no_process_group(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(dist, "init_process_group", None)
    with init_processes(CPU) as world:
        assert world == World() and world.is_first
    values, model = torch.ones(2), nn.BatchNorm1d(2)
    assert world.sum(values) is values
    assert world.gather(5) == [5]
    assert world.on_rank0(lambda: 6) == world.rank0_first(lambda: 6) == 6
    assert world.replicate(model) is model
    world.average_buffers(model)
    assert world.workers_per_process(3) == 3
