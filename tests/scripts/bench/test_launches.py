"""scripts/bench/launches.py: launches counted on the meta device against known numbers."""

import pytest
import torch
from torch import nn

from deconv import FastDeconv
from deconv.ops.inverse_sqrt import ROOTS
from scripts.bench import launches
from scripts.bench.launches import Launches, count_graphs, count_on_paper
from scripts.bench.layers import CONVOLUTION, WHOLE


def count_total(counts):
    return [counts["", WHOLE, direction] for direction in ("forward", "backward")]


def test_convolution_and_batchnorm_launch_six_kernels():
    twin = nn.Sequential(nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4))
    # Convolution, BatchNorm, its batch counter; backward of BatchNorm, two gradients.
    assert count_total(count_on_paper(twin, (2, 4, 6, 6))) == [3, 3]


def test_views_allocations_and_copies_onto_themselves_launch_nothing():
    with Launches() as counter:
        x = torch.empty(4, 4)
        x.t()[0].expand(3, 4).T.unflatten(0, (2, 2))
        assert counter.count == 0
        x[0] += 1
        assert counter.count == 1
        nn.functional.conv2d(torch.empty(1, 1, 4, 4), torch.empty(1, 1, 3, 3), torch.empty(1))
        assert counter.count == 3  # cuDNN adds the bias in a kernel of its own


@pytest.mark.parametrize("root", ROOTS)
def test_steps_add_up_to_the_layer_and_the_stopwatch_adds_no_launch(root):
    layer, shape = FastDeconv(8, 8, 3, root=root, device="meta"), (4, 8, 9, 9)
    counts = count_on_paper(layer, shape)
    x = torch.empty(shape, device="meta", requires_grad=True)
    with Launches() as forward:
        out = layer(x)
    grad = torch.empty_like(out)
    with Launches() as backward:
        out.backward(grad)
    assert count_total(counts) == [forward.count, backward.count]
    for direction, total in zip(("forward", "backward"), count_total(counts), strict=True):
        steps = {key: n for key, n in counts.items() if key[1] != WHOLE and key[2] == direction}
        assert sum(steps.values()) == total and len(steps) >= 4


def test_whitening_launches_at_most_29_kernels_beside_those_of_the_convolution():
    counts = count_on_paper(FastDeconv(128, 128, 3, padding=1), (64, 128, 16, 16))
    assert counts["", WHOLE, "forward"] - counts["", CONVOLUTION, "forward"] <= 29


@pytest.mark.parametrize("training", [True, False])
def test_the_layer_compiles_to_one_graph(training):
    layer = FastDeconv(8, 8, 3, device="meta")
    assert count_graphs(layer, (4, 8, 9, 9), training=training) == 1


def test_a_graph_break_is_counted():
    class Broken(nn.Linear):
        def forward(self, x):
            x = super().forward(x)
            torch._dynamo.graph_break()
            return x + 1

    assert count_graphs(Broken(3, 3), (2, 3), training=True) == 2


@pytest.mark.gpu
def test_the_profiler_of_a_gpu_sees_the_kernels_of_a_convolution():
    layer, device = nn.Conv2d(4, 4, 3, bias=False), torch.device("cuda")
    counts = launches.count_on_gpu(layer, (2, 4, 6, 6), device)
    assert min(counts.values()) > 0
