"""Transposed convolutions in 1 to 3 dimensions that whiten the patches their kernel sees."""

from __future__ import annotations

from math import gcd
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from .conv import Convolution
from .ops.patches import PatchGrid


class _Transposed(Convolution):
    """A transposed convolution that whitens the patches its kernel sees.

    A transposed convolution of stride s is the ordinary convolution, of stride 1 and with the
    kernel turned round, of the map that has s - 1 zeros between each two pixels. So what the kernel
    sees at each pixel of the output is a patch of that wider map, most of it zeros. These patches
    are whitened, as those of `FastDeconv` are:

        y = W D (x - mu) + b = (W D) x + (b - W D mu)

    mu is the mean over all pixels of the output, so W D mu is one number for each channel, and the
    layer is a plain transposed convolution exactly, at the borders and at any stride. Taps of
    different phases (pixels of the output modulo s) never meet a pixel at once, so D is nearly a
    matrix for each phase, which takes the correlation of neighbours out of x. That phases differ in
    their means is variance like any other, and D damps it.

    Pixels are found where they lie in x: nothing of the size of the wider map is made.

    NOTE (differs from paper): the paper has no transposed convolutions. Whitening the channels of
    single pixels of x alone would be another reading; its mean cannot be folded into a bias, as how
    many taps meet a pixel depends on the phase and on the borders.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias,
            dilation, padding_mode: as in `torch.nn.ConvTranspose2d`, padding with zeros only.
        options: all that `FastDeconv` takes by keyword. `mode` and what belongs to it speak of
            patches of the wider map: features are zero but for one pixel in s^n (n dimensions), and
            `eps` weighs so much more. Where `sampling_stride` has a divisor in common with the
            stride, the next larger number without one is taken, as some phases would never be seen.

    Shape:
        As `torch.nn.ConvTranspose2d`, `output_size` included; the statistics are those of the
        output that `output_padding` gives.

    Raises:
        ValueError: an argument is out of range.
    """

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
        where = (stride, padding, dilation, groups, bias, padding_mode)
        super().__init__(in_channels, out_channels, kernel_size, *where, **options)
        several = not isinstance(output_padding, int)
        dims = len(self.kernel_size)
        self.output_padding = tuple(output_padding) if several else (output_padding,) * dims

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Whiten the patches of x and apply the kernel, by one transposed convolution."""
        images, weight, bias = self.fold_whitening(self.prepare_input(x))
        dims, sides = len(self.kernel_size), (self.stride, self.padding)
        extra = self._output_padding(x, output_size, *sides, self.kernel_size, dims, self.dilation)
        y = self.convolve(images, weight, bias, *sides, extra, self.groups, self.dilation)
        return y if self._is_batch(x) else y.squeeze(0)

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
    __doc__ = _Transposed.__doc__
    plain, convolve = nn.ConvTranspose1d, staticmethod(F.conv_transpose1d)


class FastDeconvTranspose2d(_Transposed, nn.ConvTranspose2d):
    __doc__ = _Transposed.__doc__
    plain, convolve = nn.ConvTranspose2d, staticmethod(F.conv_transpose2d)


class FastDeconvTranspose3d(_Transposed, nn.ConvTranspose3d):
    __doc__ = _Transposed.__doc__
    plain, convolve = nn.ConvTranspose3d, staticmethod(F.conv_transpose3d)
