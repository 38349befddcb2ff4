"""Modules that apply `input_norm` in a fused model."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from .ops.normalize import EPS, normalize_samples
from .recording import record_call


class InputNorm(nn.Module):
    """Normalise each sample by its own statistics; see `normalize_samples`.

    Args:
        norm: "layer" or "l1".
        dims: number of dimensions of a sample, channels included: 3 for images, 1 for vectors.
        eps: added to the scale (default 1e-5), in units of the input.

    Shape:
        (*batch, *sample) -> (*batch, *sample).

    Example:
        y = InputNorm("layer", dims=3)(torch.randn(8, 3, 32, 32))  # mean 0 per image
    """

    def __init__(self, norm: str, dims: int, eps: float = EPS) -> None:
        super().__init__()
        self.norm, self.dims, self.eps = norm, dims, eps

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised input."""
        if isinstance(x, fx.Proxy):
            return record_call(self, x)
        return normalize_samples(x, self.norm, self.dims, self.eps)

    def extra_repr(self) -> str:
        return f"{self.norm!r}, dims={self.dims}, eps={self.eps}"


class NormalizedLayer(nn.Sequential):
    """`InputNorm` followed by a plain layer: the fused form of a layer with `input_norm`."""

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # named as in torch
        """Normalise the input and call the layer with it and the other arguments."""
        norm, layer = self
        return layer(norm(input), *args, **kwargs)
