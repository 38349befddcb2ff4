"""Translate weights and statistics of the published networks to our networks.

The published networks register their layers in another order than ours, and some of their layers
differ. Each difference is undone such that the outputs in evaluation stay the same:

- A ChannelDeconv before a linear layer makes this layer a convolution of one pixel that whitens.
- A layer that whitens where ours is a plain linear layer is folded, as by `deconv.fuse`.
- A BatchNorm behind a deconvolution, in shortcuts for ImageNet, is folded into the convolution.
- A bias before a BatchNorm is subtracted from its mean.
- The DenseNets for small images put the new channels of a layer first, ours put them last.

Two differences remain, and these checkpoints are refused. A DenseNet for small images whitens its
channels in another order. A published layer whose channels the block does not divide takes their
greatest common divisor, 32 of 96 with blocks of 64, where ours takes 48: this concerns DenseNets,
which are converted if they were trained with blocks of 32, by --num-groups 32.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from deconv import Delinear, fuse, published

# Names of tensors by name of layer. MOMENTUM marks the momentum of a parameter.
Layers = dict[str, dict[str, Tensor]]
MOMENTUM = "momentum of "
MATRICES = {"running_deconv", "running_cov_isqrt"}
BATCHNORM_EPS = 1e-5

# Flags for the numerics of the code of 2020, by their names in a run's settings.
PUBLISHED = {
    "root": ("--root", "newton"),
    "eps": ("--eps", "1e-5"),
    "num_groups": ("--num-groups", "64"),
    "rows_per_feature": ("--rows-per-feature", "0"),
}
# Newton-Schulz steps of the first layer in networks that freeze it, on colour images.
STEM_ITER = {"vgg": 15, "preact": 10, "senet": 15, "large": 15}

# Family -> the first part of each layer's name, then all other parts, in the order of our networks.
# Numbers count up.
_STAGES = "conv1 bn1 layer1 layer2 layer3 layer4 deconv1 linear fc"
_DENSE = "conv1 dense1 trans1 dense2 trans2 dense3 trans3 dense4 bn channel_deconv linear"
_DENSE_FEATURES = "conv0 norm0 denseblock1 transition1 denseblock2 transition2 denseblock3"
_DENSE_FEATURES += " transition3 denseblock4 norm5"
ORDERS = {
    "vgg": ("features channel_deconv classifier", ""),
    "resnet": (_STAGES, "conv1 bn1 conv2 bn2 conv3 bn3 shortcut downsample"),
    "preact": (_STAGES, "bn1 conv1 bn2 conv2 shortcut"),
    "senet": (_STAGES, "bn1 conv1 bn2 conv2 fc1 fc2 shortcut"),
    "densenet": (
        f"{_DENSE} features classifier",
        f"bn norm conv bn1 norm1 conv1 bn2 norm2 conv2 {_DENSE_FEATURES}",
    ),
}


def read_layers(state: dict[str, Tensor], optimizer: Any) -> Layers:
    """Return the tensors of each layer, without prefixes, and the momentum of each parameter."""
    layers: Layers = {}
    parameters = []
    for key, value in state.items():
        *names, tensor = [part for part in key.split(".") if part != "module"]
        layers.setdefault(".".join(names), {})[tensor] = value
        if tensor in ("weight", "bias"):
            parameters.append((".".join(names), tensor))
    try:
        keys = [key for group in optimizer["param_groups"] for key in group["params"]]
        for (name, tensor), key in zip(parameters, keys, strict=True):
            value = optimizer["state"].get(key, {}).get("momentum_buffer")
            if type(value) is Tensor and value.shape == layers[name][tensor].shape:
                layers[name][f"{MOMENTUM}{tensor}"] = value
    except (TypeError, KeyError, AttributeError, ValueError):
        pass  # the state of another optimizer: no momenta
    return layers


def find_family(arch: str) -> str | None:
    """Return the key of `ORDERS` for a name of an architecture; None: unknown."""
    match = re.fullmatch(r"(preact|senet)|(vgg|resnet|densenet)\d*d?", arch)
    return match and (match[1] or match[2])


def translate(arch: str, layers: Layers, model: nn.Module) -> tuple[dict[str, Tensor], list[str]]:
    """Return the state_dict of the model, with momenta, and the names of folded layers.

    Raises:
        ValueError: a layer is unknown or has no equal in the model; the message names the layer.
    """
    flat = {
        f"{name}.{key}": value for name, found in layers.items() for key, value in found.items()
    }
    own_shapes = {key: value.shape for key, value in model.state_dict().items()}
    if own_shapes == {key: value.shape for key, value in flat.items() if MOMENTUM not in key}:
        return flat, []
    family = find_family(arch)
    if family is None:
        raise ValueError(
            f"arch {arch} cannot be converted: its layers have other names than ours, and the "
            f"order is known for {', '.join(ORDERS)} only"
        )
    layers, folded = _undo_differences(family, _sort_layers(family, layers))
    own = {name: layer for name, layer in model.named_modules() if hasattr(layer, "weight")}
    if len(layers) != len(own):
        raise ValueError(
            f"the network has {len(layers)} layers with weights, the network of the flags "
            f"{len(own)}: check --arch and --dataset"
        )
    translated: dict[str, Tensor] = {}
    for (name, found), (own_name, layer) in zip(layers.items(), own.items(), strict=True):
        if isinstance(layer, nn.Linear) and "weight" in found:
            if MATRICES & found.keys() and not isinstance(layer, Delinear):
                found, folded = _fold_whitening(found), [*folded, name]
            found = _make_linear(name, found)
        if found["weight"].shape != layer.weight.shape:
            raise ValueError(
                f"{name}.weight has shape {(*found['weight'].shape,)}, "
                f"{own_name}.weight of the flags {(*layer.weight.shape,)}: check --arch"
            )
        translated |= {f"{own_name}.{tensor}": value for tensor, value in found.items()}
    return translated, folded


def find_flags(arch: str, layers: Layers) -> dict[str, tuple[str, str]]:
    """Return the flags that build the published network, by their names in a run's settings."""
    weighted = [found for found in layers.values() if "weight" in found]
    deconv = any(MATRICES & found.keys() and found["weight"].dim() == 4 for found in weighted)
    flags = {"deconv": ("--deconv", str(deconv))}
    if deconv:
        flags |= PUBLISHED
    elif not any("running_var" in found for found in weighted):
        flags["batchnorm"] = ("--batchnorm", "False")
    family = find_family(arch)
    if family is None:
        return flags
    found = [*_sort_layers(family, layers).values()]
    if len(found) < 3:
        raise ValueError(f"too few layers for a published {family}: {len(found)}")
    stem, before, last = found[0], *found[-2:]
    stem_iter = STEM_ITER.get("large" if arch.endswith("d") else family)
    if deconv and stem_iter and stem["weight"].shape[1] == 3:
        flags |= {"stem_iter": ("--stem-iter", str(stem_iter)), "freeze": ("--freeze", "True")}
    block = len(last.get("running_mean", before.get("running_mean1", ())))
    final = block if block == last["weight"].shape[1] else 0  # our blocks have another layout
    if final:
        flags["eps"] = PUBLISHED["eps"]
    return {**flags, "num_groups_final": ("--num-groups-final", str(final))}


