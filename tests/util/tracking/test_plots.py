import math
import warnings
from dataclasses import replace

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from util.tracking import plots
from util.tracking.plots import RunCurves, RunGroup, draw_filters, plot_comparison, plot_training


@pytest.fixture
def figures(monkeypatch):
    """The figures that were made."""
    made = []

    class Watched(Figure):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(plots, "Figure", Watched)
    return made


def make_curves(epochs=3, rows=5, epoch_steps=50, ends=None, top1=10.0):
    test = {
        "epoch": list(range(1, epochs + 1)),
        "loss": [2.0] * epochs,
        "top1": [top1] * epochs,
        "seconds": [4.0] * epochs,
    }
    batches = {
        "epoch": [epoch for epoch in test["epoch"] for _ in range(rows)],
        "batch": [10 * (row + 1) for _ in test["epoch"] for row in range(rows)],
        "loss": [2.5] * epochs * rows,
        "top1": [9.0] * epochs * rows,
        "seconds": [4.0 * (row + 1) / rows for _ in test["epoch"] for row in range(rows)],
    }
    ends = [epoch * (epoch_steps or 50) for epoch in test["epoch"]] if ends is None else ends
    return RunCurves(test, test, batches, ends, epoch_steps)


def make_group(label="a", kind="bn", *runs, **options):
    return RunGroup(label, kind, runs or [make_curves(**options)])


def check_plot(path):
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        assert 600 <= image.width <= 2000 and 400 <= image.height <= 2000
        assert len(image.convert("L").getcolors()) > 20


def test_validation_is_a_dotted_curve_of_runs_that_have_it(tmp_path, figures):
    curves = make_curves()
    for val, expected in [(curves.test, 1), (None, 0)]:
        plot_training(replace(curves, val=val), tmp_path / "plot.png")
        for axes in figures[-1].axes:
            dotted = [line for line in axes.lines if line.get_linestyle() == ":"]
            assert [len(line.get_xdata()) for line in dotted] == [3] * expected
        texts = [text.get_text() for text in figures[-1].legends[0].get_texts()]
        assert texts.count("validation images") == expected


@pytest.mark.parametrize("epochs", [1, 2, 100])
def test_training_curves_are_drawn_against_steps_with_epochs_above(tmp_path, figures, epochs):
    plot_training(make_curves(epochs), tmp_path / "plot.png", title="a $ name_^")
    check_plot(tmp_path / "plot.png")
    (figure,) = figures
    assert [axes.get_ylabel() for axes in figure.axes] == [
        "top-1 accuracy (%)",
        "loss (mean per image)",
    ]
    assert figure.get_suptitle() == "a $ name_^"
    for axes in figure.axes:
        assert axes.get_xlabel() == "training step"
        (above,) = axes.child_axes
        assert above.get_xlabel() == "epoch"
        train, test = axes.lines
        assert (train.get_marker(), test.get_marker()) == ("None", "o")
        assert train.get_xdata()[:3].tolist() == [10, 20, 30]
        assert test.get_xdata().tolist() == [50 * epoch for epoch in range(1, epochs + 1)]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["test set", "training, mean over 10 steps"]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_runs_that_blow_up_are_drawn_without_a_warning(tmp_path, bad):
    curves = make_curves()
    curves.batches["loss"][:] = [bad] * len(curves.batches["loss"])
    curves.test["loss"][:] = [bad] * 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_training(curves, tmp_path / "training.png")
        plot_comparison([make_group("a", "bn", curves)], tmp_path / "comparison.png")
    check_plot(tmp_path / "training.png")
    check_plot(tmp_path / "comparison.png")


def test_a_comparison_shows_both_metrics_against_steps_and_seconds(tmp_path, figures):
    groups = [make_group("net/bn", "bn"), make_group("net/deconv-mode5", "deconv-mode5")]
    plot_comparison(groups, tmp_path / "plot.png")
    check_plot(tmp_path / "plot.png")
    (figure,) = figures
    assert [(axes.get_xlabel(), axes.get_ylabel()) for axes in figure.axes] == [
        (x, y)
        for y in ("top-1 accuracy (%)", "loss (mean per image)")
        for x in ("training step", "training time (s)")
    ]
    train, test = figure.axes[1].lines[:2]
    assert test.get_xdata().tolist() == [4.0, 8.0, 12.0]
    assert train.get_xdata()[-1] == 12.0
    assert figure.axes[0].lines[0].get_xdata()[:2].tolist() == [10, 20]


def test_a_run_of_part_of_an_epoch_is_drawn_where_it_ends(tmp_path, figures):
    run = make_curves(epochs=1, rows=2, epoch_steps=391, ends=[20])
    plot_comparison([make_group("a", "bn", run)], tmp_path / "plot.png")
    train, test = figures[0].axes[0].lines[:2]
    assert train.get_xdata().tolist() == [10, 20] and test.get_xdata().tolist() == [20]


