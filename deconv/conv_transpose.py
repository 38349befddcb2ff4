"""Transposed convolutions in 1 to 3 dimensions that whiten the patches their kernel sees."""

from __future__ import annotations

from collections.abc import Callable
from math import gcd
from typing import Any

from torch import Tensor, fx, nn
from torch.nn import functional as F

from .conv import Convolution
from .ops.patches import PatchGrid
from .recording import record_call


class _Transposed(Convolution):
    """Transposed convolution that whitens the patches its kernel sees; see `FastDeconv`.

    A transposed convolution of stride s equals an ordinary one with a flipped kernel and stride 1.
    The ordinary convolution acts on the image with s - 1 zeros between its pixels. The layer
    whitens the patches of this wider image as `FastDeconv` does:

        y = W D (x - mu) + b = (W D) x + (b - W D mu)

    mu is the mean over all output pixels. W D mu is one number per channel, so the layer equals a
    plain transposed convolution, at the borders and at any stride. The pixels of one patch meet
    taps of a single phase (position modulo s). D is nearly one matrix per phase, and removes
    the correlation of neighbouring pixels. Different means of the phases count as variance.

    The wider image is never allocated.

    NOTE (differs from paper): the paper has no transposed convolutions. Whitening the channels of
    single pixels instead would leave a mean that no bias can represent: the number of taps that
    meet a pixel depends on phase and border.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias,
            dilation, padding_mode: as in `torch.nn.ConvTranspose2d`; only zero padding.
        options: the keywords of `FastDeconv`, for patches of the wider image. In n dimensions, one
            pixel of s^n is not zero: variances are smaller, and `eps` weighs more. Sampling takes
            the first number from `sampling_stride` on that has no common divisor with the stride,
            to reach all phases.

    Shape:
        As in `torch.nn.ConvTranspose2d`, with its `output_size`. The statistics cover the output
        size that `output_padding` gives.

    Raises:
        ValueError: an argument is out of range; the input has another number of channels.

    Example:
        up = FastDeconvTranspose2d(128, 64, 4, stride=2, padding=1)
        y = up(torch.randn(8, 128, 16, 16))  # (8, 64, 32, 32)
    """

    padding: Any  # tuple[int, ...]; torch declares it differently
    _output_padding: Callable[..., list[int]]  # of torch

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] = 0,
        output_padding: int | tuple[int, ...] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | tuple[int, ...] = 1,
        padding_mode: str = "zeros",
        **options: Any,
    ) -> None:
        geometry = (stride, padding, dilation, groups, bias, padding_mode)
        super().__init__(in_channels, out_channels, kernel_size, *geometry, **options)
        if isinstance(output_padding, int):
            output_padding = (output_padding,) * len(self.kernel_size)
        self.output_padding = tuple(output_padding)

    __init__.__qualname__ = "FastDeconvTranspose.__init__"  # shown in TypeErrors

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Whiten the patches of x and apply the kernel, by one transposed convolution."""
        if isinstance(input, fx.Proxy):
            return record_call(self, input, output_size)
        dims, sides = len(self.kernel_size), (self.stride, self.padding)
        extra = self._output_padding(
            input, output_size, *sides, self.kernel_size, dims, self.dilation
        )
        self.begin_forward(input)
        images, weight, bias = self.fold_whitening(self.prepare_input(input))
        y = self.convolve(images, weight, bias, *sides, extra, self.groups, self.dilation)
        return y if self._is_batch(input) else y.squeeze(0)

    def to_conv_layout(self, weight: Tensor) -> Tensor:
        """Convert (groups * C, out / groups, *kernel) to (out, C, *kernel), flipped, or back."""
        swapped = weight.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)
        return swapped.flip(tuple(range(2, weight.dim())))

    def patch_grid(self, step: int) -> PatchGrid:
        """Return the grid of patches on the input with zeros inserted, see the class."""
        sides = zip(self.kernel_size, self.dilation, self.padding, self.output_padding, strict=True)
        padding: tuple[int, ...] = ()
        for kernel, dilation, cut, extra in sides:
            before = dilation * (kernel - 1) - cut
            padding = (before, before + extra, *padding)
        stride = self._coprime_steps(step)
        return PatchGrid(self.kernel_size, stride, self.dilation, padding, self.stride)

    def _pixel_grid(self) -> PatchGrid:
        one = (1,) * len(self.stride)
        stride = self._coprime_steps(self.sampling_stride)
        return PatchGrid(one, stride, one, (0, 0) * len(one), self.stride)

    def _coprime_steps(self, step: int) -> tuple[int, ...]:
        """Return per dimension the first number from `step` on that reaches all phases."""
        return tuple(
            next(n for n in range(step, step + s + 1) if gcd(n, s) == 1) for s in self.stride
        )


class FastDeconvTranspose1d(_Transposed, nn.ConvTranspose1d):
    __doc__ = _Transposed.__doc__ or ""
    plain, convolve = nn.ConvTranspose1d, staticmethod(F.conv_transpose1d)


class FastDeconvTranspose2d(_Transposed, nn.ConvTranspose2d):
    __doc__ = _Transposed.__doc__ or ""
    plain, convolve = nn.ConvTranspose2d, staticmethod(F.conv_transpose2d)


class FastDeconvTranspose3d(_Transposed, nn.ConvTranspose3d):
    __doc__ = _Transposed.__doc__ or ""
    plain, convolve = nn.ConvTranspose3d, staticmethod(F.conv_transpose3d)
