"""Steps whose results are read one step late, on the CPU and on a device without values."""

import copy
from contextlib import nullcontext
from sys import modules

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from deconv import FastDeconv
from tests.pairwise import loop_over
from util.errors import DataError, Stopped, TrainingDiverged
from util.training import engine
from util.training.accelerator import Accelerator
from util.training.ema import ExponentialAverage
from util.training.engine import train_one_epoch
from util.training.metrics import EpochMetrics
from util.training.nonfinite import find_nonfinite
from util.training.optim import build_criterion, build_optimizer, build_scheduler

CPU = torch.device("cpu")
CRITERION = build_criterion("CE", 3)


class Late(Accelerator):
    reads_late = True


def make_parts(images=None, name="SGD", **options):
    """Return a linear model on 20 images of 2 pixels in batches of 4, and its training."""
    torch.manual_seed(0)
    images = torch.randn(20, 2) if images is None else images
    loader = DataLoader(TensorDataset(images, torch.arange(20) % 3), batch_size=4)
    model = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5))
    optimizer = build_optimizer(name, model.parameters(), lr=0.1, **options)
    scheduler = build_scheduler("cosine", optimizer, total_steps=5, epoch_steps=5)
    return model, loader, CRITERION, optimizer, scheduler


ORDERS = [  # f: forward, u: update, 1: report of batch 1
    ({}, "fu1fu2fu3fu4fu5", "fuf1uf2uf3uf4u5"),
    ({"micro_batch": 2}, "ffu1ffu2ffu3ffu4ffu5", "ffuf1fuf2fuf3fuf4fu5"),
    ({"reads_now": lambda batch: batch in (2, 3)}, "fu1fu2fu3fu4fu5", "fuf1u2fu3fuf4u5"),
]


@loop_over(("options", "order", "late_order"), ORDERS)
def test_a_late_reading_changes_no_bit_of_a_training_and_only_delays_reports(
    options, order, late_order
):
    runs = []
    for kind in (Accelerator, Late):
        model, *rest = make_parts()
        events, reports, metrics = [], [], EpochMetrics()

        def report(batch, values, events=events, reports=reports):
            events.append(str(batch))
            reports.append({**values, "seconds": 0})

        model.register_forward_pre_hook(lambda *_, events=events: events.append("f"))
        train_one_epoch(
            model,
            *rest,
            accelerator=kind(CPU),
            epoch_metrics=metrics,
            on_batch=report,
            on_update=lambda events=events: events.append("u"),
            **options,
        )
        state = rest[2].state_dict()["state"], metrics.state_dict()["rows"], model.state_dict()
        runs.append(("".join(events), reports, state))
    (now_order, *now), (then_order, *then) = runs
    assert (now_order, then_order) == (order, late_order)
    torch.testing.assert_close(then, now, rtol=0, atol=0)


@loop_over("name", ["SGD", "Adam", "AMSGrad", "AdamW"])
@loop_over("fault", ["image", "gradient"])
def test_a_bad_step_that_is_read_late_changes_neither_weights_nor_optimizer(name, fault):
    """Batch 3 is bad; the forward of batch 4 finds out. A fused kernel skips as on a GPU."""
    images = torch.randn(20, 2)
    if fault == "image":
        images[9] = torch.nan
    model, *rest = make_parts(images, name, fused=True, weight_decay=0.1)
    if fault == "gradient":
        model[0].bias.register_hook(lambda grad: grad * (torch.nan if len(seen) == 2 else 1))
    seen = []
    state = lambda: copy.deepcopy((model.state_dict(), rest[2].state_dict()["state"]))
    with pytest.raises(TrainingDiverged, match="batch 3: the") as caught:
        train_one_epoch(
            model,
            *rest,
            accelerator=Late(CPU, clip_grad=0.1),
            micro_batch=2,
            on_update=lambda: seen.append(state()),
        )
    assert len(seen) == 3  # the update of batch 3 had no effect
    torch.testing.assert_close(state(), seen[1], rtol=0, atol=0)
    bad = [9, 11] if fault == "image" else [8, 10]  # of the micro-batch
    torch.testing.assert_close(caught.value.images, images[bad], equal_nan=True)
    expected = {"image": "the output of 0 (Linear)", "gradient": "the gradient of 0.bias"}[fault]
    bad = caught.value.images, caught.value.parameters
    assert find_nonfinite(model, Accelerator(CPU), *bad) == expected


