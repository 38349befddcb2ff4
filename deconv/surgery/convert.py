"""Replace the convolutions and BatchNorms of any model by deconvolutions."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from ..whitening import Whitening, forward_hooks
from .batchnorm import ChannelAffine, extra_modules, find_affine
from .calibrate import calibrate as calibrate_layers
from .fuse import copy_around
from .plan import REPLACED, Row, plan

Memo = dict[int, Any]  # of copy.deepcopy: objects in it, by id, count as copied


@torch.inference_mode(False)  # the copy can be trained later
def convert(
    model: nn.Module,
    *,
    mode: int = 5,
    block: int = 16,
    eps: float = 1e-2,
    n_iter: int = 5,
    bias: bool = True,
    linear: bool | Iterable[str] = True,
    block_linear: int = 512,
    root_linear: str | None = None,
    pretrained: bool = False,
    calibrate: Iterable[Any] | None = None,
    forward: Callable[[nn.Module, Any], object] | None = None,
    skip: Iterable[str] = (),
    **options: Any,
) -> nn.Module:
    """Return a copy of a model with deconvolution in place of convolutions and BatchNorm.

    Each convolution of torch becomes the deconvolution of its kind, with the same weight and bias.
    Each BatchNorm becomes an Identity. The activation inside timm's BatchNormAct2d remains. `plan`
    lists the treatment of each layer and the reason.

    A BatchNorm after a convolution that is kept is kept as well. Without a convolution before it,
    as in a pre-activation block, a BatchNorm is kept before a convolution that is kept. A BatchNorm
    is also kept if `torch.fx` cannot trace the forward that calls it. The same applies if this
    forward reads the tensors of the BatchNorm by name, or checks the classes of layers. Layers that
    share a module or a weight still share it. Forward hooks of replaced layers move to their
    replacements.

    Without `pretrained`, activations become inplace=False unless each replaced BatchNorm is paired
    with a convolution before it. An Identity returns its input, which the model may use elsewhere.

    With `pretrained`, each BatchNorm is folded into the convolution before it,

        weight * scale, (bias - running_mean) * scale + shift

    or becomes a ChannelAffine if it cannot be folded, for example because the convolution may have
    another use. Outputs in evaluation stay the same.
    NOTE: without `calibrate`, outputs change in training mode, where each layer whitens its input.
    With `calibrate`, training starts at nearly the same outputs, see `deconv.calibrate`.

    Args:
        model: any model; it is not changed.
        mode: mode of each FastDeconv, 1 to 5 (default 5).
        block: maximum number of channels that a FastDeconv whitens together (default 16).
        eps: added to the diagonal of each covariance (default 1e-2), in units of variance.
        n_iter: Newton-Schulz steps of each layer, 1 to 15 (default 5).
        bias: if any BatchNorm is replaced, add a zero bias to convolutions without one (default
            True).
        linear: True (default) replaces each `nn.Linear` that ends the model, such as a classifier,
            by a Delinear, because its input is no longer normalised. A list of name patterns, such
            as ["fc"], replaces the linear layers that match. False replaces none.
        block_linear: maximum number of features that a Delinear whitens together (default 512).
        root_linear: root of a Delinear (default None: the `root` of `options`, or "resolvent" in
            place of "cholesky").
        pretrained: keep the outputs of the model in evaluation (default False).
        calibrate: training batches, of which the first 10 are used (default None); needs
            `pretrained`. It rewrites weights so that training starts at the evaluation outputs.
        forward: function of (model, batch) that runs the model on a batch of `calibrate` (default:
            call the model with the first tensor of the batch).
        skip: name patterns of layers to keep, such as "*.se.*" or "layer4.*" (default: none).
        options: further keywords of FastDeconv; Delinear gets those that it has.

    Returns:
        The copy. New layers keep the device, dtype, memory format, `requires_grad` and training
        flag of the layers that they replace. A new bias has the `requires_grad` of its weight.

    Raises:
        ValueError: nothing can be replaced; a lazy layer has no shape yet; a part of the model is
            wrapped (DistributedDataParallel, torch.compile) or sharded (fully_shard); an option is
            out of range; a pattern matches no layer; the model cannot be calibrated.
        TypeError: an option is unknown, or a batch of `calibrate` needs `forward`.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        >>> [type(module).__name__ for module in convert(model)]
        ['FastDeconv', 'Identity', 'ReLU']
    """
    if calibrate is not None and not pretrained:
        raise ValueError("calibrate keeps the outputs of a trained model: it needs pretrained=True")
    if forward is not None and calibrate is None:
        raise ValueError("forward runs the model on batches of calibrate: it needs calibrate")
    if pretrained and options.get("input_norm", "none") != "none":
        raise ValueError(
            f"input_norm={options['input_norm']!r} changes the outputs that pretrained=True keeps: "
            "omit one of them"
        )
    options |= {"mode": mode, "block": block, "eps": eps, "n_iter": n_iter}
    rows = plan(
        model,
        bias=bias,
        linear=linear,
        block_linear=block_linear,
        root_linear=root_linear,
        pretrained=pretrained,
        skip=skip,
        **options,
    )
    if not any(row.action == REPLACED or isinstance(row.module, Whitening) for row in rows):
        raise ValueError(f"nothing in {type(model).__name__} can be replaced:\n{rows}")
    replaced = [row for row in rows if row.action == REPLACED]
    memo: Memo = {}
    for row in replaced:
        make = replace_batchnorm if row.layer is None else _fill_layer
        memo[id(row.module)] = make(row, memo, pretrained)
    converted = copy_around(model, memo)
    for row in replaced:  # a hook that is a method of the model becomes a method of its copy
        if any((hooks := forward_hooks(row.module)).values()):
            memo[id(row.module)].__dict__.update(copy.deepcopy(hooks, memo))
    if not pretrained and any(row.layer is None and row.partner is None for row in replaced):
        _disable_inplace(converted)
    if calibrate is not None:
        calibrate_layers(converted, calibrate, forward=forward)
    return converted


def _fill_layer(row: Row, memo: Memo, pretrained: bool) -> nn.Module:
    """Give the planned layer the weight and bias of the old one, and fresh statistics."""
    old, new = row.module, row.layer
    weight, bias = _copy(old.weight, memo), _copy(old.bias, memo)
    affine = find_affine(row.partner) if pretrained and row.partner is not None else None
    if bias is None and (new.bias is not None or affine):
        bias = nn.Parameter(weight.new_zeros(len(new.to_conv_layout(weight))), weight.requires_grad)
    if affine:
        weight, bias = _fold_batchnorm(new, weight, bias, *affine)
    new.weight, new.bias = weight, bias
    for name, buffer in new.named_buffers():
        setattr(new, name, torch.empty(buffer.shape, dtype=buffer.dtype, device=weight.device))
    new.reset_running_stats()
    new.training = old.training
    return new


def _copy(parameter: nn.Parameter | None, memo: Memo) -> Any:
    """Copy a parameter once; `copy.deepcopy` cannot copy a FakeTensor."""
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
    """Return weight and bias of the layer followed by the affine map scale, shift (C_out,)."""
    rows = layer.to_conv_layout(weight.to(scale.dtype))
    scaled = layer.to_conv_layout(rows * scale.reshape(-1, *[1] * (weight.dim() - 1)))
    shifted = bias.to(scale.dtype) * scale + shift

    def like(old: nn.Parameter, new: torch.Tensor) -> nn.Parameter:  # keeps the memory format
        return nn.Parameter(torch.empty_like(old).copy_(new), old.requires_grad)

    return like(weight, scaled), like(bias, shifted)


def replace_batchnorm(row: Row, memo: Memo, pretrained: bool) -> nn.Module:
    """Return the replacement of a BatchNorm."""
    norm = row.module
    parts = copy.deepcopy(extra_modules(norm), memo)
    affine = find_affine(norm) if pretrained and row.partner is None else None
    if affine:
        scale, shift = affine
        like = norm.running_var if norm.weight is None else norm.weight
        parts.insert(0, ChannelAffine(scale.to(like), shift.to(like), like.requires_grad, row.dims))
    hooked = any(forward_hooks(norm).values())
    if not parts:
        new: nn.Module = nn.Identity()
    else:
        new = nn.Sequential(*parts) if hooked or len(parts) > 1 else parts[0]
    return new.train(norm.training)


def _disable_inplace(model: nn.Module) -> None:
    """Make activations allocate their output, since an Identity passes its own input on."""
    modules: Iterable[Any] = model.modules()
    for module in modules:
        if getattr(module, "inplace", False) is True:
            module.inplace = False
