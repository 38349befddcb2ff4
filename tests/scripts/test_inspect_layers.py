"""Tests of scripts/inspect_layers.py: the table and the figure of a run."""

import numpy as np
import pytest
import torch
from matplotlib.image import imread

import main
from deconv import FastDeconv
from scripts import inspect_layers
from tests.pairwise import loop_over

TRAIN = "--dataset digits --arch simple_v1 --epochs 1 --batch-size 64 --max-steps 3 --use-gpu False"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run")
    line = f"{TRAIN} --deconv True --save-plot False --tensorboardX True --run-dir {run_dir}"
    main.main(line.split())
    return run_dir


@pytest.mark.parametrize(("name", "flag"), [("checkpoint.pth.tar", "--images"), ("", "--pictures")])
def test_a_run_is_printed_and_drawn(name, flag, run_dir, tmp_path, capsys):
    out = tmp_path / "new" / "layers.png"
    inspect_layers.main([str(run_dir / name), str(out), flag, "32"])
    header, first, *_, last = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["layer", "features", "patches"] and first.endswith("%")
    assert str(out) in last
    pixels = imread(out)
    assert pixels.shape[0] > 1000 and pixels[..., :3].std() > 0.05


def test_the_event_file_of_a_run_has_the_metrics_of_each_layer(run_dir):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(run_dir))
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("whiteness/")]
    parts = {tag.split("/")[1] for tag in tags}
    assert parts == {"before", "after", "condition", "under_floor"} and len(tags) % 4 == 0
    (event,) = events.Scalars(next(tag for tag in tags if tag.startswith("whiteness/after")))
    assert event.step == 3 and 0 < event.value <= 1


def test_whitening_kernels_are_a_centre_against_its_surround():
    torch.manual_seed(0)
    layer, x = FastDeconv(1, 4, 5, mode=4, eps=1e-3), torch.randn(40, 1, 24, 24)
    blurred = torch.nn.functional.avg_pool2d(x, 3, stride=1)
    layer(5 * blurred + 2)
    (kernel,) = inspect_layers.centre_kernels(layer)
    assert kernel.argmax() == 12 and kernel[2, 2] > 0
    assert all(kernel[at] < 0 for at in ((1, 2), (2, 1), (2, 3), (3, 2)))
    torch.testing.assert_close(kernel, kernel.flip(0, 1), rtol=0.2, atol=0.1)


def test_correlations_agree_with_numpy_and_are_zero_for_a_constant():
    torch.manual_seed(0)
    x = torch.randn(5, 2, 100, dtype=torch.float64).cumsum(0)
    x[2] = 1.0
    correlation = inspect_layers.correlate(
        torch.stack([torch.cov(part) for part in x.transpose(0, 1)])
    )
    moving = [0, 1, 3, 4]
    expected = sum(np.corrcoef(x[moving, part]) for part in (0, 1)) / 2
    np.testing.assert_allclose(correlation[moving][:, moving], expected)
    assert not correlation[2].any() and not correlation[:, 2].any()
    assert inspect_layers.correlate(torch.full((1, 2, 2), torch.nan)).isnan().all()


@pytest.mark.parametrize("options", [dict(mode=5), dict(mode=3), dict(mode=1, groups=2, block=1)])
def test_whitening_kernels_fold_to_the_whitened_weight(options):
    layer = FastDeconv(4, 6, 3, **options).double()
    layer(torch.randn(9, 4, 8, 8).double())
    groups = layer.groups
    kernels = layer.whitening_kernels().unflatten(0, (groups, -1)).flatten(2)
    weight = layer.weight.unflatten(0, (groups, -1)).flatten(2)
    expected = layer.whitened_weight().unflatten(0, (groups, -1)).flatten(2)
    torch.testing.assert_close(weight @ kernels, expected)


@loop_over(
    ("line", "message"),
    [
        ("nowhere.pth.tar out.png", "nowhere.pth.tar"),
        ("RUN out.png --data /nowhere", "--data /nowhere"),
        ("RUN out.png --images 2", "expected an integer of at least 4, got '2'"),
    ],
)
def test_bad_input_is_named(run_dir, tmp_path, capsys, line, message):
    words = line.replace("RUN", str(run_dir / "checkpoint.pth.tar"))
    with pytest.raises(SystemExit) as stopped:
        inspect_layers.main(words.replace("out.png", str(tmp_path / "out.png")).split())
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error
    assert error.startswith("inspect_layers.py: error: ") and error.count("\n") == 1


def test_a_network_without_deconvolution_is_refused():
    with pytest.raises(ValueError, match="--deconv True"):
        inspect_layers.find_first_layer(torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1)))
