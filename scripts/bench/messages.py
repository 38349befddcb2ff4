"""Compute the message sizes of distributed training, per step and network, as a Markdown table.

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
    parser.add_argument("--mode", type=int, default=5, help="mode of deconvolution (default: 5)")
    parser.add_argument(
        "--own", action="store_true", help="one matrix per block (default: one per layer)"
    )
    parser.add_argument("networks", nargs="*", default=SHOWN, metavar="NAME:BLOCK")
    flags = parser.parse_args(argv)
    titles = ("gradients", "statistics", "statistics / gradients", "messages", "patches")
    print(f"| network | block | {' | '.join(titles)} |\n{'|---' * 7}|")
    for text in flags.networks:
        name, _, block = text.partition(":")
        if not block.isdigit() or int(block) < 1:
            parser.error(f"expected NAME:BLOCK such as resnet18d:64, got {text!r}")
        try:
            model = build(name, flags.mode, int(block), shared=not flags.own)
        except ValueError as error:
            parser.error(str(error))
        sizes = message_sizes(model)
        gradients, statistics = sum(p.numel() for p in model.parameters()), 2 * sum(sizes)
        patches = patch_size(model, 32 if name in ARCHITECTURES else 224)
        numbers = [f"{BYTES * n / 1e6:.1f} MB" for n in (gradients, statistics, patches)]
        numbers[2:2] = [f"{100 * statistics / gradients:.0f} %", str(2 * len(sizes))]
        print(f"| {name} | {block} | {' | '.join(numbers)} |")


def build(name: str, mode: int, block: int, *, shared: bool) -> nn.Module:
    """Build a network on the meta device."""
    final, make = (512, build_model) if name in ARCHITECTURES else (32, build_imagenet_model)
    settings = {"mode": mode, "block": block, "block_final": final, "shared": shared}
    with torch.device("meta"):
        return make(name, make_layers(deconv=True, rows_per_feature=0, **settings))


def message_sizes(model: nn.Module) -> list[int]:
    """Return the numbers per message of a forward: count, two means and matrices, by axis."""
    return [
        1 + 2 * module.running_mean.numel() + getattr(module, f"running_cov_{axis}").numel()
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