def _sort_layers(family: str, layers: Layers) -> Layers:
    """Return the layers in the order of our network."""
    first, others = (words.split() for words in ORDERS[family])

    def find_place(name: str) -> tuple[int, ...]:
        top, *parts = name.split(".")
        parts = [part.removeprefix("denselayer") for part in parts]
        try:
            places = [int(part) if part.isdigit() else others.index(part) for part in parts]
            return first.index(top), *places
        except ValueError:
            raise ValueError(f"{name} is not a layer of a published {family}") from None

    for name, found in layers.items():
        if not {"weight", "running_mean1"} & found.keys():
            raise ValueError(f"{name} has no weight")
    unused = {"bn1"} if family == "preact" else set()  # registered, but the forward skips it
    names = sorted((name for name in layers if name not in unused), key=find_place)
    return {name: layers[name] for name in names}


def _undo_differences(family: str, layers: Layers) -> tuple[Layers, list[str]]:
    """Merge layers that our network lacks, and sort channels; return the names of folded layers."""
    merged: Layers = {}
    folded, pending, previous = [], {}, ""
    for name, found in layers.items():
        if "running_mean1" in found:
            if name == "features.norm5":
                raise ValueError(f"{name} whitens before the last ReLU, our network after it")
            pending = found
            continue
        found = dict(found)
        if pending:  # feature c // n in block c mod n, as of a convolution of one pixel
            found["weight"] = found["weight"][..., None, None]
            found["running_mean"] = pending["running_mean1"].flatten()
            found["running_deconv"] = pending["running_deconv"]
            pending = {}
        if "running_var" in found and MATRICES & merged.get(previous, {}).keys():
            merged[previous] = _fold_batchnorm(merged[previous], found)
            folded.append(name)
            continue
        if "running_var" in found and family == "vgg" and "bias" in merged[previous]:
            bias = merged[previous].pop("bias")
            merged[previous].pop(f"{MOMENTUM}bias", None)
            found["running_mean"] = found["running_mean"] - bias
        merged[name], previous = found, name
    if "conv1" in layers and family == "densenet":
        _sort_channels(merged)
    return merged, folded


