"""BatchNorm layers of torch, torchvision and timm, and their affine map in evaluation."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

# Names of classes, since this package imports torch only. Frozen ones keep weight and bias as
# buffers.
_FROZEN = {"FrozenBatchNorm2d", "FrozenBatchNormAct2d"}
_WITH_ACTIVATION = {"BatchNormAct2d", "SyncBatchNormAct", "FrozenBatchNormAct2d"}
_KNOWN = {"_BatchNorm", "SyncBatchNorm"} | _FROZEN | _WITH_ACTIVATION


class ChannelAffine(nn.Module):
    """Affine map per channel, y = x * scale + shift.

    `convert` puts it in place of a pretrained BatchNorm that cannot be folded into a convolution.

    Args:
        scale: (C,), becomes a parameter.
        shift: (C,), becomes a parameter.
        requires_grad: of both parameters.
        dims: spatial dimensions of the input, 1 to 3; 0: any number, or none, as for vectors.

    Shape:
        (N, C, *size) -> (N, C, *size).
    """

    # NOTE: the names differ from BatchNorm's, so that code that reads the weight or bias of the
    # BatchNorm fails instead of using another value.
    def __init__(
        self, scale: torch.Tensor, shift: torch.Tensor, requires_grad: bool = True, dims: int = 2
    ) -> None:
        super().__init__()
        self.scale = nn.Parameter(scale, requires_grad)
        self.shift = nn.Parameter(shift, requires_grad)
        self.dims = dims

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # named as in BatchNorm
        if not self.dims:
            return (input.transpose(1, -1) * self.scale + self.shift).transpose(1, -1)
        shape = (-1, *(1,) * self.dims)
        return input * self.scale.reshape(shape) + self.shift.reshape(shape)

    def fuse(self) -> nn.Module:
        """Return the map as a depthwise convolution with 1 x 1 kernels; a copy if `dims` is 0."""
        if not self.dims:
            return copy.deepcopy(self)
        channels, kind = len(self.scale), (nn.Conv1d, nn.Conv2d, nn.Conv3d)[self.dims - 1]
        plain = kind(channels, channels, 1, groups=channels, device="meta")
        weight = self.scale.detach().clone().reshape(-1, 1, *(1,) * self.dims)
        plain.weight = nn.Parameter(weight, self.scale.requires_grad)
        plain.bias = nn.Parameter(self.shift.detach().clone(), self.shift.requires_grad)
        return plain.train(self.training)

    def extra_repr(self) -> str:
        return f"{len(self.scale)}"


def is_batchnorm(module: nn.Module) -> bool:
    """Return True if a module is a BatchNorm of any library, frozen ones included."""
    frozen = any(kind.__name__ in _FROZEN for kind in type(module).__mro__)
    return isinstance(module, _BatchNorm) or frozen


def count_dims(module: nn.Module, sync_dims: int = 2) -> int:
    """Return the spatial dimensions that a BatchNorm is for; `sync_dims` for SyncBatchNorm."""
    if isinstance(module, nn.SyncBatchNorm):
        return sync_dims
    if isinstance(module, nn.BatchNorm1d):
        return 1
    return 3 if isinstance(module, nn.BatchNorm3d) else 2


def is_known_batchnorm(module: nn.Module) -> bool:
    """Return True if a BatchNorm computes only its affine map and `extra_modules`."""
    return _find_forward_class(module) in _KNOWN and "forward" not in vars(module)


def extra_modules(module: nn.Module) -> list[nn.Module]:
    """Return the dropout and activation inside timm's BatchNormAct2d, in order of execution."""
    if _find_forward_class(module) not in _WITH_ACTIVATION:
        return []
    parts = [getattr(module, name, None) for name in ("drop", "act")]
    return [
        part for part in parts if isinstance(part, nn.Module) and not isinstance(part, nn.Identity)
    ]


def _find_forward_class(module: nn.Module) -> str:
    """Return the name of the class that defines the module's forward, or its `__call__`."""
    names = {"forward", "__call__"}
    return next(kind.__name__ for kind in type(module).__mro__ if names & vars(kind).keys())


@torch.no_grad()
def find_affine(norm: nn.Module) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return scale and shift of a BatchNorm in evaluation.

        scale = weight / sqrt(running_var + eps),    shift = bias - running_mean * scale

    Returns:
        (C,) each, at least float32; None for a BatchNorm without running statistics.
    """
    mean, var, weight, bias, eps = (
        getattr(norm, name) for name in ("running_mean", "running_var", "weight", "bias", "eps")
    )
    if var is None or mean is None:
        return None
    dtype = torch.promote_types(var.dtype, torch.float32)
    scale = (var.to(dtype) + eps).rsqrt()
    if weight is not None:
        scale = scale * weight.to(dtype)
    shift = -mean.to(dtype) * scale
    if bias is not None:
        shift = shift + bias.to(dtype)
    return scale, shift
