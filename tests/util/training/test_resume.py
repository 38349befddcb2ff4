import math

import pytest
import torch
from torch import nn

from util.errors import CheckpointError
from util.training.accelerator import Accelerator
from util.training.metrics import EpochMetrics
from util.training.optim import build_optimizer
from util.training.resume import Progress, restore, snapshot

COMPUTE = Accelerator(torch.device("cpu"))


def figures(top1, loss=1.0, **more):
    return {"loss": loss, "top1": top1, "top5": 90.0, "seconds": 2.0, "images": 20} | more


def finish(done, top1, loss=1.0):
    done.finish_epoch(figures(50.0, steps=5, lr=0.1), figures(top1, loss))


def test_counts_and_sums():
    done = Progress()
    finish(done, 60.0)
    finish(done, 70.0)
    summary = done.summary()
    assert (summary["epochs"], summary["steps"]) == (2, 10)
    assert (summary["train_seconds"], summary["images_per_second"]) == (4.0, 10.0)
    assert (summary["best_test_top1"], summary["best_epoch"]) == (70.0, 2)
    assert (summary["test_top1"], summary["test_loss"], summary["train_lr"]) == (70.0, 1.0, 0.1)


def test_the_first_of_equals_is_best():
    done = Progress()
    best = []
    for top1 in (0.0, 60.0, 60.0, 50.0, 61.0):
        finish(done, top1)
        best.append(done.is_best)
    assert best == [True, True, False, False, True]


def test_nan_is_never_best():
    done = Progress()
    finish(done, 99.0, loss=math.nan)
    assert not done.is_best
    finish(done, 10.0)
    finish(done, math.nan)
    assert (done.best_epoch, done.best_top1) == (2, 10.0)


def make_parts():
    model = nn.Linear(2, 2)
    optimizer = build_optimizer("SGD", model.parameters(), lr=0.1)
    return model, optimizer


def test_restore_takes_up_what_snapshot_kept():
    done = Progress()
    model, optimizer = make_parts()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    finish(done, 60.0)
    under_way = EpochMetrics()
    under_way.add(torch.tensor([4.0, 2.0, 1.0, 3.0]), lr=0.1)
    saved = {
        **snapshot(done, under_way, model, optimizer, COMPUTE),
        "spec": {"classes": ("a", "b")},
    }
    asked = {"file": "FILE", "spec": saved["spec"], "images": {"number of images": 20}}
    other, others_optimizer = make_parts()
    again, meters = restore(
        saved,
        other,
        others_optimizer,
        COMPUTE,
        **asked,
        epoch_steps=5,
        total_steps=10,
    )
    assert again == done
    assert saved["step"] == 6
    assert repr(meters.state_dict()) == repr(under_way.state_dict())
    assert torch.equal(other.weight, model.weight)
    assert repr(others_optimizer.state_dict()) == repr(optimizer.state_dict())
    with pytest.raises(CheckpointError, match=r"classes\[1\] is 'b' in the checkpoint, 'c' in"):
        restore(
            saved,
            other,
            others_optimizer,
            COMPUTE,
            file="FILE",
            spec={"classes": ("a", "c")},
            images={},
            epoch_steps=5,
            total_steps=10,
        )
    with pytest.raises(CheckpointError, match="--max-steps, at step 5 in the middle of 6"):
        restore(
            saved,
            other,
            others_optimizer,
            COMPUTE,
            **asked,
            epoch_steps=6,
            total_steps=10,
        )
    finished, _ = restore(
        saved, other, others_optimizer, COMPUTE, **asked, epoch_steps=6, total_steps=5
    )
    assert finished == done
    with pytest.raises(CheckpointError, match="FILE does not fit: .*size mismatch"):
        restore(
            saved,
            nn.Linear(3, 2),
            optimizer,
            COMPUTE,
            **asked,
            epoch_steps=5,
            total_steps=9,
        )