def _fold_batchnorm(found: dict[str, Tensor], norm: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a convolution with the BatchNorm behind it folded in, without its momenta."""
    scale = norm["weight"] * (norm["running_var"] + BATCHNORM_EPS).rsqrt()
    bias = found.get("bias", torch.zeros_like(scale)) - norm["running_mean"]
    kept = {key: value for key, value in found.items() if MOMENTUM not in key}
    weight = found["weight"] * scale[:, None, None, None]
    return {**kept, "weight": weight, "bias": bias * scale + norm["bias"]}


def _fold_whitening(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a linear layer, or a convolution of one pixel, with its whitening folded in."""
    weight, block = found["weight"], found["running_mean"].numel()
    options = {"block": block, "bias": "bias" in found}
    layer: nn.Module = (
        published.FastDeconv(weight.shape[1], weight.shape[0], 1, **options)
        if weight.dim() == 4
        else published.Delinear(weight.shape[1], weight.shape[0], **options)
    )
    layer.load_state_dict({key: value for key, value in found.items() if MOMENTUM not in key})
    return dict(fuse(layer.eval()).state_dict())


def _make_linear(name: str, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a convolution of one pixel as a linear layer; a linear layer stays as it is."""
    weight = found["weight"]
    if weight.dim() == 2:
        return found
    if MATRICES & found.keys() and found["running_mean"].numel() != weight.shape[1]:
        raise ValueError(
            f"{name} whitens {weight.shape[1]} channels in blocks of "
            f"{found['running_mean'].numel()}, in another order than ours: "
            "fold the whitening with --num-groups-final 0"
        )
    return {key: t.flatten(1) if t.dim() == 4 else t for key, t in found.items()}


def _sort_channels(layers: Layers) -> None:
    """Sort the input channels of a published DenseNet, whose layers put new channels first."""
    growth, added = layers["dense1.0.conv2"]["weight"].shape[0], 0
    for name, found in layers.items():
        if match := re.fullmatch(r"conv1|dense\d\.\d+\.(bn2|conv2)", name):
            added += match[1] == "conv2"
            continue  # the input is not a concatenation
        if MATRICES & found.keys():
            raise ValueError(
                f"{name} whitens channels in another order than ours: a published DenseNet for "
                "small images is converted with BatchNorm only"
            )
        for key, value in found.items():
            if value.dim() == 0 or (value.dim() == 1 and "running_var" not in found):
                continue  # a count, or the bias of outputs
            dim = min(value.dim() - 1, 1)
            chunks = [growth] * added + [value.shape[dim] - added * growth]
            order = torch.cat(torch.arange(value.shape[dim]).split(chunks)[::-1])
            found[key] = value.index_select(dim, order)
        if name.startswith("trans") and name.endswith("conv"):
            added = 0
