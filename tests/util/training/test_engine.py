import copy
import io
import time

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from util.errors import Stopped, TrainingDiverged
from util.training import engine
from util.training.accelerator import Accelerator
from util.training.engine import _forward, evaluate, train_one_epoch
from util.training.metrics import EpochMetrics
from util.training.optim import build_criterion, build_optimizer, build_scheduler

CPU = Accelerator(torch.device("cpu"))
CRITERION = build_criterion("CE", 3)


def make_parts(images=None):
    """Return a linear model on 10 images of 2 pixels in batches of 4, 4 and 2."""
    torch.manual_seed(0)
    images = torch.randn(10, 2) if images is None else images
    loader = DataLoader(TensorDataset(images, torch.arange(10) % 3), batch_size=4)
    model = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5))
    optimizer = build_optimizer("SGD", model.parameters(), lr=0.1, weight_decay=0.01)
    scheduler = build_scheduler("cosine", optimizer, total_steps=6, epoch_steps=3)
    return model, loader, CRITERION, optimizer, scheduler


def test_evaluate_counts_every_image_once_and_changes_nothing():
    model, loader, *_ = make_parts()
    before = copy.deepcopy(model.state_dict())
    metrics = evaluate(model, loader, CRITERION, accelerator=CPU)
    logits, targets = model[0](loader.dataset.tensors[0]), loader.dataset.tensors[1]
    assert metrics["loss"] == pytest.approx(CRITERION(logits, targets).item())
    assert metrics["top1"] == pytest.approx(100 * (logits.argmax(1) == targets).sum() / 10)
    assert (metrics["top5"], metrics["images"]) == (100, 10)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_seconds_of_a_test_include_the_wait_for_its_results(monkeypatch):
    model, loader, *_ = make_parts()
    table = EpochMetrics._table
    monkeypatch.setattr(EpochMetrics, "_table", lambda self: time.sleep(0.2) or table(self))
    assert evaluate(model, loader, CRITERION, accelerator=CPU)["seconds"] > 0.2


