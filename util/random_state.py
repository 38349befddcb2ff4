"""State of all random generators: seed, capture and restore."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed torch (all devices), numpy and python."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries draw from the global generator
    torch.manual_seed(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global CPU generator within the block, then restore its state."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed the GPUs
        yield


def rng_state() -> dict[str, Any]:
    """Return the states of torch, CUDA, numpy and python as plain values and tensors."""
    # Libraries draw from the global generator.
    numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002
    keys = torch.from_numpy(numpy_state["state"]["key"].astype(np.int64))
    return {
        "torch": torch.get_rng_state(),
        # A query would initialise CUDA on every GPU.
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": {**numpy_state, "state": {**numpy_state["state"], "key": keys}},
        "python": random.getstate(),
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore the states of `rng_state`; skip the states of missing GPUs."""
    torch.set_rng_state(state["torch"])
    for index, cuda_state in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
        torch.cuda.set_rng_state(cuda_state, index)
    saved = state["numpy"]
    keys = saved["state"]["key"].numpy().astype(np.uint32)
    np.random.set_state({**saved, "state": {**saved["state"], "key": keys}})  # noqa: NPY002
    random.setstate(state["python"])
