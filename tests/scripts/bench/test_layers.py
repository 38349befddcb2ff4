"""scripts/bench/layers.py: where the time goes, and that no part of it is counted twice."""

import time
from itertools import product

import pytest
import torch

from deconv import FastDeconv, whitening
from deconv.ops.inverse_sqrt import ROOTS
from scripts.bench import layers, steps
from scripts.bench.layers import CONVOLUTION, DIRECTIONS, REST, STEPS

SMALL = [
    "--arch",
    "simple_v2",
    "--batch-size",
    "2",
    "--rounds",
    "2",
    "--warmup",
    "1",
    "--device",
    "cpu",
]


def profile(*words):
    parser = layers.make_parser()
    flags = parser.parse_args([*SMALL, *words])
    (case,) = steps.list_cases(parser, flags, steps.OURS)
    return layers.measure(case, flags, torch.device("cpu"))


def test_every_operation_is_counted_once():
    for words in ("--arch resnet18", "--arch mlp --mode 1 --image-size 16"):
        start = time.perf_counter()
        rounds = profile(*words.split())
        seconds = time.perf_counter() - start
        assert all(min(parts.values()) >= 0 for parts in rounds), words
        assert sum(sum(parts.values()) for parts in rounds) < 1000 * seconds, words
        for direction in DIRECTIONS:
            assert all(any(way == direction for *_, way in parts) for parts in rounds), words


def test_every_step_is_seen_in_both_directions():
    for root in ROOTS:
        for parts in profile("--batch-size", "8", "--option", f"root={root}"):
            for step, direction in product(STEPS, DIRECTIONS):
                assert layers.find([parts], step, direction) > 0, (root, step, direction)


def test_a_first_layer_has_a_backward_without_a_gradient_of_its_images():
    for parts in profile():
        first = next(layer for layer, _, _ in parts if layer)
        assert parts[first, "fold", "backward"] > 0 and parts[first, CONVOLUTION, "backward"] > 0
        assert parts[first, "root", "backward"] == 0


class _Slow(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        time.sleep(0.05)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        time.sleep(0.1)
        return grad


def test_time_is_counted_where_it_is_spent(monkeypatch):
    root = whitening.inverse_sqrt
    monkeypatch.setattr(whitening, "inverse_sqrt", lambda cov, *more: _Slow.apply(root(cov, *more)))
    rounds = profile("--batch-size", "8")  # rows enough for that root
    assert layers.find(rounds, "root", "forward") >= 50
    assert layers.find(rounds, "root", "backward") >= 100
    assert layers.find(rounds, "root") > 0.5 * layers.find(rounds)


def test_profiling_leaves_the_functions_and_the_result_alone():
    before = {(module, name): getattr(module, name) for module, name in layers.FUNCTIONS}
    layer, images = FastDeconv(4, 4, 3), torch.randn(2, 4, 8, 8, requires_grad=True)
    layer(images).sum().backward()
    expected, grad = layer.weight.grad.clone(), images.grad.clone()
    layer.zero_grad()
    images.grad = None
    with layers.labelled(layer):
        layer(images).sum().backward()
    assert torch.equal(layer.weight.grad, expected) and torch.equal(images.grad, grad)
    assert "forward" not in vars(layer)
    assert all(getattr(*key) is function for key, function in before.items())


def test_tables(capsys):
    layers.main([*SMALL, "--mode", "5", "3"])
    environment, *lines = capsys.readouterr().out.splitlines()
    assert torch.__version__ in environment and len(lines) == 2 * len(lines[: len(lines) // 2])
    assert lines[1] == "arch simple_v2, mode 5, block 16, batch_size 2, dtype float32"
    lines = lines[3 : len(lines) // 2]
    assert [line.split(" | ")[0][2:] for line in lines[2:]] == [*STEPS, REST, "whole"]
    assert lines[-1].endswith("| 100 % |") and {line.count("|") for line in lines} == {5}
    layers.main([*SMALL, "--by-layer", "--dtype", "bf16"])
    lines = capsys.readouterr().out.splitlines()[4:]
    assert len(lines) == 2 + 4 and {line.count("|") for line in lines} == {10}


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--option colour=red", ("--option", "'colour=red'")),
        ("--option n_iter=many", ("--option n_iter=many",)),
        ("--arch vgg12", ("vgg11", "'vgg12'")),
        ("--rounds -3", ("--rounds", "'-3'")),
    ],
)
def test_refuses_in_one_line(flags, words, capsys):
    with pytest.raises(SystemExit) as stop:
        layers.main([*SMALL, *flags.split()])
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and all(word in line for word in words), line


@pytest.mark.gpu
def test_a_gpu_keeps_the_time(capsys):
    layers.main([*SMALL, "--device", "cuda"])
    assert "| whole | " in capsys.readouterr().out
