"""scripts/bench/launches.py: launches counted on the meta device against known numbers."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from deconv import Delinear, FastDeconv
from scripts.bench.launches import Launches, count_launches, main

STATISTICS = 15  # launches of the update of running statistics


def test_convolution_and_batchnorm_launch_six_kernels():
    twin = nn.Sequential(nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4))
    # Convolution, BatchNorm, its batch counter; backward of BatchNorm, two gradients.
    assert count_launches(twin, (2, 4, 6, 6)) == (3, 3)


def test_views_and_allocations_launch_nothing():
    with Launches() as counter:
        x = torch.empty(4, 4)
        x.t()[0].expand(3, 4).T.unflatten(0, (2, 2))
        assert counter.count == 0
        x[0].add_(1)
        assert counter.count == 1
        nn.functional.conv2d(torch.empty(1, 1, 4, 4), torch.empty(1, 1, 3, 3), torch.empty(1))
        assert counter.count == 3  # cuDNN adds the bias in a kernel of its own


def test_a_product_adds_a_vector_in_its_own_kernel_but_copies_a_matrix():
    vector, matrix = torch.empty(4), torch.empty(4, 4)
    for base, rows, kernels in ((vector, 3, 1), (matrix[:3], 3, 2), (vector, 1, 2)):
        with Launches() as counter:
            torch.addmm(base, matrix[:rows], matrix)
        assert counter.count == kernels, (base.shape, rows)


def test_whitening_launches_few_kernels_beside_those_of_the_convolution():
    shape = (64, 128, 16, 16)
    plain = count_launches(nn.Conv2d(128, 128, 3, padding=1), shape)
    layer = FastDeconv(128, 128, 3, padding=1)
    one, two = (
        count_launches(layer, shape),
        count_launches(nn.Sequential(layer, deepcopy(layer)), shape),
    )
    assert plain == (2, 3)
    assert two[0] - one[0] - plain[0] <= 14  # statistics of all layers take 15 more
    assert one[1] - plain[1] <= 16


def test_a_linear_layer_whitens_few_rows_in_few_launches():
    counts = {
        root: sum(count_launches(Delinear(512, 10, root=root), (128, 512)))
        for root in ("resolvent", "newton")
    }
    assert counts["resolvent"] <= 61 < 400 < counts["newton"], counts


def read_table(capsys, *argv):
    main([*argv, "--batch-size", "2"])
    head, _, *rows = capsys.readouterr().out.splitlines()
    titles = [cell.strip() for cell in head.strip("|").split("|")]
    return [dict(zip(titles, row.strip("| ").split(" | "), strict=True)) for row in rows]


def test_the_table_counts_the_layers_and_what_stands_between_them(capsys):
    (network,) = read_table(capsys, "--arch", "simple_v2")
    layers = read_table(capsys, "--arch", "simple_v2", "--by-layer")
    between = 3 * 2 + 1  # ReLU and max-pool of three convolutions, the average
    counted = sum(int(row["forward"]) for row in layers)
    grouped = 3 * STATISTICS  # all layers update their statistics at once
    assert len(layers) == 4
    assert int(network["deconvolution, forward"]) == counted + between - grouped
    # Convolution, BatchNorm and its counter; the linear layer.
    assert int(network["BatchNorm, forward"]) == 3 * 3 + 1 + between


def test_an_unknown_network_is_refused_in_one_line(capsys):
    with pytest.raises(SystemExit):
        main(["--arch", "vgg12"])
    (line,) = capsys.readouterr().err.splitlines()
    assert "--arch vgg12" in line and "vgg11" in line
