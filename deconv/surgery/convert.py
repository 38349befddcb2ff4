"""Any network with convolutions and BatchNorm as a deconvolution network."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..whitening import Whitening, forward_hooks
from .batchnorm import ChannelAffine, extra_modules, find_affine
from .fuse import copy_around
from .plan import REPLACED, Row, plan

Memo = dict[int, Any]  # of copy.deepcopy: what is in it counts as copied already


@torch.inference_mode(False)  # what it makes may be trained later
def convert(
    model: nn.Module,
    *,
    mode: int = 5,
    block: int = 16,
    eps: float = 1e-2,
    n_iter: int = 5,
    bias: bool = True,
    linear: bool = False,
    block_linear: int = 512,
    pretrained: bool = False,
    skip: Iterable[str] = (),
    **options: object,
) -> nn.Module:
    """A copy of a network with deconvolution in place of convolutions and BatchNorm.

    Every convolution of torch becomes the FastDeconv that stands for it (1-d to 3-d, transposed
    ones too), with its weight and bias, every BatchNorm beside one an `Identity`, or what it does
    besides (the activation of timm's BatchNormAct2d). `plan` tells beforehand what
    becomes of each layer: those of other classes stay, and a BatchNorm stays with a convolution
    that does. What occurs twice in the network is replaced once, and stays one. All else is what
    `copy.deepcopy` makes of it; of what is replaced, forward hooks come along, others do not.

    Which convolution a BatchNorm follows is read from the code of the network, which is not run.
    BatchNorm before a convolution (BN, ReLU, convolution) goes as well, since that whitens. In such
    a network layers that work in place are told not to, as an Identity hands on its very input.

    With `pretrained` each BatchNorm is folded into the convolution before it,

        weight * s, (bias - running_mean) * s + shift,    s = scale / sqrt(running_var + eps)

    or becomes a ChannelAffine of s where there is none, so that outputs in evaluation are the same
    as before. NOTE: they are until the first step of training, which whitens what each layer sees:
    from there on the network learns from a good start but is another function.

    Args:
        model: any network; it is left as it is.
        mode, block, eps, n_iter: of every FastDeconv, the last two of Delinear as well.
        bias: convolutions without a bias get one, from 0, in a network that BatchNorm goes from:
            its shift took the bias's place.
        linear: the last `nn.Linear` becomes a Delinear.
        block_linear: of this Delinear.
        pretrained: keep what the network has learned.
        skip: layers to leave alone, by patterns of their names, such as "*.se.*" or "layer4.*".
        options: further keywords of FastDeconv; those that Delinear knows go there too.

    Returns:
        The copy. New layers have the device, dtype, memory format, `requires_grad` and training
        flag of those that they replace; a new bias follows its weight.

    Raises:
        ValueError: there is nothing to replace; a part of the model is wrapped
            (DistributedDataParallel, torch.compile); an option is out of range; a pattern of `skip`
            names no layer.
        TypeError: there is no such option.
    """
    options |= {"mode": mode, "block": block, "eps": eps, "n_iter": n_iter}
    choice = {"linear": linear, "block_linear": block_linear, "pretrained": pretrained}
    rows = plan(model, **choice, bias=bias, skip=skip, **options)
    if not any(row.action == REPLACED or isinstance(row.module, Whitening) for row in rows):
        raise ValueError(f"nothing in {type(model).__name__} can be replaced:\n{rows}")
    replaced = [row for row in rows if row.action == REPLACED]
    memo: Memo = {}
    for row in replaced:
        make = _fill if row.layer else replace_batchnorm
        memo[id(row.module)] = make(row, memo, pretrained)
    converted = copy_around(model, memo)
    for row in replaced:  # a hook that is a method of the model becomes one of its copy
        if any((hooks := forward_hooks(row.module)).values()):
            vars(memo[id(row.module)]).update(copy.deepcopy(hooks, memo))
    if not pretrained and any(not row.layer and not row.partner for row in replaced):
        _work_in_place_no_more(converted)
    return converted


def _fill(row: Row, memo: Memo, pretrained: bool) -> nn.Module:
    """The new layer, with weight and bias of the old one, and nothing seen yet."""
    new = row.layer
    weight, bias = _copy(row.module.weight, memo), _copy(row.module.bias, memo)
    if bias is None and (new.bias is not None or (pretrained and row.partner)):
        bias = nn.Parameter(weight.new_zeros(len(new.to_conv_layout(weight))), weight.requires_grad)
    if pretrained and row.partner:
        weight, bias = _fold_batchnorm(new, weight, bias, *find_affine(row.partner))
    new.weight, new.bias = weight, bias
    for name, buffer in new.named_buffers():
        here = {"dtype": buffer.dtype, "device": weight.device}
        setattr(new, name, torch.empty(buffer.shape, **here))
    new.reset_running_stats()
    new.training = row.module.training
    return new


def _copy(parameter: nn.Parameter | None, memo: Memo) -> nn.Parameter | None:
    """As `copy.deepcopy`, which knows no FakeTensor: what several layers share stays shared."""
    if parameter is None or id(parameter) in memo:
        return memo.get(id(parameter))
    new = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
    return memo.setdefault(id(parameter), new)


@torch.no_grad()
def _fold_batchnorm(
    layer: Whitening,
    weight: nn.Parameter,
    bias: nn.Parameter,
    scale: torch.Tensor,
    shift: torch.Tensor,
) -> tuple[nn.Parameter, nn.Parameter]:
    """Weight and bias (out,) of the layer with the affine map (out,) after them, as new ones."""
    rows = layer.to_conv_layout(weight.to(scale.dtype))
    scaled = layer.to_conv_layout(rows * scale.reshape(-1, *[1] * (weight.dim() - 1)))
    shifted = bias.to(scale.dtype) * scale + shift
    return tuple(
        nn.Parameter(torch.empty_like(old).copy_(new), old.requires_grad)  # its memory format
        for old, new in ((weight, scaled), (bias, shifted))
    )


def replace_batchnorm(row: Row, memo: Memo, pretrained: bool) -> nn.Module:
    """What is left of a BatchNorm."""
    norm = row.module
    parts = copy.deepcopy(extra_modules(norm), memo)
    if pretrained and not row.partner:
        scale, shift = find_affine(norm)
        like = norm.running_var if norm.weight is None else norm.weight
        affine = scale.to(like), shift.to(like), like.requires_grad
        parts.insert(0, ChannelAffine(*affine, row.dims))
    hooked = any(forward_hooks(norm).values())
    if not parts:
        new = nn.Identity()
    else:
        new = nn.Sequential(*parts) if hooked or len(parts) > 1 else parts[0]
    return new.train(norm.training)


def _work_in_place_no_more(model: nn.Module) -> None:
    """Layers overwrite their input no more: an Identity before one hands on what others look at."""
    for module in model.modules():
        if getattr(module, "inplace", False) is True:
            module.inplace = False
