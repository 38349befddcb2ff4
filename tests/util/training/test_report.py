"""What the console and the logs are told."""

import pytest
import torch
from torch import nn

from util.training.report import first_filters, report_batch, report_epoch
from util.training.resume import Progress

NOW = {"loss": 0.5, "top1": 60.0, "top5": 90.0, "lr": 0.1, "seconds": 2.0}


class Recorder:
    """A logger that remembers how it was called."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.calls.append((name, *args))


class Whitening(nn.Conv2d):
    def whitened_weight(self):
        return 2 * self.weight.detach()


@pytest.mark.parametrize("bars", [False, True])
def test_every_nth_step_is_logged_and_told_where_no_bar_is_seen(capsys, monkeypatch, bars):
    monkeypatch.setattr("util.training.report.shows_bars", lambda: bars)
    logger = Recorder()
    for epoch in range(3):  # however short the epochs
        for batch in (1, 2):
            report_batch(logger, Progress(epoch=epoch, step=2 * epoch), 3, False, batch, NOW)
    assert logger.calls == [("batch", 2, 3), ("batch", 3, 6)]
    told = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()]
    assert told == ([] if bars else ["epoch 2 batch 1", "epoch 3 batch 2"])


def test_with_msg_every_batch_is_a_line(capsys):
    report_batch(Recorder(), Progress(), 3, True, 1, NOW)
    assert capsys.readouterr().out == "epoch 1 batch 1  loss 0.5000  top1 60.00%  lr 0.1\n"


def test_an_epoch_is_a_line_and_goes_to_the_logs_with_its_filters(capsys):
    logger, model = Recorder(), nn.Sequential(nn.Flatten(), nn.Linear(2, 2))
    report_epoch(logger, 2, 10, NOW, NOW, model)
    assert logger.calls == [("epoch", 2, NOW, NOW), ("filters", 2, None, None)]
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("epoch  2/10  train loss 0.5000 top1 60.00%") and "4.0 s" in line


def test_the_first_filters_are_those_of_the_first_convolution():
    first = nn.Conv2d(3, 4, 3)
    raw, whitened = first_filters(nn.Sequential(first, Whitening(4, 4, 3)))
    assert torch.equal(raw, first.weight) and not raw.requires_grad and whitened is None
    raw, whitened = first_filters(Whitening(3, 4, 3))
    assert torch.equal(whitened, 2 * raw)
