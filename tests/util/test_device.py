import pytest
import torch

from util.device import choose_device, choose_graphs, count_processes
from util.errors import RunError


def test_devices_are_those_that_the_flags_and_the_process_number_choose(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    assert str(choose_device(None, None, None)) == "cuda:0"
    assert str(choose_device(True, None, None, local_rank=1)) == "cuda:1"
    assert str(choose_device(None, 1, None)) == "cuda:1"
    assert str(choose_device(False, None, None, local_rank=1)) == "cpu"
    with pytest.raises(RunError, match="process 2 .* 2 are visible"):
        choose_device(None, None, None, local_rank=2)
    with monkeypatch.context() as several:
        several.setenv("LOCAL_WORLD_SIZE", "2")
        with pytest.raises(RunError, match="--gpu 1: several processes"):
            choose_device(None, 1, None)
    assert [count_processes(None, None), count_processes(None, 1)] == [2, 1]
    assert count_processes(False, None) == 1


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert choose_device(None, None, None).type == "cpu"
    assert count_processes(None, None) == 1
    with pytest.raises(RunError, match="--use-gpu True"):
        choose_device(True, None, None)
    with pytest.raises(RunError, match="--gpu 3: PyTorch sees 0"):
        choose_device(None, 3, None)


def test_cuda_graphs_are_the_default_on_one_gpu_and_need_a_gpu():
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    for device, size, compiled, expected in (
        (gpu, 1, False, True),
        (gpu, 1, True, False),
        (gpu, 2, False, False),
        (cpu, 1, False, False),
    ):
        assert choose_graphs(None, device, size, compiled) == expected
    assert choose_graphs(True, gpu, 2, False) and not choose_graphs(False, gpu, 1, False)
    with pytest.raises(RunError, match="--cuda-graphs True: needs a GPU, here cpu"):
        choose_graphs(True, cpu, 1, False)
    with pytest.raises(RunError, match="contradicts --compile"):
        choose_graphs(True, gpu, 1, True)


def test_threads_are_set():
    before = torch.get_num_threads()
    try:
        choose_device(False, None, before + 1)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
