import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.pairwise import loop_over
from tests.states import SPEC, make_metrics, make_state, make_training, take_step
from util.errors import CheckpointError
from util.training.accelerator import Accelerator
from util.training.ema import ExponentialAverage
from util.training.metrics import EpochMetrics
from util.training.optim import build_optimizer
from util.training.reopen import reopen_epoch
from util.training.resume import Plan, Progress

PLAN = Plan(epoch_steps=5, total_steps=10, test_batches=1)


def make_metrics_of(top1, loss=1.0, **changes):
    return {"loss": loss, "top1": top1, "top5": 90.0, "seconds": 2.0, "images": 20} | changes


def finish(progress, top1, loss=1.0):
    progress.finish_epoch(make_metrics_of(50.0, steps=5, lr=0.1), make_metrics_of(top1, loss))


def test_the_average_and_validation_images_choose_the_best_epoch_before_the_test():
    test = {"loss": 1.0, "top1": 50.0, "top5": 90.0, "seconds": 1.0}
    val, average = {**test, "top1": 30.0}, {"ema_loss": 1.0, "ema_top1": 60.0}
    for tests, best in [
        ({"test": test}, 50.0),
        ({"test": test | average}, 60.0),
        ({"test": test | average, "val": val | {"ema_loss": 1.0, "ema_top1": 40.0}}, 40.0),
        ({"test": test, "val": val}, 30.0),
    ]:
        progress = Progress()
        progress.finish_epoch(make_metrics_of(50.0, steps=5, lr=0.1), **tests)
        assert progress.best_top1 == best and progress.is_best
        worse = make_metrics_of(99.0), make_metrics_of(0.0)
        progress.finish_epoch(make_metrics_of(50.0, steps=5, lr=0.1), *worse)
        assert progress.best_test_top1 == (60.0 if "ema_top1" in tests["test"] else 50.0)


def test_counts_and_sums():
    progress = Progress()
    finish(progress, 60.0)
    finish(progress, 70.0)
    summary = progress.summary()
    assert (summary["epochs"], summary["steps"]) == (2, 10)
    assert (summary["train_seconds"], summary["images_per_second"]) == (4.0, 10.0)
    assert (summary["best_test_top1"], summary["best_epoch"]) == (70.0, 2)
    assert (summary["test_top1"], summary["test_loss"], summary["train_lr"]) == (70.0, 1.0, 0.1)


def test_the_first_of_equals_is_best():
    progress = Progress()
    best = []
    for top1 in (0.0, 60.0, 60.0, 50.0, 61.0):
        finish(progress, top1)
        best.append(progress.is_best)
    assert best == [True, True, False, False, True]


def test_nan_is_never_best():
    progress = Progress()
    finish(progress, 99.0, loss=math.nan)
    assert not progress.is_best
    finish(progress, 10.0)
    finish(progress, math.nan)
    assert (progress.best_epoch, progress.best_top1) == (2, 10.0)


@pytest.fixture
def saved():
    """The checkpoint of a run that has trained one epoch of five steps, and a step."""
    training = make_training(nn.Linear(2, 2), metrics=make_metrics(1), skipped={"bad.png"})
    take_step(training)
    finish(training.progress, 60.0)
    return training.capture()


def test_restore_inverts_capture(saved):
    training = make_training(nn.Linear(2, 2))
    training.restore(saved, PLAN, file="FILE")
    assert training.step == saved["step"] == 6
    assert repr(training.capture()) == repr(saved)


def test_the_moving_average_and_its_statistics_are_restored():
    runs = [make_training(nn.BatchNorm1d(2)) for _ in range(2)]
    for run in runs:
        run.average = ExponentialAverage(run.model, 0.5)
    for shift in (1.0, 3.0):
        runs[0].model(torch.randn(4, 2) + shift)
        runs[0].average.update_parameters(runs[0].model)
    runs[1].restore({**runs[0].capture(), "step": 2}, PLAN, file="FILE")
    for run in runs:
        run.model(torch.ones(4, 2))
        run.average.update_parameters(run.model)
    first, second = (run.average.module.state_dict() for run in runs)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert not torch.equal(first["running_mean"], runs[0].model.running_mean)


