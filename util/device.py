"""Devices: choose GPU or CPU, deterministic algorithms, CUDA graphs; describe the hardware."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

import torch

from util.errors import RunError


def count_processes(use_gpu: bool | None, gpu: int | None) -> int:
    """Return the number of processes of this machine: one per visible GPU, at least one."""
    return 1 if use_gpu is False or gpu is not None else max(1, torch.cuda.device_count())


def choose_device(
    use_gpu: bool | None, gpu: int | None, threads: int | None, local_rank: int = 0
) -> torch.device:
    """Return the GPU of this process, or the CPU.

    Args:
        use_gpu: True requires a GPU, False forbids GPUs, None uses a GPU if there is one.
        gpu: number of the GPU. None: `local_rank`, the number of this process on its machine.
        threads: CPU threads of PyTorch. None: PyTorch chooses.

    Raises:
        RunError: a required GPU is missing, or too few for the processes.
    """
    visible = torch.cuda.device_count() if use_gpu is not False else 0
    if use_gpu and not visible:
        raise RunError("--use-gpu True: PyTorch sees no CUDA device here")
    if gpu is not None and gpu >= visible:
        raise RunError(f"--gpu {gpu}: PyTorch sees {visible} CUDA devices here")
    if threads is not None:
        torch.set_num_threads(threads)
    if gpu is not None and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1:
        raise RunError(f"--gpu {gpu}: several processes on this machine cannot share one GPU")
    if not visible:
        return torch.device("cpu")
    index = local_rank if gpu is None else gpu
    if index >= visible:
        raise RunError(
            f"process {index} of this machine has no GPU: {visible} are visible; start as many "
            "processes, or use the CPU with --use-gpu False"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def choose_graphs(wanted: bool | None, device: torch.device, size: int, compiled: bool) -> bool:
    """Return True if training steps run as CUDA graphs.

    `wanted` is --cuda-graphs, where None means on one GPU, as no measurement covers several; `size`
    is the world size, `compiled` is --compile. Raise RunError if graphs are wanted, but impossible.
    """
    is_gpu = device.type == "cuda"
    if wanted and not is_gpu:
        raise RunError(f"--cuda-graphs True: needs a GPU, here {device.type}")
    if wanted and compiled:
        raise RunError("--cuda-graphs True: contradicts --compile")
    return is_gpu and size == 1 and not compiled if wanted is None else wanted


def choose_algorithms(deterministic: bool) -> None:
    """Restrict PyTorch to deterministic operations, or lift the restriction."""
    if deterministic:  # before the first use of a GPU: cuBLAS reads its workspace size once
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = False


def describe_device(device: torch.device) -> str:
    """Return `cpu, 2 threads`, or `cuda, <name of the GPU>`."""
    if device.type == "cuda":
        return f"cuda, {torch.cuda.get_device_name(device)}"
    threads = torch.get_num_threads()
    return f"{device.type}, {threads} thread{'s' if threads > 1 else ''}"


def read_processor() -> str:
    """Return the name of the CPU, else its architecture."""
    try:
        match = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        match = None
    return match[1] if match else platform.machine()
