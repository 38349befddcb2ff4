"""What a layer costs on paper: the flops and bytes of its four steps and of its convolution.

Flops are those of products, two for a multiplication with its addition; what is done element by
element counts in bytes alone. A product reads both factors from memory and writes its result, and
every other pass reads what it is given and writes what it makes, in float32: the plain method,
which faster code may undercut. Backward is the gradient of input and parameters.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from deconv import Delinear, FastDeconv
from deconv.covariance import count_patches, keeps_patches
from deconv.patches import Spots, Window, select_pixels
from deconv.resolvent import TERMS
from scripts.profile_layer import CONVOLUTION, NAMES

BYTES = 4  # of a float32 number
PATCHES, STATISTICS, ROOT, FOLD = NAMES
# n^3 of the symmetric QR algorithm with eigenvectors: Golub and Van Loan, Matrix Computations, 8.3
EIGENVECTORS = 9


@dataclass(frozen=True)
class Cost:
    """Floating point operations, and bytes to and from memory."""

    flops: float = 0
    bytes: float = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: float) -> Cost:
        return Cost(self.flops * times, self.bytes * times)


Both = tuple[Cost, Cost]  # forward, backward


@dataclass(frozen=True)
class Sizes:
    """What the counts follow from.

    Args:
        inputs, outputs, weights: numbers in the input, the output and the weight.
        out_channels, groups: of the convolution.
        seen: numbers of the input that a patch touches, 0 where no patches are copied.
        maps: numbers in all patches together.
        pixels: that a product takes each of them from, 0 where they are copied.
        kept: whether the backward finds them, instead of gathering again.
        averaged: numbers of a picture times taps, where the mean is of more patches than that; 0
            where it is of them.
        matrices: whitening matrices of an axis, G.
        sides: the side of these matrices, for each axis of the mode.
        root: one of `deconv`'s, or "spectrum" for "newton" by eigenvalues.
        n_iter: Newton-Schulz steps.
    """

    inputs: int
    outputs: int
    weights: int
    out_channels: int
    groups: int
    seen: float
    maps: int
    pixels: int
    kept: bool
    averaged: int
    matrices: int
    sides: tuple[int, ...]
    root: str
    n_iter: int

    def vectors(self, side: int) -> int:
        """Vectors behind each covariance of an axis."""
        return self.maps // (side * self.matrices)

    def few(self, side: int) -> bool:
        """Whether the root is taken on the side of the vectors, and not of the covariance."""
        return self.root in ("newton", "spectrum") and 2 * self.vectors(side) < side


def measure_sizes(
    layer: FastDeconv | Delinear, shape: tuple[int, ...], device: torch.device
) -> Sizes:
    """Sizes of a layer that sees a batch of `shape` on a device."""
    x, weight = torch.empty(shape, device="meta"), layer.weight.to("meta")
    linear, selection = isinstance(layer, Delinear), ()
    looked = x.reshape(-1, x.shape[-1], 1) if linear else x
    sampling, blocks = layer._sampling(looked)
    maps = count_patches(looked, sampling) * blocks.groups * blocks.channels * blocks.taps
    if linear:
        seen, out, groups = 0, F.linear(x, weight), 1
    else:
        selection = select_pixels(x, sampling) if isinstance(sampling, Window) else ()
        seen, groups = min(maps, x.numel()), layer.groups
        out = F.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation, groups)
    by_values = layer.root == "newton" and device.type == "cpu"
    side = {"joint": blocks.features, "channel": blocks.size, "pixel": blocks.taps}
    return Sizes(
        inputs=x.numel(),
        outputs=out.numel(),
        weights=weight.numel(),
        out_channels=len(weight),
        groups=groups,
        seen=seen,
        maps=maps,
        pixels=len(selection[0]) if selection else 0,
        kept=keeps_patches(looked, sampling),
        averaged=x[0].numel() * sampling.taps if isinstance(sampling, Spots) else 0,
        matrices=blocks.matrices,
        sides=tuple(side[axis] for axis in layer.axes),
        root="spectrum" if by_values else layer.root,
        n_iter=layer.n_iter,
    )


def count(sizes: Sizes) -> dict[str, Both]:
    """Forward and backward of each step, by the names of `profile_layer`."""
    counts = {PATCHES: patches, STATISTICS: statistics, ROOT: root, FOLD: fold}
    return {step: of(sizes) for step, of in (counts | {CONVOLUTION: convolution}).items()}


def move(numbers: float) -> Cost:
    """Read or write so many numbers."""
    return Cost(0, BYTES * numbers)


def multiply(rows: float, inner: float, columns: float, times: float = 1) -> Cost:
    """`times` products of matrices (rows, inner) and (inner, columns)."""
    numbers = rows * inner + inner * columns + rows * columns
    return Cost(2 * rows * inner * columns, BYTES * numbers) * times


def patches(s: Sizes) -> Both:
    """What is looked at, by the backward again unless kept; its gradient joins the input's."""
    if not s.seen:
        return Cost(), Cost()
    product = Cost(2 * s.maps * s.pixels)
    once = move(s.seen + s.maps) + product
    back = move(s.maps + 2 * s.seen) + product
    again = back if s.kept else once + back
    return once * len(s.sides), again * len(s.sides)


