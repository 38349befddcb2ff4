"""The world of several processes, and the scripts run in it: gloo on this machine's loopback."""

import os
import socket
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing, nn

from util.distributed import Elsewhere, World, join

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def in_world(rank, size, port, action, *args):
    names = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}
    os.environ |= {name: str(value) for name, value in names.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with join(CPU) as world:
        action(world, *args)


def run_world(size, action, *args):
    multiprocessing.spawn(in_world, (size, free_port(), action, *args), nprocs=size)


def use_every_operation(world, folder):
    assert (world.rank, world.size, world.local_size) == (dist.get_rank(), 3, 3)
    mine = torch.full((2,), float(world.rank))
    assert world.sum(mine).tolist() == [3, 3]
    assert mine.tolist() == [world.rank] * 2  # left as it was
    assert world.gather({"rank": world.rank}) == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
    assert world.first(lambda: world.rank) == 0
    assert world.share_workers(4) == 2

    def fail():
        raise FileNotFoundError("first")

    with pytest.raises(FileNotFoundError if world.is_first else Elsewhere):
        world.first(fail)
    with pytest.raises(FileNotFoundError if world.is_first else Elsewhere):
        world.first_then_all(fail)

    def visit():  # the first process comes before all others
        (folder / str(world.rank)).touch()
        return (folder / "0").exists(), world.rank

    assert world.first_then_all(visit) == (True, world.rank)

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


def test_a_world_of_one_needs_no_process_group(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(dist, "init_process_group", None)
    with join(CPU) as world:
        assert world == World() and world.is_first
    values, model = torch.ones(2), nn.BatchNorm1d(2)
    assert world.sum(values) is values
    assert world.gather(5) == [5]
    assert world.first(lambda: 6) == world.first_then_all(lambda: 6) == 6
    assert world.replicate(model) is model
    world.average_buffers(model)
    assert world.share_workers(3) == 3
