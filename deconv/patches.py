"""Feature map -> the patches a convolution sees; and their gradient back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch.nn import functional as F


@dataclass(frozen=True)
class Window:
    """Which patches are looked at, per spatial dimension.

    Args:
        kernel_size: in pixels.
        stride: distance of two patches, in input pixels.
        dilation: distance of two taps, in input pixels.
        padding: pixels of zeros, as `torch.nn.functional.pad` takes them: before and after, for the
            last dimension first.
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]

    @property
    def span(self) -> tuple[int, ...]:
        """Pixels that a patch reaches over."""
        return tuple((k - 1) * d + 1 for k, d in zip(self.kernel_size, self.dilation, strict=True))

    def positions(self, size: Sequence[int]) -> tuple[int, ...]:
        """Patches along each dimension of a map of `size` without its padding."""
        both = [sum(self.padding[i : i + 2]) for i in range(0, len(self.padding), 2)][::-1]
        return tuple(
            (n + pad - span) // step + 1
            for n, pad, span, step in zip(size, both, self.span, self.stride, strict=True)
        )

    def slide(self, x: torch.Tensor) -> torch.Tensor:
        """All patches of a padded map: a view (N, C, *positions, *kernel_size)."""
        for dim, (span, step, d) in enumerate(
            zip(self.span, self.stride, self.dilation, strict=True), start=2
        ):
            x = x.unfold(dim, span, step)[..., ::d]
        return x


def sample_patches(
    x: torch.Tensor, window: Window, pictures: slice = slice(None)
) -> tuple[torch.Tensor, torch.Tensor]:
    """Collect the patches of some pictures of x, and hand x on.

    A stride above the kernel size visits only some pixels, which is what makes sampled statistics
    cheap.

    Args:
        x: (N, C, *size), any number of spatial dimensions.
        pictures: which of the N are looked at.

    Returns:
        x again, and maps (N', C * T, P) of the features of P patches in each picture that is looked
        at, T = prod(kernel_size), channel-major as in `weight.flatten(1)`. Give this x, and not the
        argument, to the convolution: the gradient of the maps is then added to that of the
        convolution where it lies, instead of filling a feature map of its own with it.

    Raises:
        RuntimeError: x is smaller than the kernel (from torch).
    """
    return _SamplePatches.apply(x, window, pictures)


class _SamplePatches(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: torch.Tensor, window: Window, pictures: slice
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.window, ctx.pictures = window, pictures
        return x, gather(x[pictures], window)

    @staticmethod
    def backward(
        ctx, grad: torch.Tensor, grad_maps: torch.Tensor
    ) -> tuple[torch.Tensor, None, None]:
        if torch.is_grad_enabled():  # a graph of this backward is wanted: it may need `grad` as is
            grad = grad.clone()
        seen = grad[ctx.pictures]
        seen += scatter(grad_maps, seen.shape, ctx.window)
        return grad, None, None


def gather(x: torch.Tensor, window: Window) -> torch.Tensor:
    """Maps (N, C * T, P) of all patches of x (N, C, *size), in one copy."""
    dims = len(window.kernel_size)
    x = F.pad(x, window.padding) if any(window.padding) else x
    x = window.slide(x)  # N C L... K...
    x = x.permute(0, 1, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims))
    return x.flatten(2 + dims).flatten(1, 1 + dims)


def scatter(maps: torch.Tensor, shape: Sequence[int], window: Window) -> torch.Tensor:
    """The adjoint of `gather`: every element of maps added to its pixel of pictures of `shape`."""
    dims = len(window.kernel_size)
    count, channels, *size = shape
    patches = maps.reshape(count, channels, *window.kernel_size, *window.positions(size))
    patches = patches.permute(0, 1, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims))
    before, after = window.padding[-2::-2], window.padding[::-2]
    sides = [b + n + a for b, n, a in zip(before, size, after, strict=True)]
    padded = maps.new_zeros(count, channels, *sides)
    views = window.slide(padded)  # N C L... K...
    if all(step >= span for step, span in zip(window.stride, window.span, strict=True)):
        views.copy_(patches)
    else:  # patches overlap, but those of one tap do not
        for tap in product(*map(range, window.kernel_size)):
            views[(..., *tap)] += patches[(..., *tap)]
    inside = [slice(b, b + n) for b, n in zip(before, size, strict=True)]
    return padded[(..., *inside)]