def test_seeds_become_a_mean_in_a_band_at_the_steps_they_share(tmp_path, figures):
    runs = [make_curves(top1=value) for value in (10.0, 20.0, 60.0)]
    runs[1] = make_curves(epochs=2, top1=20.0)
    plot_comparison([make_group("a", "bn", *runs)], tmp_path / "plot.png")
    axes = figures[0].axes[0]
    test = axes.lines[1]
    assert test.get_xdata().tolist() == [50, 100] and test.get_ydata().tolist() == [30.0, 30.0]
    low, high = axes.collections[1].get_datalim(axes.transData).intervaly
    assert (low, high) == (10.0, 60.0)
    labels = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert "lowest to highest seed" in labels


def test_the_accuracy_alone_tells_the_final_accuracy_in_the_legend(tmp_path, figures):
    runs = [make_curves(top1=10.0), make_curves(epochs=2, top1=11.0)]
    groups = [make_group("one, lr 1", "bn", *runs), make_group("two", "deconv-mode5", top1=12.0)]
    plot_comparison(groups, tmp_path / "plot.png", accuracy_only=True)
    check_plot(tmp_path / "plot.png")
    (axes,) = figures[0].axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("training step", "top-1 accuracy (%)")
    labels = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert labels[:2] == ["two\ntest 12.0 %", "one\nlr 1\ntest 10.5 %"]  # highest first


def test_kinds_differ_in_colour_and_dash_and_their_groups_in_shade_and_marker(tmp_path, figures):
    kinds = ("bn", "bn", "deconv-mode5", "deconv-mode5", "deconv-mode3")
    plot_comparison([make_group(f"_{i}$", k) for i, k in enumerate(kinds)], tmp_path / "plot.png")
    lines = figures[0].axes[0].lines[1::2]
    assert [line.get_linestyle() for line in lines] == ["--", "--", "-", "-", "-"]
    colors = [line.get_color() for line in lines]
    assert len(set(colors)) == 5
    hues = [max(range(3), key=color.__getitem__) for color in colors]
    assert hues == [2, 2, 0, 0, 1]  # blue, orange, green
    assert lines[0].get_marker() != lines[1].get_marker()
    labels = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert labels[:5] == ["_0$", "_1$", "_2$", "_3$", "_4$"]


def test_every_group_of_many_of_one_kind_has_a_colour_of_its_own(tmp_path, figures):
    plot_comparison([make_group(str(i)) for i in range(8)], tmp_path / "plot.png")
    lines = figures[0].axes[0].lines[1::2]
    assert len({line.get_color() for line in lines}) == 8


def test_axes_begin_at_the_start_of_training(tmp_path, figures):
    plot_comparison([make_group(epochs=1, rows=0)], tmp_path / "plot.png")
    assert [axes.get_xlim()[0] for axes in figures[0].axes] == [0] * 4


def test_a_run_with_fewer_rows_of_batches_than_epochs_shows_its_training_by_epoch():
    run = make_curves(epochs=5, rows=0, epoch_steps=3)
    row = {"epoch": [4], "batch": [1], "loss": [2.5], "top1": [9.0], "seconds": [1.0]}
    curve = replace(run, batches=row).training("loss")
    assert curve.step.tolist() == run.ends and curve.values.tolist() == run.train["loss"]


def test_one_epoch_without_rows_of_batches_and_many_groups_can_be_drawn(tmp_path):
    names = [f"{'long name ' * 8}{i}" for i in range(12)]
    groups = [make_group(name, f"deconv-{name[-1]}", epochs=1, rows=0) for name in names]
    plot_comparison(groups, tmp_path / "plot.png")
    check_plot(tmp_path / "plot.png")


@pytest.mark.parametrize("shape", [(64, 3, 3, 3), (10, 1, 32, 32), (7, 5, 3, 1), (300, 3, 64, 64)])
def test_filters_become_a_grid_of_stretched_enlarged_kernels(shape):
    image = draw_filters(torch.randn(shape))
    assert image.shape[0] == 3 and image.min() == 0 and image.max() == 1
    kernels = min(shape[0], 256)
    assert 2 * min(image.shape[1:]) > math.floor(math.sqrt(kernels)) * 20


def test_each_filter_is_stretched_by_itself():
    weight = torch.tensor([[0.0, 1.0], [-100.0, 300.0]]).reshape(2, 1, 1, 2)
    image = draw_filters(weight)
    left, right = image[0, 2:18, 2:34], image[0, 2:18, 36:68]
    assert torch.equal(left, right) and set(left.unique().tolist()) == {0.0, 1.0}


def test_constant_and_non_finite_filters_are_drawn():
    weight = torch.ones(3, 3, 3, 3)
    weight[1] = math.nan
    weight[2, 0, 0, 0] = math.inf
    assert draw_filters(weight.requires_grad_()).isfinite().all()