def test_train_steps_as_written_out_by_hand():
    model, loader, *_, scheduler = parts = make_parts()
    model[1].p = 0.0
    other = copy.deepcopy(model[0])
    velocity = [torch.zeros_like(p) for p in other.parameters()]
    losses = []
    for step, (images, targets) in enumerate(loader):
        loss = CRITERION(other(images), targets)
        losses.append(loss.item())
        lr = 0.1 * (1 + torch.cos(torch.tensor(torch.pi * step / 6))) / 2
        grads = torch.autograd.grad(loss, list(other.parameters()))
        with torch.no_grad():
            for p, v, g in zip(other.parameters(), velocity, grads, strict=True):
                v.mul_(0.9).add_(g + 0.01 * p)
                p.sub_(lr * v)
    metrics = train_one_epoch(*parts, accelerator=CPU)
    for ours, theirs in zip(model[0].parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    mean = (4 * losses[0] + 4 * losses[1] + 2 * losses[2]) / 10
    assert metrics["loss"] == pytest.approx(mean)
    assert (metrics["steps"], metrics["images"]) == (3, 10)
    assert metrics["lr"] == pytest.approx(float(lr))
    assert scheduler.last_epoch == 3


def test_micro_batches_take_the_step_of_the_whole_batch():
    """Batches of 4, 4 and 2 images; a micro-batch of 3 divides none of them into equal parts."""
    whole, *rest = make_parts()
    whole[1].p = 0.0
    expected = train_one_epoch(whole, *rest, accelerator=CPU)
    for micro_batch in (1, 3, 4):
        model, *rest = make_parts()
        model[1].p = 0.0
        sizes = []
        model.register_forward_pre_hook(lambda _, args, sizes=sizes: sizes.append(len(args[0])))
        metrics = train_one_epoch(model, *rest, accelerator=CPU, micro_batch=micro_batch)
        assert sizes == {1: [1] * 10, 3: [2, 2, 2, 2, 2], 4: [4, 4, 2]}[micro_batch]
        torch.testing.assert_close(model.state_dict(), whole.state_dict())
        assert metrics == pytest.approx(expected | {"seconds": metrics["seconds"]})
        assert rest[-1].last_epoch == 3  # the schedule counts optimizer steps


def test_max_steps_ends_the_epoch_early():
    metrics = train_one_epoch(*make_parts(), accelerator=CPU, max_steps=2)
    assert (metrics["steps"], metrics["images"]) == (2, 8)


def test_an_epoch_continues_after_earlier_batches():
    whole, *rest = make_parts()
    metrics = train_one_epoch(whole, *rest, accelerator=CPU)
    again, loader, *others = make_parts()
    batches, epoch_metrics, calls = list(loader), EpochMetrics(), []
    train_one_epoch(
        again, batches, *others, accelerator=CPU, epoch_metrics=epoch_metrics, max_steps=1
    )
    epoch_metrics = EpochMetrics(epoch_metrics.state_dict())
    report = lambda batch, metrics: calls.append((batch, epoch_metrics.steps))
    options = {"accelerator": CPU, "epoch_metrics": epoch_metrics, "on_batch": report}
    ours = train_one_epoch(again, batches[1:], *others, max_steps=3, **options)
    assert calls == [(2, 2), (3, 3)]
    assert ours.pop("seconds") >= epoch_metrics.seconds > 0
    del metrics["seconds"]
    assert ours == metrics
    assert torch.equal(again[0].weight, whole[0].weight)


def test_on_batch_is_called_after_every_batch():
    calls = []
    report = lambda batch, metrics: calls.append((batch, sorted(metrics)))
    train_one_epoch(*make_parts(), accelerator=CPU, on_batch=report)
    names = ["images", "loss", "lr", "seconds", "top1", "top5"]
    assert calls == [(batch, names) for batch in (1, 2, 3)]


def test_diverging_stops_before_the_weights_are_touched():
    images = torch.randn(10, 2)
    images[5] = float("nan")  # in the second batch
    model, *rest = make_parts(images)
    seen = []
    with pytest.raises(TrainingDiverged, match="epoch 7, batch 2: the loss is nan") as caught:
        train_one_epoch(
            model,
            *rest,
            accelerator=CPU,
            micro_batch=2,
            on_batch=lambda *_: seen.append(copy.deepcopy(model.state_dict())),
            title="epoch 7",
        )
    # The micro-batches have the images 4 and 6, 5 and 7.
    torch.testing.assert_close(caught.value.images, images[[5, 7]], equal_nan=True)
    assert all(torch.equal(value, seen[-1][name]) for name, value in model.state_dict().items())


def test_a_gradient_that_is_not_finite_stops_before_the_weights_are_touched():
    model, *rest = make_parts()
    grow = lambda grad: grad * (torch.inf if len(seen) == 1 else 1)
    model[0].bias.register_hook(grow)
    seen = []
    with pytest.raises(TrainingDiverged, match="batch 2: the largest gradient is") as caught:
        train_one_epoch(
            model,
            *rest,
            accelerator=CPU,
            on_batch=lambda *_: seen.append(copy.deepcopy(model.state_dict())),
        )
    assert all(torch.equal(value, seen[-1][name]) for name, value in model.state_dict().items())
    assert (caught.value.batch, len(caught.value.images)) == (2, 4)


def test_a_stop_request_stops_after_the_step_but_not_the_last():
    calls, signals = [], iter([0, 15, 15])
    with pytest.raises(Stopped) as caught:
        report = lambda batch, _: calls.append(batch)
        train_one_epoch(
            *make_parts(), accelerator=CPU, on_batch=report, stop_request=lambda: next(signals, 15)
        )
    assert (calls, caught.value.number) == ([1, 2], 15)
    signals = iter([0, 0, 2])
    assert (
        train_one_epoch(*make_parts(), accelerator=CPU, stop_request=lambda: next(signals))["steps"]
        == 3
    )
    model, loader, criterion, *_ = make_parts()
    with pytest.raises(Stopped):
        evaluate(model, loader, criterion, accelerator=CPU, stop_request=lambda: 2)


def test_the_bar_shows_metrics_from_the_first_batch_and_once_a_second(monkeypatch):
    shown = []

    class Bar(tqdm):
        def set_postfix_str(self, text):
            shown.append(text)

    on_terminal = lambda batches, *_, **__: Bar(batches, file=io.StringIO())
    monkeypatch.setattr(engine, "progress_bar", on_terminal)
    model, loader, *rest = make_parts()
    for seconds, times in ((1e6, 1), (0.0, 3)):
        monkeypatch.setattr(engine, "REFRESH_SECONDS", seconds)
        train_one_epoch(model, loader, *rest, accelerator=CPU)
        evaluate(model, loader, CRITERION, accelerator=CPU)
        assert len(shown) == 2 * times
        shown.clear()


def test_train_and_eval_mode_are_set():
    model, loader, *rest = make_parts()
    evaluate(model, loader, CRITERION, accelerator=CPU)
    assert not model.training
    train_one_epoch(model, loader, *rest, accelerator=CPU)
    assert model.training


def test_an_empty_part_of_a_batch_is_a_step_without_an_update():
    model, _, *rest = make_parts()
    empty = [(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long))]
    rest[1].param_groups[0]["weight_decay"] = 0.0
    before = copy.deepcopy(model.state_dict())
    metrics = train_one_epoch(model, empty, *rest, accelerator=CPU)
    assert (metrics["images"], metrics["steps"]) == (0, 1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_step_stays_on_a_gpu(monkeypatch):
    """Fake tensors describe a GPU; the backward, which needs a real one, is left out."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        gpu = Accelerator(torch.device("cuda"), channels_last=True)
        with torch.device("cuda"):
            model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 3))
        images, targets = gpu.batch_to_device(torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]))
        loss, row = _forward(model, CRITERION, gpu, images, targets)
        assert {loss.device.type, row.device.type, images.device.type} == {"cuda"}
        assert row.shape == (4,) and row.dtype == torch.float64
