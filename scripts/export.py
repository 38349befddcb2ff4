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

import copy
import json
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from deconv import fuse
from scripts.trained_network import load_network, make_parser, read_images
from util.cli.parser import Parser, report_errors

ANY_BATCH = ({0: torch.export.Dim("batch")},)
Facts = dict[str, str]  # about the input, by name
Run = Callable[[Tensor], Tensor]  # images (N, C, H, W) -> scores (N, classes)


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    missing = [name for name in PACKAGES[args.to] if find_spec(name) is None]
    if missing:
        parser.error(
            f"--to {args.to} needs {', '.join(missing)}, not installed here: "
            f"pip install '.[{args.to}]' in the folder of this project"
        )
    with report_errors(parser, ValueError):
        trained = load_network(args.checkpoint)
        images = read_images(trained, args.data, args.images)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        facts = describe_input(trained.saved)
        run = WRITERS[args.to](fuse(trained.network), images[:2], args.out, facts)
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
        limit = f"{args.tolerance:g} of the largest score"
        parser.error(f"the difference is more than {limit}", 1)


def build_parser() -> Parser:
    purpose = "number of test images to compare on"
    parser = make_parser("export.py", __doc__.splitlines()[0], "file to write", 32, purpose)
    parser.add_argument("--to", choices=WRITERS, required=True, help="format of the file")
    text = "accepted difference of scores, relative to the largest score (default: %(default)s)"
    parser.add_argument("--tolerance", type=float, default=1e-4, help=text)
    return parser


def describe_input(saved: dict[str, Any]) -> Facts:
    """Return the architecture and the dataset's facts (mean, std, classes, ...) as text."""
    facts = {"arch": saved["config"]["arch"], **saved["spec"]}
    return {key: fact if isinstance(fact, str) else json.dumps(fact) for key, fact in facts.items()}


def write_onnx(network: nn.Module, example: Tensor, out: Path, facts: Facts) -> Run:
    import onnxruntime

    form = {"input_names": ["images"], "output_names": ["scores"], "dynamic_shapes": ANY_BATCH}
    program = torch.onnx.export(network, (example,), **form, dynamo=True, verbose=False)
    program.model.metadata_props.update(facts)
    program.save(out)
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["scores"], {"images": images.numpy()})[0])


def write_torch_export(network: nn.Module, example: Tensor, out: Path, facts: Facts) -> Run:
    program = torch.export.export(network, (example,), dynamic_shapes=ANY_BATCH)
    torch.export.save(program, out, extra_files={"facts.json": json.dumps(facts)})
    return torch.export.load(out).module()


def write_safetensors(network: nn.Module, example: Tensor, out: Path, facts: Facts) -> Run:
    from safetensors.torch import load_model, save_model

    save_model(network, str(out), metadata=facts)
    read = copy.deepcopy(network)
    load_model(read, str(out))  # refuses a file that lacks a tensor
    return read


WRITERS = {"onnx": write_onnx, "torch-export": write_torch_export, "safetensors": write_safetensors}
PACKAGES = {
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
    "torch-export": (),
    "safetensors": ("safetensors",),
}

if __name__ == "__main__":
    main()
