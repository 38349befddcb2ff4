"""Muon against its definition in float64."""

import copy

import pytest
import torch
from torch import nn

from models import ARCHITECTURES, build_model, make_layers
from tests.pairwise import loop_over
from tests.states import make_training
from util.errors import RunError
from util.training.optim import build_optimizer, group_parameters

LR, DECAY, MOMENTUM = 0.1, 0.2, 0.95


def flatten_singular_values(matrix):
    """Five steps of the quintic iteration, which brings singular values close to 1."""
    x = matrix / matrix.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def make_model(memory_format=torch.contiguous_format):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(16, 2))
    return model.to(memory_format=memory_format)


@loop_over("memory_format", [torch.contiguous_format, torch.channels_last])
def test_weights_move_as_defined_and_the_rest_by_adamw(memory_format):
    model = make_model(memory_format)
    start, twin = copy.deepcopy(model.state_dict()), copy.deepcopy(model)
    names = [name for name, _ in model.named_parameters() if name not in ("0.weight", "1.weight")]
    optimizer = build_optimizer("Muon", group_parameters(model, "Muon"), lr=LR, weight_decay=DECAY)
    others = [twin.get_parameter(name) for name in names]
    adamw = build_optimizer("AdamW", others, lr=LR, weight_decay=DECAY)
    truth = {name: start[name].double().flatten(1) for name in ("0.weight", "1.weight")}
    momenta = {name: torch.zeros_like(matrix) for name, matrix in truth.items()}
    for _ in range(3):
        for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
            parameter.grad = torch.randn_like(parameter)
            other.grad = parameter.grad.clone()
        for name, matrix in truth.items():
            gradient = model.get_parameter(name).grad.double().flatten(1)
            momenta[name] += (1 - MOMENTUM) * (gradient - momenta[name])
            update = (1 - MOMENTUM) * gradient + MOMENTUM * momenta[name]
            size = 0.2 * max(matrix.shape) ** 0.5
            matrix *= 1 - LR * DECAY
            matrix -= LR * size * flatten_singular_values(update)
        optimizer.step()
        adamw.step()
    for name in names:
        assert torch.equal(model.get_parameter(name), twin.get_parameter(name)), name
    for name, matrix in truth.items():
        weight = model.get_parameter(name)
        assert weight.is_contiguous(memory_format=memory_format)
        moved = (weight.double() - start[name]).flatten(1)
        error = (moved - (matrix - start[name].double().flatten(1))).norm() / moved.norm()
        assert error < 0.02, name  # torch iterates in bfloat16


@loop_over("arch", ARCHITECTURES)
def test_the_matrices_are_the_weights_of_all_layers_but_the_classifier(arch):
    with torch.device("meta"):
        model = build_model(arch, make_layers(deconv=True), num_classes=1013)
    if arch == "simple_v1":
        with pytest.raises(RunError, match="--optimizer Muon: the network has no hidden layer"):
            group_parameters(model, "Muon")
        return
    (matrices,) = (g["params"] for g in group_parameters(model, "Muon") if "matrices" in g)
    rest = {p for p in model.parameters() if p.ndim > 1} - set(matrices)
    assert [len(weight) for weight in rest] == [1013]
    assert all(weight.ndim > 1 for weight in matrices)


@loop_over("name", ["SGD", "AdamW", "Muon"])
def test_norms_and_biases_can_be_exempt_from_weight_decay(name):
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 2))
    for decays in (True, False):
        groups = group_parameters(model, name, decay_norm_bias=decays)
        build_optimizer(name, groups, lr=LR, weight_decay=DECAY)
        found = {p: group["weight_decay"] for group in groups for p in group["params"]}
        expected = [DECAY if decays or p.ndim > 1 else 0.0 for p in model.parameters()]
        assert [found[parameter] for parameter in model.parameters()] == expected


def test_a_saved_state_continues_bit_for_bit():
    states = []
    for saves in (False, True):
        torch.manual_seed(0)
        model = make_model()
        training = make_training(model)
        for step in range(4):
            if step == 0 or (saves and step == 2):
                saved = copy.deepcopy(training.optimizer.state_dict())
                groups = group_parameters(model, "Muon", decay_norm_bias=False)
                training.optimizer = build_optimizer("Muon", groups, lr=LR, weight_decay=DECAY)
                if step:
                    training.optimizer.load_state_dict(saved)
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            training.optimizer.step()
        states.append(model.state_dict())
    torch.testing.assert_close(*states, rtol=0, atol=0)
