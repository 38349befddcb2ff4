"""CUDA graphs of a model with phases, on the CPU by captures that replay one control flow."""

import copy
from unittest.mock import patch

import pytest
import torch
from torch import nn

from deconv import FastDeconv
from deconv.freezing import Freezing
from models import model_hooks
from util.errors import RunError
from util.training.accelerator import Accelerator
from util.training.cuda_graphs import check_messages
from util.training.hooks import ModelHooks
from util.training.optim import build_optimizer

CPU = torch.device("cpu")
HOOKS = ModelHooks(**model_hooks())
FULL, PART = 4, 3  # images


def make_model():
    torch.manual_seed(0)
    first = FastDeconv(3, 4, 3, padding=1, freeze=True, freeze_iter=2)  # a cycle has 20 steps
    return nn.Sequential(first, nn.ReLU(), nn.Flatten(), nn.Linear(4 * 25, 2))


def record_captures(monkeypatch):
    """Replace captures, which need a GPU: each replays its own phase, and counts nothing."""
    captured = []

    def make(step, images):
        for _ in range(4):  # warm-up steps, then the capture
            torch.autograd.grad(step(*images).sum(), tuple(step.parameters()))
        layer, forward = step[0][0], step.forward
        phase = layer.frozen
        captured.append(phase)

        def replay(images):
            layer.frozen = phase
            with patch.object(Freezing, "begin_forward", lambda self, x: None):
                return forward(images)

        return replay

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", make)
    return captured


def learn(model, network, images):
    optimizer = build_optimizer("SGD", model.parameters(), lr=0.1)
    Accelerator(CPU).update(network(images).square().mean(), optimizer)


def compare(steps, model, network, twin, sizes=(FULL,)):
    for step in steps:
        images = torch.randn(sizes[step % len(sizes)], 3, 5, 5)
        learn(model, network, images), learn(twin, twin, images)
        torch.testing.assert_close(
            dict(model.state_dict()), dict(twin.state_dict()), rtol=0, atol=0, msg=f"step {step}"
        )
        assert model[0]._steps == model[0].freeze_steps == twin[0]._steps == step + 1


def test_each_phase_has_a_graph_and_counts_as_launched_steps_do(monkeypatch):
    captured = record_captures(monkeypatch)
    model, twin = make_model(), make_model()
    network = Accelerator(CPU, cuda_graphs=True).compile_for_training(model, (FULL, 3, 5, 5), HOOKS)
    assert captured == [False] and model[0]._steps == model[0].freeze_steps == 0
    compare(range(45), model, network, twin, sizes=(FULL, FULL, PART))
    assert captured == [False, True]


def test_a_restored_model_goes_on_in_its_phase(monkeypatch):
    captured = record_captures(monkeypatch)
    model, twin = make_model(), make_model()
    for _ in range(5):
        twin(torch.randn(FULL, 3, 5, 5))
    network = Accelerator(CPU, cuda_graphs=True).compile_for_training(model, (FULL, 3, 5, 5), HOOKS)
    model.load_state_dict(copy.deepcopy(twin.state_dict()))
    compare(range(5, 22), model, network, twin)
    assert captured == [False, True]


def test_layers_that_share_statistics_between_processes_are_refused():
    for layer, processes in ((FastDeconv(3, 4, 3), 1), (nn.BatchNorm2d(3), 2)):
        check_messages(nn.Sequential(layer), processes)
    check_messages(FastDeconv(3, 4, 3, sync_stats=False), 2)
    with pytest.raises(RunError, match="--cuda-graphs True: .* 2 processes.*--sync-stats False"):
        check_messages(nn.Sequential(FastDeconv(3, 4, 3)), 2)


def test_a_capture_within_a_step_keeps_the_precision_without_its_cache(monkeypatch):
    seen = []

    def make(step, images):
        seen.append((torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()))
        return step

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", make)
    keys = iter("aab")
    hooks = ModelHooks(phase=lambda model: next(keys))
    accelerator = Accelerator(CPU, amp="bf16", cuda_graphs=True)
    network = accelerator.compile_for_training(nn.Linear(2, 1), (FULL, 2), hooks)
    for _ in range(2):
        with accelerator.autocast():
            network(torch.randn(FULL, 2))
    assert seen == [(True, False)] * 2
