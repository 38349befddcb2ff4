import math

import pytest
import torch

from util import metrics
from util.metrics import Average, accuracy, peak_memory_mb


def test_accuracy_counts_hits_among_the_largest_logits_in_percent():
    logits = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
    top1, top2, top5 = accuracy(logits, torch.tensor([0, 1, 2, 2]), topk=(1, 2, 5))
    assert (top1.item(), top2.item(), top5.item()) == (50.0, 75.0, 100.0)


def test_accuracy_agrees_with_sorting_by_hand():
    torch.manual_seed(0)
    logits, targets = torch.randn(200, 10), torch.randint(10, (200,))
    order = logits.sort(dim=1, descending=True).indices.tolist()
    hits = sum(target in row[:5] for row, target in zip(order, targets.tolist(), strict=True))
    assert accuracy(logits, targets)[1].item() == pytest.approx(hits / 2)


def test_average_weighs_by_pictures_and_mixes_tensors_and_numbers():
    average = Average()
    assert math.isnan(average.value)
    average.update(torch.tensor(1.0, requires_grad=True), 3)
    average.update(5.0, 1)
    assert average.value == 2.0 and isinstance(average.value, float)


def test_average_loses_no_small_value_among_many_pictures():
    average = Average()
    average.update(torch.tensor(1.0), 2**25)
    average.update(torch.tensor(1.0), 1)
    assert average.value == 1.0


def test_peak_memory_on_the_cpu_is_that_of_this_process_and_never_falls(monkeypatch):
    before = peak_memory_mb("cpu")
    block = torch.ones(16, 2**20)  # 64 MiB
    assert 50 < before <= peak_memory_mb(torch.device("cpu")) < 2**20
    del block
    monkeypatch.setattr(metrics, "resource", None)
    assert math.isnan(peak_memory_mb("cpu"))


@pytest.mark.gpu
def test_peak_memory_on_a_gpu_is_that_of_its_tensors():
    torch.cuda.reset_peak_memory_stats()
    before = peak_memory_mb("cuda")
    block = torch.ones(2**20, device="cuda")  # 4 MiB
    assert peak_memory_mb("cuda") >= before + block.nbytes / 2**20 - 2
