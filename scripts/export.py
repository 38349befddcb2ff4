"""Export a trained network for serving, fused and checked on test images.

    python scripts/export.py RUN/checkpoint.pth.tar --to onnx network.onnx
    python scripts/export.py RUN/checkpoint.pth.tar --to safetensors network.safetensors --data DIR

`deconv.fuse` folds deconvolution into plain layers. The formats onnx and torch-export take images
(N, C, H, W), float32 and normalized, for any N. They return scores (N, classes). The format
safetensors holds the weights of the fused network.

The script reads the written file again. It compares the file's scores on test images with those of
the checkpoint's network. Exit codes: 1 the scores differ by more than --tolerance, 2 bad input.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from deconv import fuse
from scripts import trained_network
from scripts.trained_network import INPUT_ERRORS, load_network, read_images

SCRIPT = "export.py"
BATCH = "batch"  # name of the dimension of any size
Run = Callable[[Tensor], Tensor]  # images (N, C, H, W) -> scores (N, classes)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        trained = load_network(args.checkpoint)
        images = read_images(trained.flags, args.data, args.images)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        facts = describe_input(trained.saved)
        run = WRITERS[args.to](fuse(trained.network), images[:2], args.out, facts)
    except INPUT_ERRORS as error:
        trained_network.stop(SCRIPT, error)
    with torch.no_grad():
        expected = trained.network(images)
        # Two batch sizes, both unlike that of the example.
        scores = torch.cat([run(images[:1]), run(images[1:])])
    scale = expected.abs().max().item()
    difference = (scores - expected).abs().max().item()
    print(
        f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB; over {len(images)} images the "
        f"largest difference is {difference:.2g}, of scores up to {scale:.3g}"
    )
    if not difference <= args.tolerance * scale:  # true for NaN, too
        message = f"the difference is more than {args.tolerance:g} of the largest score"
        trained_network.stop(SCRIPT, message, code=1)


def parse_args(argv: Sequence[str] | None) -> Namespace:
    parser = argparse.ArgumentParser(prog=SCRIPT, description=__doc__.splitlines()[0])
    trained_network.add_arguments(
        parser, "file to write", 32, "number of test images to compare on, at least 4"
    )
    parser.add_argument("--to", choices=WRITERS, required=True, help="format of the file")
    text = "largest difference of two scores, over the largest score (default: %(default)s)"
    parser.add_argument("--tolerance", type=float, default=1e-4, help=text)
    args = trained_network.parse_args(parser, argv)
    missing = [name for name in PACKAGES[args.to] if find_spec(name) is None]
    if missing:
        parser.error(
            f"--to {args.to} needs {', '.join(missing)}, not installed here: "
            f"pip install '.[{args.to}]' in the folder of this project"
        )
    return args


def describe_input(saved: dict[str, Any]) -> dict[str, str]:
    """Return the architecture and the dataset's facts (mean, std, classes, ...) as text."""
    facts = {"arch": saved["config"]["arch"], **saved["spec"]}
    return {
        name: fact if isinstance(fact, str) else json.dumps(fact) for name, fact in facts.items()
    }


def write_onnx(network: nn.Module, example: Tensor, out: Path, facts: dict[str, str]) -> Run:
    import onnxruntime

    names = {"input_names": ["images"], "output_names": ["scores"]}
    shapes = ({0: torch.export.Dim(BATCH)},)
    program = torch.onnx.export(
        network, (example,), **names, dynamic_shapes=shapes, dynamo=True, verbose=False
    )
    program.model.metadata_props.update(facts)
    program.save(out)
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["scores"], {"images": images.numpy()})[0])


def write_torch_export(
    network: nn.Module, example: Tensor, out: Path, facts: dict[str, str]
) -> Run:
    shapes = ({0: torch.export.Dim(BATCH)},)
    program = torch.export.export(network, (example,), dynamic_shapes=shapes)
    torch.export.save(program, out, extra_files={"facts.json": json.dumps(facts)})
    return torch.export.load(out).module()


def write_safetensors(network: nn.Module, example: Tensor, out: Path, facts: dict[str, str]) -> Run:
    from safetensors.torch import load_model, save_model

    save_model(network, str(out), metadata=facts)
    blank = copy.deepcopy(network).to_empty(device="cpu")
    for tensor in blank.state_dict().values():
        tensor.fill_(0)
    load_model(blank, str(out))
    return blank


WRITERS = {"onnx": write_onnx, "torch-export": write_torch_export, "safetensors": write_safetensors}
PACKAGES = {
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
    "torch-export": (),
    "safetensors": ("safetensors",),
}

if __name__ == "__main__":
    main()
