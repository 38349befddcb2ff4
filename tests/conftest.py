"""Hooks of the test run: GPU tests where there is a GPU, forking tests first."""

import pytest
import torch

# These fork the test process. PyTorch refuses a backward in a fork once autograd has threads, and
# any earlier backward on another device, such as meta, starts them.
FORKING = {"test_reliability", "test_signals", "test_store", "test_sync", "test_world"}


def pytest_collection_modifyitems(items):
    """Run forking tests first; skip tests marked gpu without a CUDA device."""
    items.sort(key=lambda item: item.path.stem not in FORKING)  # stable
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device here"))
