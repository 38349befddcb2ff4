"""Export a trained network for serving: fused, in evaluation, tried on real images.

    python scripts/export.py RUN/checkpoint.pth.tar --to onnx network.onnx
    python scripts/export.py RUN/checkpoint.pth.tar --to safetensors network.safetensors --data DIR

A checkpoint names no folder: where the images are not in ./data, --data says so again.

Deconvolution is folded into plain layers (`deconv.surgery.fuse`). onnx and torch-export take images
(N, C, H, W), float32 normalised, for any N, and give the scores of the classes (N, classes);
safetensors has the weights of the fused network. What was written is read again, and its scores of
images to test with are compared with those of the network of the checkpoint. Exit codes: 1 they
differ by more than --tolerance, 2 bad input.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import main as small_images
import main_imagenet as large_images
from deconv import fuse
from util.checkpoint.store import load_checkpoint, load_newest
from util.cli.inherited import OF_THIS_MACHINE, check_config
from util.data.datasets import DataError, DataSpec, build_loaders
from util.data.imagenet import build_imagenet_loaders
from util.errors import CheckpointError, RunError
from util.training.resume import restore_model

Run = Callable[[Tensor], Tensor]  # images (N, C, H, W) -> scores (N, classes)
PLACE = "of main.py or main_imagenet.py, or the folder of such a run"
BATCH = "batch"  # the dimension whose size is left open


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        file, saved = read_saved(args.checkpoint)
        flags, network = rebuild(saved, file)
        images = read_images(flags, args.data, args.images)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        run = WRITERS[args.to](fuse(network), images[:2], args.out, describe(saved))
    except (CheckpointError, DataError, RunError, ValueError, OSError) as error:
        stop(str(error))
    with torch.no_grad():
        expected = network(images)
        # Batches of two sizes, neither the one that it was made with.
        given = torch.cat([run(images[:1]), run(images[1:])])
    scale = expected.abs().max().item()
    difference = (given - expected).abs().max().item()
    print(
        f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB; over {len(images)} images the "
        f"largest difference is {difference:.2g}, of scores up to {scale:.3g}"
    )
    if not difference <= args.tolerance * scale:  # NaN is not
        stop(f"that is more than {args.tolerance:g} of the largest score", code=1)


def stop(message: str, code: int = 2) -> None:
    print(f"export.py: error: {message}", file=sys.stderr)
    raise SystemExit(code)


def parse_args(argv: Sequence[str] | None) -> Namespace:
    parser = argparse.ArgumentParser(prog="export.py", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=PLACE)
    parser.add_argument("--to", choices=WRITERS, required=True, help="the format")
    parser.add_argument("out", metavar="OUT", type=Path, help="the file to write")
    parser.add_argument("--data", metavar="DIR", help="the images (./data, of ImageNet none)")
    parser.add_argument("--images", type=int, default=32, help="to compare with, at least 4 (32)")
    parser.add_argument(
        "--tolerance", type=float, default=1e-4, help="largest difference / largest score (1e-4)"
    )
    args = parser.parse_args(argv)
    if args.images < 4:
        parser.error(f"argument --images: at least 4 are needed, got {args.images}")
    needs = [name for name in NEEDS[args.to] if find_spec(name) is None]
    if needs:
        parser.error(
            f"--to {args.to} needs {', '.join(needs)}, not installed here: "
            f"pip install '.[{args.to}]' in the folder of this project"
        )
    return args


def read_saved(place: str) -> tuple[str, dict[str, Any]]:
    """The checkpoint `place`, the newest one where that is the folder of a run, and its content.

    Raises:
        CheckpointError: there is none that can be read.
    """
    if not os.path.isdir(place):
        return place, load_checkpoint(place, "cpu")
    path, saved, faults = load_newest(place, partial(load_checkpoint, device="cpu"))
    for fault in faults:
        print(f"warning: {fault}; going on with {path}", file=sys.stderr)
    return str(path), saved


def rebuild(saved: dict[str, Any], file: str) -> tuple[Namespace, nn.Module]:
    """The flags of a run, whose checkpoint is `file`, and its network in evaluation."""
    script = small_images if "dataset" in saved["config"] else large_images
    built = script.build_script()
    check_config(built, saved["config"], file)
    known = saved["config"].keys() - OF_THIS_MACHINE  # places among them
    inherited = {name: saved["config"][name] for name in known}
    flags = Namespace(**{**built.parser.defaults(), **inherited})
    network = script.build_network(flags, DataSpec(**saved["spec"]))
    restore_model(saved, network, file=file, spec=saved["spec"])
    return flags, network.eval()


def read_images(flags: Namespace, data: str | None, count: int) -> Tensor:
    """The first images to test with (N, C, H, W), as the network is used to them."""
    data = flags.data if data is None else data
    settings = {"batch_size": count, "image_size": flags.image_size}
    if "dataset" in flags:
        if flags.dataset == "digits" and data != flags.data:
            raise ValueError(f"--data {data} does not apply to digits, which are embedded")
        try:
            with tempfile.TemporaryDirectory() as cache:
                *_, loader = build_loaders(flags.dataset, data, cache_dir=cache, **settings)
        except DataError as error:
            raise DataError(f"--data {data}: {error}") from error
    elif data is None:
        raise ValueError("name the folder of images with --data DIR")
    else:
        *_, loader = build_imagenet_loaders(data, test_only=True, **settings)
    batches = list(islice((images for images, _ in loader), count))
    images = torch.cat(batches)[:count]
    if len(images) < 4:
        raise ValueError(f"at least 4 images are needed, {data} has {len(images)}")
    return images


def describe(saved: dict[str, Any]) -> dict[str, str]:
    """What a server must know of the images and the classes, as text."""
    facts = {"arch": saved["config"]["arch"], **saved["spec"]}
    return {
        name: fact if isinstance(fact, str) else json.dumps(fact) for name, fact in facts.items()
    }


def write_onnx(network: nn.Module, example: Tensor, out: Path, facts: dict[str, str]) -> Run:
    import onnxruntime

    program = torch.onnx.export(
        network,
        (example,),
        input_names=["images"],
        output_names=["scores"],
        dynamic_shapes=({0: torch.export.Dim(BATCH)},),
        dynamo=True,
        verbose=False,
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


WRITERS = {
    "onnx": write_onnx,
    "torch-export": write_torch_export,
    "safetensors": write_safetensors,
}
NEEDS = {
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
    "torch-export": (),
    "safetensors": ("safetensors",),
}

if __name__ == "__main__":
    main()
