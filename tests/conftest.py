import pytest
import torch


def pytest_collection_modifyitems(items):
    """Tests marked gpu run wherever there is one."""
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device here"))
