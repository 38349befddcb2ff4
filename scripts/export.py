"""Export a trained network for serving, fused and checked on test images.

    python scripts/export.py RUN/checkpoint.pth.tar --to onnx network.onnx
    python scripts/export.py RUN/checkpoint.pth.tar --to safetensors network.safetensors --data DIR

`deconv.fuse` folds deconvolution into plain layers. The formats onnx and torch-export take images
(N, C, H, W), float32 and normalized, for any N. They return scores (N, classes). The format
safetensors holds the weights of the fused network.

The file holds the preprocessing of its input (colour, resize, crop, mean, std) and the classes. The
same facts stand in OUT.json, for programs that cannot read the file.

The script reads the written file again. It compares the file's scores on test images with those of
the checkpoint's network. Exit codes: 1 the scores differ by more than --tolerance, 2 bad input.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from deconv import fuse
from scripts.exported_network import describe_network, format_metadata, write_facts
from scripts.trained_network import load_network, make_parser, read_images
from util.cli.parser import Parser, report_errors

ANY_BATCH = ({0: torch.export.Dim("batch")},)
Run = Callable[[Tensor], Tensor]  # images (N, C, H, W) -> scores (N, classes)
Metadata = dict[str, str]


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
        trained = load_network(args.checkpoint, use_ema=args.use_ema)
        images = read_images(trained, args.data, args.images)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        facts = describe_network(trained)
        metadata = format_metadata(facts)
        run = WRITERS[args.to](fuse(trained.network), images[:2], args.out, metadata)
        write_facts(facts, args.out)
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


def write_onnx(network: nn.Module, example: Tensor, out: Path, metadata: Metadata) -> Run:
    import onnxruntime

    form = {"input_names": ["images"], "output_names": ["scores"], "dynamic_shapes": ANY_BATCH}
    program = torch.onnx.export(network, (example,), **form, dynamo=True, verbose=False)
    program.model.metadata_props.update(metadata)
    program.save(out)
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["scores"], {"images": images.numpy()})[0])


def write_torch_export(
    network: nn.Module, example: Tensor, out: Path, metadata: dict[str, str]
) -> Run:
    program = torch.export.export(network, (example,), dynamic_shapes=ANY_BATCH)
    torch.export.save(program, out, extra_files=metadata)
    return torch.export.load(out).module()


def write_safetensors(
    network: nn.Module, example: Tensor, out: Path, metadata: dict[str, str]
) -> Run:
    from safetensors.torch import load_model, save_model

    save_model(network, str(out), metadata=metadata)
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
