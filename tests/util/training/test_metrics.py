import math

import pytest
import torch

from util.training import metrics
from util.training.metrics import count_hits, peak_memory_mb


def test_hits_are_counted_among_the_largest_logits():
    logits = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
    top1, top2, top5 = count_hits(logits, torch.tensor([0, 1, 2, 2]), topk=(1, 2, 5))
    assert (top1.item(), top2.item(), top5.item()) == (2, 3, 4)
    assert count_hits(torch.ones(0, 3), torch.ones(0)) == [0, 0]


def test_a_hit_of_a_mixed_target_is_its_larger_share():
    logits = torch.tensor([[3.0, 2.0, 1.0]] * 2)
    shares = torch.tensor([[0.6, 0.0, 0.4], [0.4, 0.0, 0.6]])
    assert [hits.item() for hits in count_hits(logits, shares, topk=(1, 3))] == [1, 2]


def test_hits_agree_with_sorting_by_hand():
    torch.manual_seed(0)
    logits, targets = torch.randn(200, 10), torch.randint(10, (200,))
    order = logits.sort(dim=1, descending=True).indices.tolist()
    hits = sum(target in row[:5] for row, target in zip(order, targets.tolist(), strict=True))
    assert count_hits(logits, targets)[1].item() == hits


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
