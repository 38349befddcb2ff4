"""Lines on the console and rows in the logs of a Recorder."""

from argparse import Namespace

import pytest
import torch
from torch import nn

from tests.pairwise import loop_over
from tests.states import make_training
from util.tracking.logger import read_log
from util.training.metrics import EpochMetrics
from util.training.recorder import Recorder, _first_filters
from util.training.resume import Plan

METRICS = {"loss": 0.5, "top1": 60.0, "top5": 90.0, "lr": 0.1, "seconds": 2.0}
TRAIN = {**METRICS, "steps": 2, "images": 8}


def open_recorder(tmp_path, *, print_freq=3, msg=False, epochs=10, model=None, **changes):
    flags = dict(
        out=str(tmp_path),
        resume=None,
        print_freq=print_freq,
        msg=msg,
        tensorboardX=False,
        save_plot=False,
        checkpoint_epoch=0,
        checkpoint_hist=1,
        arch="vgg11",
        method=None,
        deconv=False,
        batchnorm=True,
        optimizer="SGD",
        lr=0.1,
        lr_scheduler="cosine",
        milestone=[0.4],
        multistep_gamma=0.2,
        scheduler_step_size=30,
        warmup_epochs=0.0,
    )
    flags = Namespace(**flags | changes)
    training = make_training(model or nn.Linear(2, 2))
    plan = Plan(2, 2 * epochs, 1)
    return Recorder(flags, None, tmp_path / "run", training, plan)


class Whitening(nn.Conv2d):
    def whitened_weight(self):
        return 2 * self.weight.detach()


def run_batch(recorder, batch, loss=0.5):
    """Record a step of 10 images with this loss, 6 hits and 9 hits among the best five."""
    recorder.state.metrics.add(torch.tensor([10, 10 * loss, 6, 9], dtype=torch.float64), 0.1)
    recorder.batch(batch, {**METRICS, "loss": loss})


def run_epoch(recorder):
    training = recorder.state
    training.progress.finish_epoch(TRAIN, METRICS)
    recorder.epoch(TRAIN, METRICS)


@pytest.mark.parametrize("bars", [False, True])
def test_every_nth_step_is_logged_and_printed_where_no_bar_is_shown(
    tmp_path, capsys, monkeypatch, bars
):
    monkeypatch.setattr("util.training.recorder.shows_bars", lambda: bars)
    recorder = open_recorder(tmp_path)
    for _ in range(3):  # epochs shorter than print_freq
        for batch in (1, 2):
            run_batch(recorder, batch)
        run_epoch(recorder)
    recorder.close()
    log = read_log(tmp_path / "run" / "train_batch.log")
    assert (log["epoch"], log["batch"]) == ([2, 3], [1, 2])
    lines = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()]
    printed = [line for line in lines if "batch" in line]
    assert printed == ([] if bars else ["epoch 2 batch 1", "epoch 3 batch 2"])


def test_a_row_is_the_mean_over_the_steps_since_the_row_before(tmp_path):
    recorder = open_recorder(tmp_path)
    for batch, loss in enumerate((1.0, 2.0, 6.0, 4.0, 5.0, 9.0), 1):
        if batch == 5:  # a run that is resumed between two rows has the rows of its checkpoint
            metrics = recorder.state.metrics
            recorder.state.metrics = EpochMetrics(metrics.state_dict())
        run_batch(recorder, batch, loss)
    recorder.close()
    log = read_log(tmp_path / "run" / "train_batch.log")
    assert (log["batch"], log["loss"], log["top1"]) == ([3, 6], [3.0, 6.0], [60.0, 60.0])


def test_with_msg_every_batch_is_a_line(tmp_path, capsys):
    recorder = open_recorder(tmp_path, msg=True)
    capsys.readouterr()
    run_batch(recorder, 1)
    assert capsys.readouterr().out == "epoch 1 batch 1  loss 0.5000  top1 60.00%  lr 0.1\n"


@loop_over(
    ("changes", "schedule"),
    [
        ({}, "cosine to 0 at step 20"),
        ({"lr_scheduler": "linear"}, "linear to 0 at step 20"),
        ({"lr_scheduler": "multistep"}, "times 0.2 at step 8 and 16"),
        (
            {"lr_scheduler": "step", "warmup_epochs": 0.5},
            "times 0.2 every 30 epochs, 0.5 epochs of warmup",
        ),
    ],
)
def test_the_start_names_images_classes_and_learning_rate(tmp_path, capsys, changes, schedule):
    open_recorder(tmp_path, **changes).close()
    start = "20 training and 20 test images of 2 classes, SGD with lr 0.1, "
    assert capsys.readouterr().out.splitlines()[1] == start + schedule


def test_an_epoch_is_a_line_and_the_end_names_the_best_epoch_and_the_folder(tmp_path, capsys):
    recorder = open_recorder(tmp_path)
    run_epoch(recorder)
    recorder.finished()
    recorder.close()
    *_, epoch, end = capsys.readouterr().out.splitlines()
    assert epoch == (
        "epoch  1/10  train loss 0.5000 top1 60.00%  test loss 0.5000 top1 60.00% top5 90.00%"
        "  last lr 0.1  4.0 s"
    )
    best = "best test top1 60.00% in epoch 1"
    assert end == f"finished 2 steps in 4.0 s, {best}: {tmp_path / 'run'}"
    assert read_log(tmp_path / "run" / "test.log")["top1"] == [60.0]
    assert recorder.logger.history["epoch"] == [1]


def test_a_diagnostic_that_fails_is_a_warning_and_training_goes_on(tmp_path, capsys):
    def fail(images):
        raise RuntimeError("no eigenvalues")

    recorder = open_recorder(tmp_path)
    recorder.flags.tensorboardX = True
    for _ in range(2):
        recorder.layers(fail, torch.ones(1))
    recorder.close()
    warning = "warning: no metrics of layers, RuntimeError: no eigenvalues; training goes on"
    assert capsys.readouterr().out.count(warning) == 1


def test_the_first_filters_are_those_of_the_first_convolution():
    first = nn.Conv2d(3, 4, 3)
    raw, whitened = _first_filters(nn.Sequential(first, Whitening(4, 4, 3)))
    assert torch.equal(raw, first.weight) and not raw.requires_grad and whitened is None
    raw, whitened = _first_filters(Whitening(3, 4, 3))
    assert torch.equal(whitened, 2 * raw)
    assert _first_filters(nn.Linear(2, 2)) == (None, None)
