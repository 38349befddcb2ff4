import math
import warnings

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from util.tracking import plots
from util.tracking.plots import RunCurves, draw_filters, plot_comparison, plot_training


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


def make_history(epochs):
    columns = {f"{part}_{key}": [1.5] * epochs for part in ("train", "test") for key in ("loss",)}
    columns.update({f"{part}_top1": [30.0] * epochs for part in ("train", "test")})
    return {"epoch": list(range(1, epochs + 1)), **columns}


def make_curves(label, kind, epochs=3, rows=5, epoch_steps=50):
    test = {
        "epoch": list(range(1, epochs + 1)),
        "loss": [2.0] * epochs,
        "top1": [10.0] * epochs,
        "seconds": [4.0] * epochs,
    }
    batches = {
        "epoch": [epoch for epoch in test["epoch"] for _ in range(rows)],
        "batch": [10 * (row + 1) for _ in test["epoch"] for row in range(rows)],
        "loss": [2.5] * epochs * rows,
        "top1": [9.0] * epochs * rows,
        "seconds": [4.0 * (row + 1) / rows for _ in test["epoch"] for row in range(rows)],
    }
    return RunCurves(label, kind, test, test, batches, epoch_steps)


def check_picture(path):
    with Image.open(path) as picture:
        picture.load()
        assert picture.format == "PNG"
        assert 600 <= picture.width <= 2000 and 400 <= picture.height <= 2000
        assert len(picture.convert("L").getcolors()) > 20


@pytest.mark.parametrize("epochs", [1, 2, 100])
def test_training_curves_have_axes_with_units_and_a_title(tmp_path, figures, epochs):
    plot_training(make_history(epochs), tmp_path / "plot.png", title="a $ name_^")
    check_picture(tmp_path / "plot.png")
    (figure,) = figures
    assert [axes.get_ylabel() for axes in figure.axes] == [
        "top-1 accuracy (%)",
        "loss (mean per picture)",
    ]
    assert [axes.get_xlabel() for axes in figure.axes] == ["epoch", "epoch"]
    assert figure.get_suptitle() == "a $ name_^"
    for axes in figure.axes:
        assert [line.get_label() for line in axes.lines] == ["train", "test"]
        assert all(line.get_marker() == "o" for line in axes.lines)
        assert all(float(tick).is_integer() for tick in axes.get_xticks())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_runs_that_blow_up_are_drawn_without_a_warning(tmp_path, bad):
    history = make_history(3)
    history["train_loss"] = [1.0, bad, bad]
    history["test_loss"] = [bad] * 3
    curves = make_curves("a", "bn")
    curves.batches["loss"][:] = [bad] * len(curves.batches["loss"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_training(history, tmp_path / "training.png")
        plot_comparison([curves], tmp_path / "comparison.png")
    check_picture(tmp_path / "training.png")
    check_picture(tmp_path / "comparison.png")


def test_a_comparison_shows_both_quantities_against_epochs_and_seconds(tmp_path, figures):
    runs = [make_curves("net/bn", "bn"), make_curves("net/deconv-mode5", "deconv-mode5")]
    plot_comparison(runs, tmp_path / "plot.png")
    check_picture(tmp_path / "plot.png")
    (figure,) = figures
    assert [(axes.get_xlabel(), axes.get_ylabel()) for axes in figure.axes] == [
        (x, y)
        for y in ("top-1 accuracy (%)", "loss (mean per picture)")
        for x in ("epoch", "training time (s)")
    ]
    test, train = figure.axes[1].lines[:2]
    assert test.get_xdata().tolist() == [4.0, 8.0, 12.0]
    assert train.get_xdata()[-1] == 12.0
    assert figure.axes[0].lines[1].get_xdata()[:2].tolist() == [0.2, 0.4]


def test_training_points_lie_where_their_batch_is_in_the_epoch(tmp_path, figures):
    plot_comparison([make_curves("a", "bn", rows=1, epoch_steps=16)], tmp_path / "plot.png")
    assert figures[0].axes[0].lines[1].get_xdata().tolist() == [0.625, 1.625, 2.625]


def test_kinds_differ_in_colour_and_dash_and_their_runs_in_shade_and_marker(tmp_path, figures):
    kinds = ("bn", "bn", "deconv-mode5", "deconv-mode5", "deconv-mode3")
    plot_comparison([make_curves(f"_{i}$", k) for i, k in enumerate(kinds)], tmp_path / "plot.png")
    lines = figures[0].axes[0].lines[::2]
    assert [line.get_linestyle() for line in lines] == ["--", "--", "-", "-", "-"]
    colors = [line.get_color() for line in lines]
    assert len(set(colors)) == 5
    hues = [max(range(3), key=color.__getitem__) for color in colors]
    assert hues == [2, 2, 0, 0, 1]  # blue, orange, green
    assert lines[0].get_marker() != lines[1].get_marker()
    labels = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert labels == ["_0$", "_1$", "_2$", "_3$", "_4$"]


def test_every_run_of_many_of_one_kind_looks_unlike_the_others(tmp_path, figures):
    plot_comparison([make_curves(str(i), "bn") for i in range(8)], tmp_path / "plot.png")
    lines = figures[0].axes[0].lines[::2]
    assert len({line.get_color() for line in lines}) == 8


def test_axes_begin_at_the_start_of_training(tmp_path, figures):
    plot_comparison([make_curves("a", "bn", 1, 0)], tmp_path / "plot.png")
    assert [axes.get_xlim()[0] for axes in figures[0].axes] == [0] * 4


def test_one_epoch_without_rows_of_batches_and_many_runs_can_be_drawn(tmp_path):
    runs = [make_curves(f"{'long name ' * 8}{i}", f"deconv-{i}", 1, 0) for i in range(12)]
    plot_comparison(runs, tmp_path / "plot.png")
    check_picture(tmp_path / "plot.png")


@pytest.mark.parametrize("shape", [(64, 3, 3, 3), (10, 1, 32, 32), (7, 5, 3, 1), (300, 3, 64, 64)])
def test_filters_become_a_grid_of_stretched_enlarged_kernels(shape):
    picture = draw_filters(torch.randn(shape))
    assert picture.shape[0] == 3 and picture.min() == 0 and picture.max() == 1
    kernels = min(shape[0], 256)
    assert 2 * min(picture.shape[1:]) > math.floor(math.sqrt(kernels)) * 20


def test_each_filter_is_stretched_by_itself():
    weight = torch.tensor([[0.0, 1.0], [-100.0, 300.0]]).reshape(2, 1, 1, 2)
    picture = draw_filters(weight)
    left, right = picture[0, 2:18, 2:34], picture[0, 2:18, 36:68]
    assert torch.equal(left, right) and set(left.unique().tolist()) == {0.0, 1.0}


def test_constant_and_non_finite_filters_are_drawn_and_other_shapes_refused():
    weight = torch.ones(3, 3, 3, 3)
    weight[1] = math.nan
    weight[2, 0, 0, 0] = math.inf
    assert draw_filters(weight.requires_grad_()).isfinite().all()
    with pytest.raises(ValueError, match=r"weight must be O C h w .*\(10, 20\)"):
        draw_filters(torch.zeros(10, 20))
