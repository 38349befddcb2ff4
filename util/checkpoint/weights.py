"""Read the weights of a network from a checkpoint or a file of another program."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor

from util.checkpoint.schema import EARLIER, TENSOR, check_value
from util.checkpoint.store import load_checkpoint, load_foreign, load_newest, select_weights
from util.console import print_line
from util.errors import CheckpointError, ContentError

EXPORTED = (".onnx", ".pt2")  # programs, whose weights are not read
WRAPPED = "module."  # prefix of all names in a state_dict of DataParallel


@dataclass(frozen=True)
class Weights:
    """Weights of a network.

    Attributes:
        file: path of the file.
        state: tensors by name.
        config: flags of the run that wrote the file; empty if another program wrote it.
    """

    file: str
    state: Mapping[str, Tensor]
    config: Mapping[str, Any]


def read_weights(place: str) -> Weights:
    """Read the weights in `place` to the CPU, never executing code.

    Args:
        place: a run's folder, which stands for its newest checkpoint; a checkpoint; a file of
            `torch.save` that holds tensors by name, also below "state_dict" or "model"; or a file
            NAME.safetensors.

    Raises:
        CheckpointError: no file can be read, or it holds no tensors by name.
    """
    if Path(place).is_dir():
        path, saved, errors = load_newest(place, load_checkpoint)
        for error in errors:
            print_line(f"warning: {error}; taking {path}")
        return Weights(str(path), select_weights(saved), {**EARLIER, **saved["config"]})
    if place.endswith(EXPORTED):
        remedy = "give a run, a checkpoint, a state_dict or a file *.safetensors"
        raise CheckpointError(f"{place}: weights are not read from this format; {remedy}")
    content = _read_safetensors(place) if place.endswith(".safetensors") else load_foreign(place)
    if isinstance(content, dict) and "format_version" in content:
        saved = load_checkpoint(place)
        return Weights(place, select_weights(saved), {**EARLIER, **saved["config"]})
    inner = [content.get(key) for key in ("state_dict", "model")] if type(content) is dict else []
    state = next((value for value in inner if isinstance(value, dict)), content)
    try:
        check_value("", state, {str: TENSOR})
    except ContentError as error:
        raise CheckpointError(f"{place}: not a state_dict: {error}") from error
    if all(name.startswith(WRAPPED) for name in state):
        state = {name.removeprefix(WRAPPED): value for name, value in state.items()}
    return Weights(place, state, {})


def _read_safetensors(place: str) -> dict[str, Tensor]:
    if find_spec("safetensors") is None:
        raise CheckpointError(f"{place}: needs safetensors, not installed: pip install safetensors")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(place)
    except OSError as error:
        raise CheckpointError(f"{place}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise CheckpointError(f"{place}: damaged, or not a safetensors file ({error})") from error