def statistics(s: Sizes) -> Both:
    """Mean, centring, and one product for each covariance and its gradient."""
    forward, backward = move(3 * s.maps), move(2 * s.maps)
    if s.averaged:
        forward += move(s.inputs) + Cost(2 * s.averaged)
        backward += move(2 * s.inputs) + Cost(2 * s.averaged)
    for number, side in enumerate(s.sides):
        for done in s.sides[:number]:  # the second axis sees what the first has whitened
            forward += multiply(done, done, s.vectors(done), s.matrices)
            backward += multiply(done, done, s.vectors(done), 3 * s.matrices)
        forward += multiply(side, s.vectors(side), side, s.matrices)
        if not s.few(side):  # else the covariance is for the running average alone
            backward += multiply(side, side, s.vectors(side), s.matrices)
    return forward, backward


def root(s: Sizes) -> Both:
    """The inverse root of every matrix, see `deconv.inverse_sqrt`."""
    forward = backward = Cost()
    for side in s.sides:
        if s.few(side):
            one = _root_of_rows(s.vectors(side), side, s.root, s.n_iter)
        else:
            one = _root_of_matrix(side, s.root, s.n_iter)
        forward, backward = forward + one[0] * s.matrices, backward + one[1] * s.matrices
    return forward, backward


def _root_of_matrix(side: int, root: str, n_iter: int) -> Both:
    if root == "newton":
        return multiply(side, side, side, 3 * n_iter - 3), multiply(
            side, side, side, 6 * n_iter - 6
        )
    if root == "spectrum":
        values = Cost(EIGENVECTORS * side**3) + move(2 * side**2)
        return values + multiply(side, side, side), multiply(side, side, side, 4)
    factor, inverse = Cost(side**3 / 3) + move(2 * side**2), Cost(side**3) + move(3 * side**2)
    if root == "resolvent":
        poles, both = len(TERMS[n_iter].poles), factor + inverse + multiply(side, side, side)
        back = multiply(side, side, side, 2 * poles) + multiply(1, side * side, 1, 2)
        return both * poles, back
    return factor + inverse, multiply(side, side, side, 3)


def _root_of_rows(rows: int, side: int, root: str, n_iter: int) -> Both:
    gram, back = multiply(rows, side, rows), multiply(side, rows, side)
    turn = multiply(rows, rows, side)
    if root == "newton":
        forward = gram + multiply(rows, rows, rows, 6 * n_iter - 6) + turn + back
        return forward, forward * 2
    values = Cost(EIGENVECTORS * rows**3) + move(2 * rows**2)
    return gram + values + turn + back, multiply(rows, side, side) + gram + turn * 2


def fold(s: Sizes) -> Both:
    """W D for every axis, and W D mu."""
    shift = multiply(s.out_channels / s.groups, s.weights / s.out_channels, 1, s.groups)
    forward, backward = shift, shift * 2
    for side in s.sides:
        vectors = s.weights / (side * s.matrices)
        forward += multiply(side, side, vectors, s.matrices)
        backward += multiply(side, side, vectors, 2 * s.matrices)
    return forward, backward


def convolution(s: Sizes) -> Both:
    """The convolution or linear layer itself; its input has a gradient too."""
    product = Cost(2 * s.outputs * s.weights / s.out_channels)
    forward = product + move(s.inputs + s.weights + s.outputs)
    return forward, forward * 2


def batchnorm(s: Sizes) -> Both:
    """Statistics and normalisation read the map twice and write it; the gradient needs two maps."""
    return move(3 * s.outputs), move(5 * s.outputs)


def total(*counts: Both) -> Cost:
    return sum((cost for both in counts for cost in both), Cost())
