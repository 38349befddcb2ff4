"""What the processes of a run tell each other in a step, network by network, as a Markdown table.

    python scripts/bench/messages.py                     the networks of docs/scaling.md
    python scripts/bench/messages.py resnet18d:64 vgg16:8

Gradients are sent once a step, statistics in the forward and again in the backward. A ring of N
processes sends and receives 2 (N-1)/N times as much through each of them. Rows are the sampled
patches, for each image of 32 or 224 pixels a side, that the published layer keeps for its
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
from deconv.ops.covariance import count_patches
from models import ARCHITECTURES, build_imagenet_model, build_model, make_layers

BYTES = 4  # of a float32 number
SHOWN = (
    *("vgg11:16", "resnet18:16", "resnet18:64", "densenet121:16"),
    *("vgg11d:16", "resnet18d:16", "resnet18d:64", "resnet50d:16", "resnet50d:64"),
    *("densenet121d:16", "densenet121d:64"),
)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mode", type=int, default=5, help="of the deconvolution (5)")
    parser.add_argument("--own", action="store_true", help="a matrix for each block")
    parser.add_argument("networks", nargs="*", default=SHOWN, metavar="NAME:BLOCK")
    flags = parser.parse_args(argv)
    print("| network | block | gradients | statistics | of the gradients | messages | rows |")
    print("|---|---|---|---|---|---|---|")
    for text in flags.networks:
        name, _, block = text.partition(":")
        if not block.isdigit() or int(block) < 1:
            parser.error(f"expected NAME:BLOCK, as resnet18d:64, got {text!r}")
        try:
            model = build(name, flags.mode, int(block), shared=not flags.own)
        except ValueError as error:
            parser.error(str(error))
        gradients = sum(parameter.numel() for parameter in model.parameters()) * BYTES
        sizes = [2 * size * BYTES for size in message_sizes(model)]
        print(
            f"| {name} | {block} | {gradients / 1e6:.1f} MB | {sum(sizes) / 1e6:.1f} MB "
            f"| {100 * sum(sizes) / gradients:.0f} % | {2 * len(sizes)} "
            f"| {BYTES * row_size(model, 32 if name in ARCHITECTURES else 224) / 1e6:.1f} MB |"
        )


def build(name: str, mode: int, block: int, *, shared: bool) -> nn.Module:
    """A network that is described, not held in memory."""
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
    """Numbers in each message of a forward: 1 + means + matrices, for every axis of a layer."""
    return [
        1 + module.running_mean.numel() + getattr(module, f"running_cov_{axis}").numel()
        for module in model.modules()
        for axis in getattr(module, "axes", ())
    ]


@torch.no_grad()
def row_size(model: nn.Module, side: int) -> float:
    """Numbers in the sampled patches of all layers, for one of a batch of images."""
    sizes, images = [], 9  # so many that no layer is short of rows

    def count(module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        x = inputs[0] if inputs[0].dim() > 2 else inputs[0].unsqueeze(-1)
        sampling, blocks = module._sampling(x)
        sizes.append(count_patches(x, sampling) * blocks.groups * blocks.channels * blocks.taps)

    for module in model.modules():
        if hasattr(module, "axes"):
            module.register_forward_pre_hook(count)
    model(torch.empty(images, 3, side, side, device="meta"))
    return sum(sizes) / images


if __name__ == "__main__":
    main()
