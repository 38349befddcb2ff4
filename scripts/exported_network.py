"""Write facts about a network into exported files; read networks and facts from them."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from deconv import fuse
from scripts.trained_network import TrainedNetwork, build_network, load_network
from util.checkpoint.schema import SPEC, TEXT, Rule, check_value, integer, number
from util.cli.inherited import OF_NETWORK
from util.data.images import DataSpec
from util.data.preprocessing import Preprocessing, describe_preprocessing
from util.device import choose_device
from util.errors import CheckpointError, RunError
from util.files import atomic_write

MAX_SIDE = 8192  # pixels
FACTS = {
    "arch": TEXT,
    "dataset": TEXT,
    "preprocessing": {
        "colour": Rule("RGB or L", lambda value: value in ("RGB", "L")),
        "pad": number(0, 1),
        "resize": integer(1, MAX_SIDE),
        "keep_aspect": Rule("true or false", lambda value: type(value) is bool),
        "crop": integer(1, MAX_SIDE),
        "interpolation": Rule("bilinear", lambda value: value == "bilinear"),
        **{name: SPEC[name] for name in ("mean", "std", "classes")},
    },
    "flags": Rule("a dict", lambda value: type(value) is dict),  # check_config checks the flags
}


@dataclass(frozen=True)
class Predictor:
    """Network of a run or of an exported file, with the preprocessing of its test images."""

    scores: Callable[[Tensor], Tensor]  # normalized images (N, C, H, W) -> (N, classes), on the CPU
    spec: DataSpec
    preprocessing: Preprocessing
    loss: str  # that the network was trained with, "CE" or "L2"


def load_predictor(place: str) -> Predictor:
    """Load a run's folder, a checkpoint, or a file *.onnx or *.safetensors of scripts/export.py.

    Raises:
        CheckpointError: `place` cannot be read, or does not hold a network with its facts.
        RunError: a package is not installed.
    """
    path = Path(place)
    if path.suffix in READERS:
        return READERS[path.suffix](path)
    try:
        trained = load_network(place)
    except CheckpointError as error:
        if not path.is_file() or place.endswith(".pth.tar"):
            raise
        remedy = "an exported file has to be named *.onnx or *.safetensors"
        raise CheckpointError(f"{error}; {remedy}") from error
    spec = trained.spec
    preprocessing = describe_preprocessing(spec.name, spec.image_size, spec.in_channels)
    return Predictor(_run(trained.network), spec, preprocessing, trained.flags.loss)


def describe_network(trained: TrainedNetwork) -> dict[str, Any]:
    """Return architecture, dataset, preprocessing with classes, and flags of a network."""
    spec, flags = trained.spec, vars(trained.flags)
    preprocessing = describe_preprocessing(spec.name, spec.image_size, spec.in_channels)
    numbers = {"mean": spec.mean, "std": spec.std, "classes": spec.classes}
    return {
        "arch": flags["arch"],
        "dataset": spec.name,
        "preprocessing": {**asdict(preprocessing), **numbers},
        "flags": {name: flags[name] for name in sorted(OF_NETWORK & flags.keys())},
    }


def format_metadata(facts: Mapping[str, Any]) -> dict[str, str]:
    """Return facts as text metadata; a fact that is not text becomes JSON."""
    return {key: fact if isinstance(fact, str) else json.dumps(fact) for key, fact in facts.items()}


def write_facts(facts: Mapping[str, Any], out: Path) -> None:
    """Write the facts about the exported file `out` to `out`.json."""
    with atomic_write(out.with_name(f"{out.name}.json")) as file:
        file.write(json.dumps(facts, indent=1, ensure_ascii=False).encode() + b"\n")


def read_facts(metadata: Mapping[str, str], path: Path) -> tuple[DataSpec, Preprocessing, dict]:
    """Return dataset, preprocessing and flags from the metadata of the exported file `path`.

    Raises:
        CheckpointError: the metadata are missing or not valid.
    """
    try:
        known = {key: metadata[key] for key in FACTS if key in metadata}  # others are the user's
        facts = {k: v if FACTS[k] is TEXT else json.loads(v) for k, v in known.items()}
        check_value("", facts, FACTS)
    except ValueError as error:  # also of JSON
        reason = f"no complete metadata of its network ({error})"
        raise CheckpointError(f"{path}: {reason}; export it again by scripts/export.py") from error
    given = facts["preprocessing"]
    names = [field.name for field in fields(Preprocessing)]
    preprocessing = Preprocessing(**{name: given[name] for name in names})
    classes, mean, std = (tuple(given[name]) for name in ("classes", "mean", "std"))
    shape = len(preprocessing.colour), preprocessing.crop
    return DataSpec(facts["dataset"], *shape, classes, mean, std), preprocessing, facts["flags"]


def read_onnx(path: Path) -> Predictor:
    """Read an ONNX file by onnxruntime, on the CPU."""
    require_package("onnxruntime", path)
    import onnxruntime

    _require_file(path)
    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no class in common
        reason = textwrap.shorten(str(error), 200)
        raise CheckpointError(f"{path}: damaged, or not an ONNX file ({reason})") from error
    metadata = session.get_modelmeta().custom_metadata_map
    spec, preprocessing, flags = read_facts(metadata, path)

    def scores(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

    return Predictor(scores, spec, preprocessing, flags.get("loss", "CE"))


def read_safetensors(path: Path) -> Predictor:
    """Read the weights of a fused network."""
    require_package("safetensors", path)
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_model

    _require_file(path)
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise CheckpointError(f"{path}: damaged, or not a safetensors file ({error})") from error
    spec, preprocessing, flags = read_facts(metadata, path)
    network = fuse(build_network(flags, spec, str(path))[0].eval())
    try:
        load_model(network, path)
    except (SafetensorError, RuntimeError) as error:
        reason = textwrap.shorten(str(error), 200)
        raise CheckpointError(f"{path}: tensors do not fit the network: {reason}") from error
    return Predictor(_run(network), spec, preprocessing, flags.get("loss", "CE"))


def require_package(name: str, path: Path) -> None:
    """Raise RunError if a package is not installed."""
    if find_spec(name) is None:
        raise RunError(f"{path} needs {name}, not installed here: pip install {name}")


def _require_file(path: Path) -> None:
    """Raise OSError for a file that cannot be opened."""
    path.open("rb").close()


def _run(network: torch.nn.Module) -> Callable[[Tensor], Tensor]:
    """Return the scores of a network in evaluation, fused and on the GPU if there is one."""
    device = choose_device(None, None, None)
    network = fuse(network).to(device)

    @torch.inference_mode()
    def scores(images: Tensor) -> Tensor:
        return network(images.to(device)).cpu()

    return scores


READERS = {".onnx": read_onnx, ".safetensors": read_safetensors}
