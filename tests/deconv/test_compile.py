"""torch.compile and torch.export: one graph, and the same numbers."""

import copy

import pytest
import torch
from torch import distributed, nn

from deconv import Delinear, FastDeconv
from deconv.surgery.plan import DECONVOLUTIONS
from deconv.sync import average_over_ranks

FEW_ROWS = dict(mode=5, rows_per_feature=1)
OTHERS = [
    *(dict(mode=5, root="newton"), dict(mode=5, root="resolvent")),
    *(dict(mode=1, root="newton"), dict(mode=3, shared=False)),
]
OPTIONS = [FEW_ROWS, *(pytest.param(each, marks=pytest.mark.slow) for each in OTHERS)]


def make_network(**options):
    torch.manual_seed(0)
    convolution = FastDeconv(3, 4, 3, padding=1, block=4, **options)
    return nn.Sequential(convolution, nn.ReLU(), nn.AvgPool2d(4), nn.Flatten(), Delinear(16, 2))


def learn(network, optimizer, run, x):
    optimizer.zero_grad()
    loss = run(x).square().mean()
    loss.backward()
    optimizer.step()
    return {
        "loss": loss.detach(),
        **{f"gradient of {name}": p.grad.clone() for name, p in network.named_parameters()},
        **{name: value.clone() for name, value in network.state_dict().items()},
    }


def compare_over_20_steps(network, backend):
    """Train eager and compiled models side by side; return the number of compilations."""
    compiled, count = copy.deepcopy(network), 0

    def count_and_compile(graph, inputs):
        nonlocal count
        count += 1
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    torch._dynamo.reset()
    run = torch.compile(compiled, fullgraph=True, backend=count_and_compile)
    optimizers = [torch.optim.SGD(m.parameters(), 0.05, 0.9) for m in (network, compiled)]
    for step in range(20):
        x = torch.randn(8, 3, 8, 8)
        expected = learn(network, optimizers[0], network, x)
        given = learn(compiled, optimizers[1], run, x)
        torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5, msg=f"step {step}")
    with torch.no_grad():
        torch.testing.assert_close(run.eval()(x), network.eval()(x), rtol=1e-5, atol=1e-5)
    run.train()(x)  # as before: nothing is compiled anew
    return count


@pytest.mark.parametrize("options", OPTIONS)
def test_a_compiled_network_learns_the_same_in_one_graph(options):
    assert compare_over_20_steps(make_network(**options), "aot_eager") <= 2


def test_batches_of_many_sizes_are_compiled_a_few_times():
    layer, count = FastDeconv(4, 4, 3, mode=3), 0

    def count_only(graph, inputs):
        nonlocal count
        count += 1
        return graph

    torch._dynamo.reset()
    run = torch.compile(copy.deepcopy(layer), fullgraph=True, backend=count_only)
    for size in (8, 3, 10, 11, 12):
        x = torch.randn(size, 4, 8, 8)
        torch.testing.assert_close(run(x), layer(x))
    assert count <= 3


def test_averages_across_processes_have_the_same_gradient(tmp_path):
    store = f"file://{tmp_path}/store"
    distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        average = lambda mean: average_over_ranks(5, mean)[1].square().sum()
        torch._dynamo.reset()
        run = torch.compile(average, fullgraph=True, backend="aot_eager")
        x = torch.randn(3, requires_grad=True)
        expected, given = (torch.autograd.grad(each(x), x) for each in (average, run))
    finally:
        distributed.destroy_process_group()
    torch.testing.assert_close(given, expected)


def test_a_layer_with_freeze_is_compiled_once_per_phase():
    layer, graphs = FastDeconv(3, 4, 3, padding=1, freeze=True, freeze_iter=2), 0
    compiled = copy.deepcopy(layer)

    def count_only(graph, inputs):
        nonlocal graphs
        graphs += 1
        return graph

    torch._dynamo.reset()
    run = torch.compile(compiled, backend=count_only)
    optimizers = [torch.optim.SGD(m.parameters(), 0.05, 0.9) for m in (layer, compiled)]
    for step in range(25):  # a cycle has 20 steps
        x = torch.randn(8, 3, 8, 8)
        expected = learn(layer, optimizers[0], layer, x)
        given = learn(compiled, optimizers[1], run, x)
        torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5, msg=f"step {step}")
        assert compiled.frozen == layer.frozen
    assert graphs == 2


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS)
def test_generated_code_learns_the_same(options):
    assert compare_over_20_steps(make_network(**options), "inductor") <= 2


@pytest.mark.parametrize("options", OPTIONS)
def test_the_network_in_evaluation_is_exported_and_loaded_for_any_batch(options, tmp_path):
    network = make_network(**options)
    network(torch.randn(8, 3, 8, 8))
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(network.eval(), (torch.randn(2, 3, 8, 8),), dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "network.pt2")
    program = torch.export.load(tmp_path / "network.pt2")
    x = torch.randn(5, 3, 8, 8)
    torch.testing.assert_close(program.module()(x), network(x))


@pytest.mark.parametrize("kind", DECONVOLUTIONS)
def test_every_kind_of_layer_in_evaluation_is_exported(kind):
    layer = DECONVOLUTIONS[kind](4, 2, 4, stride=2, groups=2)
    x = torch.randn(3, 4, *(7,) * (layer.weight.dim() - 2))
    layer(x)
    program = torch.export.export(layer.eval(), (x,))
    torch.testing.assert_close(program.module()(x), layer(x))
