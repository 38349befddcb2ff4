"""Checkpoints with a valid checksum but content that no run has written."""

import copy
import io
import tempfile
from collections import OrderedDict
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch

import main
import main_imagenet
from util.checkpoint import store
from util.checkpoint.store import load_checkpoint, save_checkpoint
from util.cli.settings import read_settings
from util.errors import CheckpointError

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as draw  # noqa: E402

QUIET = "--use-gpu False --threads 1 --save-plot False --tensorboard False --epochs 2 --lr .01"
LINES = {
    main: "--dataset digits --arch simple_v1 --batch-size 720 --optimizer Adam --ema .5",
    main_imagenet: "--dummy --image-size 32 -b 2 -j 0 -a squeezenet1_1 --test-run True"
    " --test-iter 1 --optimizer Adam",
}
NAN, HUGE, ENDLESS = float("nan"), 2**70, 10**500


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return a function: script -> a checkpoint from the middle of a run."""
    states = {}
    for script, line in LINES.items():
        folder = tmp_path_factory.mktemp("runs")
        words = f"{line} {QUIET} --checkpoint-epoch 1 --run-dir {folder / 'run'}"
        script.main(words.split())
        states[script] = load_checkpoint(folder / "run" / "checkpoint_1.pth.tar")
    return lambda script: copy.deepcopy(states[script])


def resume(script, path):
    """Return exit code, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(out), redirect_stderr(err):
            script.main(["--resume", str(path)])
        return 0, out.getvalue(), err.getvalue()
    except SystemExit as end:
        return end.code, out.getvalue(), err.getvalue()