def test_a_run_continues_in_another_precision(saved):
    """Only fp16 has a gradient scaler, and state of it in the checkpoint."""
    fp16 = Accelerator(torch.device("cpu"), amp="fp16")
    scaler = {**fp16.scaler.state_dict(), "scale": 2.0}
    for state, accelerator, scale in (
        ({}, fp16, 2.0**16),
        (scaler, fp16, 2.0),
        (scaler, Accelerator(torch.device("cpu"), amp="bf16"), None),
    ):
        training = make_training(nn.Linear(2, 2))
        training.accelerator = accelerator
        training.restore({**saved, "scaler": state}, PLAN, file="FILE")
        assert training.capture()["scaler"].get("scale") == scale


@loop_over("name", ["SGD", "Adam", "AMSGrad", "AdamW"])
def test_a_run_continues_with_a_fused_optimizer_in_another_memory_format(name):
    """Move a run from a CPU to a GPU and back, with or without --channels-last."""
    plain, last = torch.contiguous_format, torch.channels_last
    weights = []
    for second in ((False, plain), (True, plain), (True, last), (False, last)):
        torch.manual_seed(0)
        saved = None
        for fused, memory_format in ((False, plain), second, (False, plain)):
            training = make_training(nn.Conv2d(3, 4, 3).to(memory_format=memory_format))
            parameters = list(training.model.parameters())
            training.optimizer = build_optimizer(name, parameters, lr=0.1, fused=fused)
            if saved:
                training.restore(saved, PLAN, file="FILE")
            for _ in range(2):
                for parameter in parameters:
                    values = torch.randn(parameter.shape)
                    parameter.grad = torch.empty_like(parameter).copy_(values)
                training.optimizer.step()
            saved = copy.deepcopy(training.capture())
        weights.append(training.model.weight.detach())
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0])


@pytest.mark.parametrize(
    ("model", "changes", "plan", "message"),
    [
        (
            nn.Linear(2, 2),
            {"spec": replace(SPEC, classes=("0", "c"))},
            PLAN,
            r"classes\[1\] is '1' in the checkpoint, 'c' in this run",
        ),
        (
            nn.Linear(2, 2),
            {"images": 21},
            PLAN,
            "number of training images is 20 in the checkpoint, 21 in this run",
        ),
        (
            nn.Linear(2, 2),
            {},
            replace(PLAN, epoch_steps=6),
            r"FILE: progress\.step has 5 steps, but 1 epochs of 6 have 6",
        ),
        (nn.Linear(3, 2), {}, PLAN, r"FILE does not fit: model\.weight is a tensor of float32"),
    ],
)
def test_restore_refuses_another_run(saved, model, changes, plan, message):
    with pytest.raises(CheckpointError, match=message):
        make_training(model, **changes).restore(saved, plan, file="FILE")


def test_a_finished_run_may_end_in_the_middle_of_an_epoch(saved):
    training = make_training(nn.Linear(2, 2))
    training.restore(saved, replace(PLAN, epoch_steps=6, total_steps=5), file="FILE")
    assert training.progress == Progress(**saved["progress"])


def test_a_checkpoint_without_the_steps_of_its_cut_epoch_is_reopened_with_their_mean():
    """Checkpoints of before the steps were kept: epoch 3, of five steps, was cut short at 13."""
    old = make_state(epoch=3, step=13)
    old["config"] = {"batch_size": 4}
    old["progress"] |= {"train_seconds": 30.0, "test_seconds": 3.0, "latest": {"test_top1": 7.0}}
    last = {"train_loss": 0.5, "train_top1": 50.0, "train_top5": 75.0, "train_seconds": 9.0}
    for key, value in {**last, "test_seconds": 1.0, "test_top1": 7.0}.items():
        old["history"][key] = [6.0, 6.0, value]
    del old["cut"]
    reopened = reopen_epoch(old, epoch_steps=5)
    metrics = EpochMetrics(reopened["meters"]).training_metrics()
    assert (metrics["steps"], metrics["images"], metrics["loss"]) == (3, 12, 0.5)
    assert (metrics["top1"], metrics["top5"], metrics["seconds"]) == (50.0, 75.0, 9.0)
    progress = Progress(**reopened["progress"])
    assert (progress.epoch, progress.step, progress.images) == (2, 10, 40)
    assert (progress.train_seconds, progress.test_seconds) == (21.0, 2.0)
    assert progress.latest == {"test_top1": 6.0} and len(reopened["history"]["epoch"]) == 2
    assert reopen_epoch(make_state(epoch=3, batches=2), epoch_steps=5)["epoch"] == 3
