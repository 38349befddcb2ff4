"""TODO: util/device.py."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

import torch

from util.errors import RunError


def count_processes(use_gpu: bool | None, gpu: int | None) -> int:
    """Processes for this machine: one for each visible GPU, one where none is to be used."""
    return 1 if use_gpu is False or gpu is not None else max(1, torch.cuda.device_count())


def choose_device(
    use_gpu: bool | None, gpu: int | None, threads: int | None, local_rank: int = 0
) -> torch.device:
    """The GPU of this process where there is one.

    Args:
        use_gpu: True insists on a GPU, False leaves them alone.
        gpu: the number of the one to use; None: that of the process.
        threads: how many PyTorch uses on the CPU, None as it chooses.
        local_rank: number of this process on its machine.

    Raises:
        RunError: True, and PyTorch sees no GPU; or there are fewer than processes.
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


def choose_graphs(
    wanted: bool | None, device: torch.device, processes: int, compiled: bool
) -> bool:
    """Whether training steps are replayed as CUDA graphs; unless told, wherever that can be.

    Raises:
        RunError: they are wanted where they cannot be.
    """
    possible = device.type == "cuda" and processes == 1
    if wanted and not possible:
        raise RunError(f"--cuda-graphs True: needs one GPU, here {processes} x {device.type}")
    if wanted and compiled:
        raise RunError("--cuda-graphs True: contradicts --compile")
    return possible and not compiled if wanted is None else wanted


def choose_algorithms(deterministic: bool) -> None:
    """Let PyTorch use only operations that give the same bits each time, or whichever is fastest.

    Called before a GPU is used: cuBLAS reads once how much memory it may have.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = False


def describe_device(device: torch.device) -> str:
    """`cpu, 2 threads`, or `cuda, <name of the GPU>`."""
    if device.type == "cuda":
        return f"cuda, {torch.cuda.get_device_name(device)}"
    return f"{device.type}, {torch.get_num_threads()} threads"


def read_processor() -> str:
    """The CPU's name where the system tells it, else its kind."""
    try:
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.machine()
