"""scripts/growth.py: what is counted, against torch's own counts, and the page."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from deconv import Delinear, FastDeconv
from deconv.inverse_sqrt import ROOTS, inverse_sqrt
from deconv.patches import Window, gather
from scripts import count_cost, count_launches, estimate_gpu, growth, growth_page
from scripts.count_cost import Cost
from scripts.estimate_gpu import Gpu
from scripts.profile_layer import CONVOLUTION
from scripts.time_layer import STEPS, Times, plain_twin

CPU, CUDA, META = torch.device("cpu"), torch.device("cuda"), torch.device("meta")
SMALL = ["--batch-size", "4", "2", "--side", "8", "--channels", "8", "--block", "4", "8"]
SMALL += ["--kernel", "3", "--rounds", "2", "--warmup", "0"]
SMALL += ["--device", "cpu", "--networks", "vgg11:4:32"]


def count(layer, shape, device=CUDA):
    return count_cost.count(count_cost.measure_sizes(layer, shape, device))


def flops(counts, direction):
    return sum(both[direction].flops for both in counts.values())


def flops_of_torch(call):
    # torch counts no products in place, of which the fold's backward has one
    in_place = lambda _, left, right, **more: 2 * left[0] * left[1] * left[2] * right[2]
    mapping = {torch.ops.aten.baddbmm_: in_place}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        out = call()
    return counter.get_total_flops(), out


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mode": 1},
        {"mode": 2},
        {"mode": 3, "stride": 2},
        {"mode": 4, "bias": False, "dilation": 2},
        {"shared": False},
        {"rows_per_feature": 2},
        {"n_iter": 2, "layout": "contiguous"},
    ],
    ids=str,
)
def test_products_are_those_that_torch_counts(options):
    options = {"root": "newton", **options}  # torch counts no flops of a factor
    layer = FastDeconv(8, 12, 3, padding=1, block=4, device=META, **options)
    x = torch.empty(6, 8, 10, 10, device=META, requires_grad=True)
    forward, out = flops_of_torch(lambda: layer(x))
    backward, _ = flops_of_torch(lambda: out.sum().backward())
    counts = count(layer, x.shape)
    assert (flops(counts, 0), flops(counts, 1)) == (forward, backward)


@pytest.mark.parametrize("rows", [16, 64], ids=["of rows", "of the matrix"])
@pytest.mark.parametrize("device", [META, CPU], ids=str)
def test_products_of_a_root_on_either_side(rows, device):
    layer = Delinear(64, 10, block=64, device=device)
    x = torch.randn(rows, 64, device=device, requires_grad=True, dtype=torch.float32)
    forward, out = flops_of_torch(lambda: layer(x))
    backward, _ = flops_of_torch(lambda: out.sum().backward())
    counts = count(layer, x.shape, device)
    values = count_cost.EIGENVECTORS * min(rows, 64) ** 3 * (device == CPU)  # torch counts none
    assert (flops(counts, 0) - values, flops(counts, 1)) == (forward, backward)


def test_a_cholesky_factor_and_its_inverse():
    counts = count(FastDeconv(4, 4, 1, block=4, root="cholesky"), (2, 4, 6, 6))["root"]
    assert counts[0].flops == pytest.approx(4**3 / 3 + 4**3)
    assert counts[1].flops == 3 * 2 * 4**3


@pytest.mark.parametrize(("n_iter", "poles"), [(1, 0), (5, 1), (9, 2)])
def test_products_of_resolvents_are_those_that_torch_counts(n_iter, poles):
    cov = torch.empty(2, 8, 8, device=META, requires_grad=True)
    forward, root = flops_of_torch(lambda: inverse_sqrt(cov, n_iter, "resolvent"))
    backward, _ = flops_of_torch(lambda: root.sum().backward())
    layer = FastDeconv(16, 4, 1, block=8, groups=2, n_iter=n_iter, root="resolvent")
    factors = 2 * poles * (8**3 / 3 + 8**3)  # and their inverses, of which torch counts none
    counts = count(layer, (2, 16, 6, 6))["root"]
    assert (counts[0].flops - factors, counts[1].flops) == pytest.approx((forward, backward))


@pytest.mark.parametrize("kept", [True, False])
def test_bytes_of_patches_are_those_of_the_tensors(monkeypatch, kept):
    monkeypatch.setattr("deconv.covariance.FEW", 1e6 * kept)
    layer = FastDeconv(4, 4, 3, padding=1)
    x = torch.randn(2, 4, 9, 9)
    maps = gather(x, Window((3, 3), (3, 3), (1, 1), (1, 1, 1, 1))).nbytes
    forward, backward = count(layer, x.shape)["patches"]
    seen = min(maps, x.nbytes)
    again = 0 if kept else maps + seen
    assert (forward.bytes, backward.bytes) == (maps + seen, again + maps + 2 * seen)
    assert forward.flops == 2 * (maps // 4) * 81  # each from a picture of 9 x 9, by a product


def test_launches_of_a_twin_are_known():
    twin = plain_twin(FastDeconv(4, 4, 3))
    counts = count_launches.count_on_paper(twin, (2, 4, 6, 6))
    whole = [counts["", "whole", way] for way in ("forward", "backward")]
    assert whole == [3, 3]  # convolution, BatchNorm, its count of batches; BatchNorm, two gradients


def test_views_allocations_and_copies_onto_themselves_launch_nothing():
    with count_launches.Launches() as launches:
        x = torch.empty(4, 4)
        x.t()[0].expand(3, 4).T.unflatten(0, (2, 2))
        assert launches.count == 0
        x[0] += 1
        assert launches.count == 1
        nn.functional.conv2d(torch.empty(1, 1, 4, 4), torch.empty(1, 1, 3, 3), torch.empty(1))
        assert launches.count == 3  # cuDNN adds the bias in a kernel of its own


@pytest.mark.parametrize("root", ROOTS)
def test_launches_add_up_and_the_watch_adds_none(root):
    layer, shape = FastDeconv(8, 8, 3, root=root, device=META), (4, 8, 9, 9)
    counts = count_launches.count_on_paper(layer, shape)
    x = torch.empty(shape, device=META, requires_grad=True)
    steps = (*STEPS, count_launches.RUNNING)
    with count_launches.Launches() as launches:
        out = layer(x)
    assert counts["", "whole", "forward"] == launches.count
    grad = torch.empty_like(out)
    with count_launches.Launches() as launches:
        out.backward(grad)
    assert counts["", "whole", "backward"] == launches.count
    for way in ("forward", "backward"):
        assert sum(counts["", step, way] for step in steps) == counts["", "whole", way]


def test_whitening_launches_at_most_25_kernels_beside_those_of_the_convolution():
    counts = count_launches.count_on_paper(FastDeconv(128, 128, 3, padding=1), (64, 128, 16, 16))
    assert counts["", "whole", "forward"] - counts["", CONVOLUTION, "forward"] <= 25


@pytest.mark.parametrize("training", [True, False])
def test_one_graph_without_a_break(training):
    layer = FastDeconv(8, 8, 3, device=META)
    assert count_launches.count_graphs(layer, (4, 8, 9, 9), training=training) == 1


def test_a_break_is_seen():
    class Broken(nn.Linear):
        def forward(self, x):
            x = super().forward(x)
            torch._dynamo.graph_break()
            return x + 1

    assert count_launches.count_graphs(Broken(3, 3), (2, 3), training=True) == 2


def test_a_step_takes_the_longest_of_three():
    gpu = Gpu(flops=10, conv_flops=20, bandwidth=5, launch=1)
    costs = Cost(100, 5), Cost(0, 5)
    assert gpu.seconds(costs, (3, 0), convolves=False) == 10 + 1
    assert gpu.seconds(costs, (3, 7), convolves=True) == 5 + 7


def test_equal_layers_of_a_network_are_found_once():
    flags = growth.make_parser().parse_args(SMALL)
    model = estimate_gpu.build("resnet18", 32, flags, META)
    layers = estimate_gpu.find_layers(model, (2, 3, 32, 32))
    ours = [layer for layer in model.modules() if isinstance(layer, FastDeconv | Delinear)]
    assert sum(times for _, _, times in layers) == len(ours) > len(layers)
    assert layers[0][1] == (2, 3, 32, 32) and layers[-1][1] == (2, 512)


def test_measured_times_stand_beside_the_estimates():
    layer, gpu = FastDeconv(4, 4, 3, device=META), Gpu(1e12, 1e12, 1e12, 1e-6)
    steps = {(step, way): 1e-3 for step in STEPS for way in ("forward", "backward")}
    times = Times(base=2e-3, ours=5e-3, ratio=2.5, steps=steps)
    row = estimate_gpu.estimate(layer, (2, 4, 6, 6), 3, gpu, lambda *_: times)
    *_, line = estimate_gpu.format_layers([row]).splitlines()
    cells = line.split(" | ")
    assert len(cells) == len(estimate_gpu.TITLES) and cells[2] == "6 / 2000"
    assert cells[3].endswith(" / 2000") and cells[-2].endswith(" / 2.5")
    base, ours, ratio, launches = estimate_gpu.format_sums([row], 1e-3)
    assert base.endswith(" / 6") and ours.endswith(" / 15") and ratio.endswith(" / 2.5")
    assert int(launches) == 3 * row.launches


def test_a_power_is_that_of_the_times():
    assert growth_page.power([1, 2, 4], [3, 12, 48]) == "2.00"
    assert growth_page.power([1, 2], [1, 0]) == "-"


def test_the_page_and_its_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(growth, "measure_peak", lambda device: 1e9)
    monkeypatch.setattr(growth, "count_graphs", lambda layer, shape, training: 7)
    path = tmp_path / "page.md"
    growth.main([*SMALL, "--out", str(path)])
    text = path.read_text()
    assert "--batch-size 4 2" in text and "*peak* is 1 GFLOP/s" in text and "{" not in text
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")
    tables = [part.splitlines() for part in text.split("\n\n") if part.startswith("| ")]
    assert len(tables) == 1 + len(growth.QUANTITIES) + 2 + 2
    for table in tables:
        assert len({line.count("|") for line in table}) == 1 and len(table) > 2
    by_batch_size = tables[1]
    assert [line.split(" | ")[0] for line in by_batch_size[2:]] == ["| 2", "| 4", "| power"]
    assert tables[6][-1].startswith("| whole | 3 | 3 | ") and tables[7][-1].endswith("| 7 | 7 |")
    assert str(path) in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, named",
    [
        ("--side 0", ("--side", "'0'")),
        ("--option colour=red", ("--option", "'colour=red'")),
        ("--option layout=diagonal", ("--option layout=diagonal", "'diagonal'")),
        ("--networks vgg11:4", ("--networks", "'vgg11:4'")),
        ("--networks vgg12:4:32", ("--networks vgg12", "vgg11")),
        ("--gpu-bandwidth 0", ("--gpu-bandwidth", "'0'")),
        ("--out nowhere/page.md", ("--out nowhere/page.md",)),
        ("--out page.png", ("--out page.png",)),
    ],
)
def test_refuses_in_one_line(words, named, capsys, monkeypatch):
    monkeypatch.delattr(growth, "measure_growth")  # nothing is measured, let alone written
    with pytest.raises(SystemExit) as stop:
        growth.main([*SMALL, *words.split()])
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and all(word in line for word in named), line


@pytest.mark.gpu
def test_a_gpu_measures_what_is_counted_on_paper(tmp_path):
    path = tmp_path / "page.md"
    growth.main([*SMALL, "--device", "cuda", "--out", str(path)])
    assert (
        "| profiler | " in path.read_text() and "| profiler, torch.compile | " in path.read_text()
    )