def test_a_first_fused_step_that_is_skipped_leaves_no_momentum():
    parameter = nn.Parameter(torch.ones(1000))
    optimizer = build_optimizer("SGD", [parameter], lr=0.1, fused=True)
    for scale in (torch.inf, 1.0):
        parameter.grad = torch.full((1000,), scale)
        Accelerator(CPU).step(optimizer, torch.tensor(scale == torch.inf))
    assert torch.equal(parameter.detach(), torch.full((1000,), 0.9))


def test_a_loader_that_fails_and_a_stop_request_leave_no_step_unread():
    def fail(loader):
        yield from list(loader)[:2]
        raise DataError("bad file")

    class Failing:
        __len__ = lambda self: 5
        __iter__ = lambda self: fail(loader)

    model, loader, *rest = make_parts()
    for batches, error, last in ((Failing(), DataError, 2), (loader, Stopped, 3)):
        metrics, calls, signals = EpochMetrics(), [], iter([0, 15])
        stops = {"stop_request": lambda signals=signals: next(signals, 15)}
        with pytest.raises(error):
            train_one_epoch(
                model,
                batches,
                *rest,
                accelerator=Late(CPU),
                epoch_metrics=metrics,
                on_batch=lambda batch, _, calls=calls: calls.append(batch),
                **(stops if error is Stopped else {}),
            )
        assert calls == list(range(1, last + 1)) and metrics.steps == last


class Meta(Late):
    """Compute on the meta device, whose tensors have no values: to read one is an error."""

    def autocast(self):
        return nullcontext()


class NoBlockingCopies(TorchDispatchMode):
    """Refuse copies to the device that would wait for it on a GPU."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator is torch.ops.aten._to_copy.default and args[0].device == CPU:
            assert kwargs.get("non_blocking"), kwargs
        return operator(*args, **(kwargs or {}))


@loop_over("amp", ["off", "fp16"])
def test_no_step_reads_from_the_device_before_the_forward_of_the_next(monkeypatch, amp):
    events = []

    class Copy:
        def __init__(self, values):
            assert values.is_meta

        def read(self):
            events.append("read")
            return torch.zeros(5 + len(list(model.parameters())))

    monkeypatch.setattr(engine, "HostCopy", Copy)
    adamw = modules["torch.optim.adam"]
    monkeypatch.setattr(adamw, "_device_dtype_check_for_fused", lambda *args, **kwargs: None)
    images = [torch.zeros(4, 2, 5, 5)] * 3
    targets = [torch.zeros(4, dtype=torch.long)] * 3
    model = nn.Sequential(FastDeconv(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(27, 3))
    accelerator = Meta(torch.device("meta"), amp=amp, clip_grad=1.0)
    average = ExponentialAverage(accelerator.to_device(model), 0.5)
    model(images[0].to("meta"))  # layers move their constants once
    model.register_forward_pre_hook(lambda *_: events.append("forward"))

    def update():
        events.append("update")
        average.update_parameters(model)

    def train(fused):
        optimizer = build_optimizer("AdamW", model.parameters(), lr=0.1, fused=fused)
        scheduler = build_scheduler("cosine", optimizer, total_steps=3, epoch_steps=3)
        batches = list(zip(images, targets, strict=True))
        args = model, batches, CRITERION, optimizer, scheduler
        with NoBlockingCopies():
            train_one_epoch(*args, accelerator=accelerator, on_update=update)

    train(fused=True)
    step = ["forward", "read", "update"]
    assert events == ["forward", "update", *step, *step, "read"]
    with pytest.raises(RuntimeError, match="meta"):  # an optimizer that waits for the GPU
        train(fused=False)
