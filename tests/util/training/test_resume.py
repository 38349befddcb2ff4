import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.states import SPEC, make_metrics, make_state, make_training, take_step
from util.checkpoint.store import load_checkpoint, save_checkpoint
from util.errors import CheckpointError
from util.training.accelerator import Accelerator
from util.training.resume import Plan, Progress

PLAN = Plan(epoch_steps=5, total_steps=10, test_batches=1)


def make_metrics_of(top1, loss=1.0, **changes):
    return {"loss": loss, "top1": top1, "top5": 90.0, "seconds": 2.0, "images": 20} | changes


def finish(progress, top1, loss=1.0):
    progress.finish_epoch(make_metrics_of(50.0, steps=5, lr=0.1), make_metrics_of(top1, loss))


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
            "--max-steps cut epoch 1 of FILE short, at step 5; no earlier checkpoint is left: ",
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


def test_the_newest_checkpoint_that_can_continue_a_cut_epoch_is_named(tmp_path):
    """Epoch 3, of five steps, was cut short at step 13."""
    save_checkpoint(make_state(epoch=1), tmp_path, is_best=True)
    save_checkpoint(make_state(epoch=2, batches=2), tmp_path, filename="checkpoint_2.pth.tar")
    save_checkpoint(make_state(epoch=3, step=13), tmp_path)
    (tmp_path / "checkpoint_9.pth.tar").write_bytes(b"damaged")
    latest = tmp_path / "checkpoint.pth.tar"
    plan, training = replace(PLAN, total_steps=20), make_training(nn.Linear(3, 2))
    for name in ("checkpoint_2", "checkpoint_previous", "model_best"):
        earlier = latest.with_name(f"{name}.pth.tar")
        with pytest.raises(CheckpointError, match=f"at step 13; continue with --resume {earlier}$"):
            training.restore(load_checkpoint(latest), plan, file=str(latest))
        training.restore(load_checkpoint(earlier), plan, file=str(earlier))
        earlier.unlink()