def keep(state, path):
    """Write a state that `save_checkpoint` would refuse."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "_check_state", lambda *args: None)
        patch.setattr(store, "_read", lambda *args, **kwargs: None)
        return save_checkpoint(state, path.parent, filename=path.name)


def change(state, way, value):
    """Put `value` at a place of `state` such as progress/step; "gone" removes the place.

    A function computes the value from the one at the place.
    """
    if isinstance(way, str):
        way = [int(key) if key.isdecimal() else key for key in way.split("/")]
    *way, last = way
    inner = state
    for key in way:
        inner = inner[key]
    if isinstance(value, str) and value == "gone":
        del inner[last]
    else:
        inner[last] = value(inner[last]) if callable(value) else value
    return state


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def add_attribute(model):
    model = OrderedDict(model)
    model.note = "none"
    return model


ANY = [
    *(None, True, -1, 10**6, HUGE, ENDLESS, "1", "a\0b", "gone", NAN, 1e300, -0.5),
    *([], [1], {}, {1: 2}, [[[]]], (1, 2)),
    *(torch.zeros(2), torch.zeros(1, dtype=torch.int64), torch.eye(2).to_sparse()),
    torch.zeros(5056, dtype=torch.uint8, device="meta"),
]
# (place, value, message); a function computes the value from the one at the place.
ODD = [
    ("progress", "gone", "progress is missing"),
    ("best_top1", NAN, "best_top1 is nan, not a number"),
    ("best_top1", 12.5, "best_top1 is 12.5, not "),
    ("step", True, "step is True, not an integer"),
    ("step", -1, "step is -1, not an integer"),
    ("step", HUGE, "step is a number of 71 bits, not an integer"),
    ("step", 10**6, "step is 1000000, not 2 as elsewhere"),
    ("epoch", "1", "epoch is '1', not an integer"),
    ("progress", [1, 2], "progress is a list of 2, not a dict"),
    ("progress/7", 1, "a key of progress is 7, not of type str"),
    ("progress/step", 2.0, "progress.step is 2.0, not an integer"),
    ("progress/images", "gone", "progress.images is missing"),
    ("progress/best_top1", NAN, "progress.best_top1 is nan"),
    ("progress/best_epoch", 5, "progress.best_epoch is 5, not an integer from 0 to 1"),
    ("progress/latest", {"train_loss": "1"}, "progress.latest.train_loss is '1', not a number"),
    ("meters/rows", torch.zeros(0, 3), "meters.rows is a tensor of float32 (0, 3), not a plain"),
    ("meters/rows", torch.full((1, 4), NAN), "meters.rows is a tensor of float32 (1, 4), not"),
    ("meters/rows", torch.zeros(1, 1).expand(2**40, 4), "meters.rows is a tensor of float32 (10"),
    ("meters/seconds", -1.0, "meters.seconds is -1.0, not a number from 0"),
    ("history", {}, "history.epoch is missing"),
    ("history/train_loss", [], "the length of history.train_loss is 0, not 1 as elsewhere"),
    ("history/epoch", [9], "history.epoch[-1] is 9, not 1 as elsewhere"),
    ("history/test_top1", ["99"], "history.test_top1[0] is '99', not a number"),
    ("config/val_split", 0.5, "history.val_loss is missing"),
    ("rng", [], "rng is a list of 0, not a list of 1 or more"),
    ("rng/0/torch", torch.zeros(5056, dtype=torch.uint8), "rng[0].torch is a tensor of uint8"),
    (
        "rng/0/torch",
        lambda value: value.to("meta"),
        "rng[0].torch is a tensor of uint8 (5056,), not",
    ),
    ("rng/0/numpy/state/pos", 10**6, "rng[0].numpy.state.pos is 1000000"),
    ("rng/0/numpy/bit_generator", "PCG64", "rng[0].numpy.bit_generator is 'PCG64', not"),
    ("rng/0/python", (3, (1, 2), None), "rng[0].python is a tuple of 3, not a state"),
    ("config", "--lr 1", "config is '--lr 1', not a dict"),
    ("config/epochs", 0, "config.epochs is 0, not an integer"),
    ("config/lr", "0.1", "config.lr is '0.1', not of type float"),
    ("config/lr", NAN, "config.lr is nan: expected a number above 0"),
    ("config/arch", "nonsense", "config.arch: 'nonsense' is no architecture of"),
    ("config/arch", "help", "config.arch: 'help' is no architecture of"),
    ("config/arch", ["vgg11"], "config.arch: a list of 1 is no architecture of"),
    ("config/batch_size", ENDLESS, "config.batch_size is a number of 1661 bits"),
    ("config/deconv", 1, "config.deconv is 1, not of type bool"),
    ("config/optimizer", "SGDM", "config.optimizer is 'SGDM', not one of SGD, Adam, AMSGrad"),
    ("config/milestone", [0.4, "x"], "config.milestone is 'x': expected a number"),
    ("spec/classes", ("a", 2), "spec.classes[1] is 2, not a text"),
    ("spec/mean", [0.5, NAN], "spec.mean[1] is nan"),
    ("spec/in_channels", 2**40, "spec.in_channels is 1099511627776, not an integer from 1"),
    ("scaler", [1], "scaler is a list of 1, not a dict"),
    ("scaler", torch.zeros(3), "scaler is a tensor of float32 (3,), not a dict"),
    ("scaler", {"scale": 2.0}, "scaler.growth_factor is missing"),
    ("model", [1], "model is a list of 1, not a dict"),
    ("model", add_attribute, "model is a OrderedDict of"),
    ("model/1", torch.zeros(1), "a key of model is 1, not of type str"),
    ("optimizer/param_groups", {}, "optimizer.param_groups is a dict of 0, not a list"),
    ("optimizer/state/x", {}, "a key of optimizer.state is 'x', not of type int"),
    ("optimizer/state/0", {"exp_avg": [0.0]}, "optimizer.state.0.exp_avg is a list of 1, not"),
    ("own_buffers", [None], "own_buffers[0] is None, not a dict"),
]
# (place, value, message) of valid content that does not fit the run.
FOREIGN = [
    ("model/{name}", lambda value: value.double(), "model.{name} is a tensor of float64"),
    ("model/{name}", lambda value: value[:1], "model.{name} is a tensor of"),
    ("model/{name}", "gone", "Missing key(s) in state_dict"),
    ("optimizer/param_groups", lambda groups: groups * 2, "optimizer.param_groups differ"),
    ("optimizer/state/0/{kept}", torch.zeros(7), "optimizer.state.0.{kept} is a tensor of"),
    ("optimizer/state/0/{kept}", "gone", "optimizer.state.0 differs, of ("),
    ("optimizer/state/0/other", torch.zeros(1), "optimizer.state.0 differs, of ("),
    ("optimizer/state/999", {}, "optimizer.state.999 belongs to no parameter"),
    ("own_buffers", [{"none": torch.zeros(1)}], "own_buffers[0].none is not known"),
    ("ahead", 10**6, "progress.step has 1000000 steps, but 1 epochs of"),
]


def refuse(script, path, message):
    """Check for one line with the name of the file, exit code 2 and an unchanged folder."""
    before = contents(path.parent)
    code, out, err = resume(script, path)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert str(path) in err and message in err
    assert contents(path.parent) == before


@pytest.mark.parametrize(("place", "value", "message"), ODD, ids=[message for *_, message in ODD])
def test_odd_content_is_refused_by_place_and_passed_over_where_there_is_other(
    runs, tmp_path, place, value, message
):
    state = runs(main)
    save_checkpoint(state, tmp_path, filename="checkpoint_previous.pth.tar")
    path = keep(change(state, place, value), tmp_path / "checkpoint.pth.tar")
    refuse(main, path, f"{path}: damaged or foreign content: {message}")
    argv = ["--resume", "auto", "--run-dir", str(tmp_path)]
    with redirect_stdout(io.StringIO()) as output:
        flags, saved = read_settings(main.build_script(), argv)
    assert flags.resume == str(path.with_name("checkpoint_previous.pth.tar"))
    assert saved["step"] == 2 and message in output.getvalue()


@pytest.mark.parametrize(
    ("place", "value", "message"), FOREIGN, ids=[message for *_, message in FOREIGN]
)
def test_what_fits_not_the_run_is_refused_by_place(runs, tmp_path, place, value, message):
    check_foreign(runs, tmp_path, main, place, value, message)


def test_odd_content_in_the_other_script_too(runs, tmp_path):
    state = runs(main_imagenet)
    path = keep(change(state, "config/test_iter", "all"), tmp_path / "checkpoint.pth.tar")
    refuse(main_imagenet, path, "config.test_iter is 'all': expected an integer")
    check_foreign(runs, tmp_path, main_imagenet, *FOREIGN[0])


def check_foreign(runs, tmp_path, script, place, value, message):
    state = runs(script)
    names = {"name": next(iter(state["model"])), "kept": list(state["optimizer"]["state"][0])[-1]}
    if place == "ahead":
        state["step"] = state["progress"]["step"] = value
        state["history"]["step"][-1] = value
    else:
        change(state, place.format(**names), value)
    path = keep(state, tmp_path / "checkpoint.pth.tar")
    refuse(script, path, message.format(**names))


@pytest.mark.filterwarnings("error")
def test_what_nobody_reads_costs_no_run(runs, tmp_path):
    """Store a sparse tensor, for example, under a key that no run reads."""
    state = change(runs(main), "scheduler", torch.eye(2).to_sparse())
    path = keep(state, tmp_path / "checkpoint.pth.tar")
    assert resume(main, path)[0] == 0
    assert load_checkpoint(path)["step"] == 4


def test_what_would_not_be_read_is_not_saved(runs, tmp_path):
    state = runs(main)
    with pytest.raises(CheckpointError, match="step is -1"):
        save_checkpoint(change(state, "step", -1), tmp_path)
    assert not list(tmp_path.iterdir())


def places(state, way=()):
    """Yield the path of every key, down to single values."""
    inside = state.items() if isinstance(state, dict) else ()
    inside = enumerate(state[:3]) if isinstance(state, list) else inside
    for key, value in inside:
        yield (*way, key)
        yield from places(value, (*way, key))


def check_any(runs, data):
    """Check that any value at any place is refused in one line, or that the run finishes."""
    state = runs(main)
    way = data.draw(draw.sampled_from(sorted(places(state), key=str)))
    value = data.draw(draw.sampled_from(ANY))
    with tempfile.TemporaryDirectory() as folder:
        path = keep(change(state, way, value), Path(folder, "checkpoint.pth.tar"))
        before = contents(path.parent)
        code, _, err = resume(main, path)
        if code:
            assert (code, err.count("\n")) == (2, 1) or "diverged" in err, err
            assert contents(path.parent) == before or "diverged" in err


OPTIONS = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}


@settings(max_examples=20, derandomize=True, **OPTIONS)
@given(draw.data())
def test_any_value_at_any_place_is_refused_or_harmless(runs, data):
    check_any(runs, data)


@pytest.mark.slow
@settings(max_examples=1000, **OPTIONS)
@given(draw.data())
def test_many_more_values_at_any_place_are_refused_or_harmless(runs, data):
    check_any(runs, data)
