"""Message sizes of distributed training per step and network, as a Markdown table.

    python scripts/bench/messages.py                     the networks of docs/scaling.md
    python scripts/bench/messages.py resnet18d:64 vgg16:8

Gradients are sent once per step, statistics once in the forward and once in the backward. A ring of
N processes moves 2 (N-1)/N times these bytes through each process. The last column is the size of
the sampled patches per image of 32 or 224 pixels a side; the published layer keeps them for its
backward.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from deconv.ops.patches import sample
from models import ARCHITECTURES, build_imagenet_model, build_model, make_layers

BYTES = 4  # per float32 number
SHOWN = (
    *("vgg11:16", "resnet18:16", "resnet18:64", "densenet121:16"),
    *("vgg11d:16", "resnet18d:16", "resnet18d:64", "resnet50d:16", "resnet50d:64"),
    *("densenet121d:16", "densenet121d:64"),
)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mode", type=int, default=5, help="mode of deconvolution (5)")
    parser.add_argument("--own", action="store_true", help="one matrix per block")
    parser.add_argument("networks", nargs="*", default=SHOWN, metavar="NAME:BLOCK")
    flags = parser.parse_args(argv)
    print(
        "| network | block | gradients | statistics | statistics / gradients | messages | patches |"
    )
    print("|---|---|---|---|---|---|---|")
    for text in flags.networks:
        name, _, block = text.partition(":")
        if not block.isdigit() or int(block) < 1:
            parser.error(f"expected NAME:BLOCK such as resnet18d:64, got {text!r}")
        try:
            model = build(name, flags.mode, int(block), shared=not flags.own)
        except ValueError as error:
            parser.error(str(error))
        gradients = sum(parameter.numel() for parameter in model.parameters()) * BYTES
        sizes = [2 * size * BYTES for size in message_sizes(model)]
        print(
            f"| {name} | {block} | {gradients / 1e6:.1f} MB | {sum(sizes) / 1e6:.1f} MB "
            f"| {100 * sum(sizes) / gradients:.0f} % | {2 * len(sizes)} "
            f"| {BYTES * patch_size(model, 32 if name in ARCHITECTURES else 224) / 1e6:.1f} MB |"
        )


def build(name: str, mode: int, block: int, *, shared: bool) -> nn.Module:
    """Build a network on the meta device."""
    small = name in ARCHITECTURES
    final = 512 if small else 32
    layers = make_layers(
        deconv=True,
        mode=mode,
        block=block,
        block_final=final,
        shared=shared,
        rows_per_feature=0,
    )
    with torch.device("meta"):
        return (build_model if small else build_imagenet_model)(name, layers)


def message_sizes(model: nn.Module) -> list[int]:
    """Return the numbers per message of a forward: count, means and matrices of every axis."""
    return [
        1 + module.running_mean.numel() + getattr(module, f"running_cov_{axis}").numel()
        for module in model.modules()
        for axis in getattr(module, "axes", ())
    ]


@torch.no_grad()
def patch_size(model: nn.Module, side: int) -> float:
    """Return the numbers in the sampled patches of all layers, per image."""
    sizes, images = [], 9  # enough images for every layer to subsample

    def count(module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        x = inputs[0] if inputs[0].dim() > 2 else inputs[0].unsqueeze(-1)
        sampling, blocks = module.choose_patches(x)
        sizes.append(sample(x, sampling).samples * blocks.groups * blocks.channels * blocks.taps)

    for module in model.modules():
        if hasattr(module, "axes"):
            module.register_forward_pre_hook(count)
    model(torch.empty(images, 3, side, side, device="meta"))
    return sum(sizes) / images


if __name__ == "__main__":
    main()
