"""What BatchNorm layers of torch, torchvision and timm are made of, and what is left of them."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

# By name, as this package imports torch alone. The affine part of frozen ones is buffers.
_FROZEN = {"FrozenBatchNorm2d", "FrozenBatchNormAct2d"}
_WITH_ACTIVATION = {"BatchNormAct2d", "SyncBatchNormAct", "FrozenBatchNormAct2d"}
_UNDERSTOOD = {"_BatchNorm", "SyncBatchNorm"} | _FROZEN | _WITH_ACTIVATION


class ChannelAffine(nn.Module):
    """What a BatchNorm is in evaluation, y = x * weight + bias, where no convolution can take it.

    Args:
        weight, bias: (C,), become parameters that need gradients as `learned` says.
        dims: dimensions of a image, 1 to 3.

    Shape:
        (N, C, *size) -> the same.
    """

    dims = 2  # of layers that were pickled before there were others

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor, learned: bool = True, dims: int = 2
    ) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight, learned), nn.Parameter(bias, learned)
        self.dims = dims

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (-1, *(1,) * self.dims)
        return x * self.weight.reshape(shape) + self.bias.reshape(shape)

    def fuse(self) -> nn.Module:
        """The same as a layer of torch: a convolution of single pixels and channels."""
        channels, kind = len(self.weight), (nn.Conv1d, nn.Conv2d, nn.Conv3d)[self.dims - 1]
        plain = kind(channels, channels, 1, groups=channels, device="meta")
        weight = self.weight.detach().clone().reshape(-1, 1, *(1,) * self.dims)
        plain.weight = nn.Parameter(weight, self.weight.requires_grad)
        plain.bias = nn.Parameter(self.bias.detach().clone(), self.bias.requires_grad)
        return plain.train(self.training)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}"


def is_batchnorm(module: nn.Module) -> bool:
    """Whether this is a BatchNorm, with running statistics or frozen, of whatever library."""
    frozen = any(kind.__name__ in _FROZEN for kind in type(module).__mro__)
    return isinstance(module, _BatchNorm) or frozen


def count_dims(module: nn.Module, of_any: int = 2) -> int:
    """Dimensions of the images that a BatchNorm is made for; `of_any`: those of SyncBatchNorm."""
    if isinstance(module, nn.SyncBatchNorm):
        return of_any
    if isinstance(module, nn.BatchNorm1d):
        return 1
    return 3 if isinstance(module, nn.BatchNorm3d) else 2


def is_understood(module: nn.Module) -> bool:
    """Whether a BatchNorm does what its name says, and what `extra_modules` tells, and no more."""
    return _name_forward(module) in _UNDERSTOOD


def _name_forward(module: nn.Module) -> str:
    """The class whose forward it is that runs."""
    return next(kind.__name__ for kind in type(module).__mro__ if "forward" in vars(kind))


def extra_modules(module: nn.Module) -> list[nn.Module]:
    """What a BatchNorm does besides: dropout and activation of timm's BatchNormAct2d, in order."""
    if _name_forward(module) not in _WITH_ACTIVATION:
        return []
    parts = [getattr(module, name, None) for name in ("drop", "act")]
    return [
        part for part in parts if isinstance(part, nn.Module) and not isinstance(part, nn.Identity)
    ]


@torch.no_grad()
def find_affine(module: nn.Module) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Scale and shift (C,) of a BatchNorm in evaluation; None where it has no running statistics.

        scale = weight / sqrt(running_var + eps),    shift = bias - running_mean * scale

    They are float32 at least.
    """
    if module.running_var is None or module.running_mean is None:
        return None
    dtype = torch.promote_types(module.running_var.dtype, torch.float32)
    scale = (module.running_var.to(dtype) + module.eps).rsqrt()
    if module.weight is not None:
        scale = scale * module.weight.to(dtype)
    shift = -module.running_mean.to(dtype) * scale
    if module.bias is not None:
        shift = shift + module.bias.to(dtype)
    return scale, shift
