"""Running statistics of many layers updated at once, against layer by layer."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from deconv import Delinear, FastDeconv, group_statistics, published
from deconv.running import collect


def make_network():
    torch.manual_seed(0)
    return nn.Sequential(
        FastDeconv(3, 4, 3, block=2, shared=False),
        published.FastDeconv(4, 4, 3),
        FastDeconv(4, 6, 3, mode=1, momentum=None),
        FastDeconv(6, 6, 1, momentum=0.3, track_running_stats=False),
        nn.Flatten(),
        Delinear(6 * 25, 5, block=10),
        Delinear(5, 2).double(),
    )


class Double(nn.Module):
    def forward(self, x):
        return x.double()


@pytest.fixture
def pair():
    """Return two equal networks whose last layer is float64."""
    network = make_network()
    network.insert(6, Double())
    return network, deepcopy(network)


def batches(count=4):
    return [torch.randn(4, 3, 11, 11) for _ in range(count)]


def assert_equal(one, other):
    torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)
    for (name, buffer), twin in zip(one.named_buffers(), other.buffers(), strict=True):
        assert torch.equal(buffer, twin), name


def test_grouped_updates_equal_those_of_each_layer(pair):
    grouped, single = pair
    first, second, *rest = batches()
    bad = second.clone()
    bad[0, 0, 0, 0] = torch.inf  # in the patches of the first layer alone, or of all layers
    for x in (first, bad, second[:0], second, *rest):
        before = [buffer.clone() for buffer in grouped.buffers()]
        with group_statistics(on_cpu=True):
            grouped(x)
            assert all(map(torch.equal, before, grouped.buffers()))
        single(x)
        assert_equal(grouped, single)
    assert grouped[0].num_batches_tracked == 4


def test_a_context_without_an_end_is_not_seen_by_forwards_evaluation_and_state_dict(pair):
    grouped, single = pair
    one, two, three = batches(3)
    with group_statistics(on_cpu=True):
        for x in (one, two):  # the second forward needs the statistics of the first
            grouped(x), single(x)
        assert_equal_states(grouped, single)
        torch.testing.assert_close(grouped.eval()(three), single.eval()(three))
        grouped.train(), single.train()
        grouped(three), single(three)
        grouped[0].reset_running_stats(), single[0].reset_running_stats()
    assert_equal(grouped, single)


def assert_equal_states(one, other):
    torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)


def test_a_forward_that_fails_updates_no_statistics(pair):
    network, twin = pair
    with pytest.raises(ValueError), group_statistics(on_cpu=True):
        network[0](batches(1)[0])
        network[0](torch.randn(4, 5, 11, 11))
    assert_equal_states(network[1:], twin[1:])
    with group_statistics(on_cpu=True):
        pass
    assert network[1].num_batches_tracked == 0


def test_checkpointed_forwards_count_once(pair):
    grouped, single = pair
    (x,) = batches(1)
    x.requires_grad_()
    with group_statistics(on_cpu=True):
        y = checkpoint(grouped, x, use_reentrant=False)
    y.sum().backward()
    single(x)
    assert_equal(grouped, single)


def test_contexts_nest_and_the_cpu_updates_layer_by_layer():
    layer, x = FastDeconv(3, 4, 3), batches(1)[0]
    with group_statistics(on_cpu=True):
        with group_statistics():
            layer(x)
            assert layer.num_batches_tracked == 1  # on the CPU
        with group_statistics(on_cpu=True):
            layer(x)
        assert layer.num_batches_tracked == 2
    assert not collect(None)


def test_an_inner_context_begins_after_the_updates_of_the_outer_one(pair):
    grouped, single = pair
    one, two = batches(2)
    single(one), single(two)
    with group_statistics(on_cpu=True):
        grouped(one)
        with group_statistics(on_cpu=True):
            grouped(two)
    assert_equal(grouped, single)
