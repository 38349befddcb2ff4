"""Independent truth for the layers in float64: whiten every patch, then apply the raw weight."""

import torch
from torch import nn
from torch.nn import functional as F

from deconv.ops.patches import PatchSubset
from deconv.surgery.plan import DECONVOLUTIONS
from tests.matrices import follow

SIZES = {1: (11,), 2: (6, 7), 3: (5, 4, 5)}
CONVOLUTIONS = [nn.Conv1d, nn.Conv2d, nn.Conv3d]
TRANSPOSED = [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d]


def images(n=6, c=4, h=9, w=11):
    """Return correlated images with an offset, in 2 dimensions."""
    noise = torch.randn(n, c, h + 4, w + 4)
    mixed = torch.einsum("dc,nchw->ndhw", torch.randn(c, c), F.avg_pool2d(noise, 5, stride=1))
    return 3 * mixed + torch.arange(c).reshape(1, c, 1, 1)


def make_maps(dims, count=5):
    """Return correlated maps with an offset, in `dims` dimensions."""
    x = torch.randn(count, 4, *SIZES[dims])
    return x + 0.7 * x.roll(1, -1) + x.flip(1) + torch.arange(4.0).reshape(4, *(1,) * dims)


def make_exact(kind, *args, **options):
    exact = dict(eps=0.3, n_iter=15, root="newton", rows_per_feature=0)
    options = dict(block=4) | exact | options
    return DECONVOLUTIONS[kind](*args, **options)


def exact_root(layer, cov):
    """Return D of a covariance by the definition of the layer's root."""
    cov = cov + layer.eps * torch.eye(len(cov))
    if layer.root == "cholesky":
        floor = cov.norm() / 1.5 ** (2 * layer.n_iter)
        factor = torch.linalg.cholesky(cov + floor * torch.eye(len(cov)))
        return torch.linalg.inv(factor).contiguous()
    values, basis = torch.linalg.eigh(cov)
    if layer.root == "resolvent":
        response = follow(values / cov.norm(), layer.n_iter)
        return basis @ torch.diag(response / cov.norm().sqrt()) @ basis.T
    return basis @ torch.diag(values**-0.5) @ basis.T


def brute_force(layer, x):
    """Whiten every patch block by block with exact roots, then apply the raw weight."""

    def patches(image, kernel, dilation, stride):  # N L C*T
        return F.unfold(image, kernel, dilation=dilation, stride=stride).transpose(1, 2)

    kernel = layer.kernel_size, layer.dilation
    seen = patches(F.pad(x, layer._reversed_padding_repeated_twice), *kernel, layer.stride)
    sampling, _ = layer.choose_patches(x)
    if layer.mode == 3:  # single pixels of the raw image, repeated for every tap
        sample = patches(x, 1, 1, layer.sampling_stride).flatten(0, 1)
        sample = sample.repeat_interleave(kernel[0][0] * kernel[0][1], dim=1)
        mean = sample.mean(0)
    else:
        some = isinstance(sampling, PatchSubset)
        window = sampling.grid if some else sampling
        sample = patches(F.pad(x, window.padding), *kernel, window.stride)
        mean = sample.mean((0, 1))  # of all, however few the covariance is of
        if some:
            numbers = sampling.choose(len(x), x.shape[2:], x.device)
            sample = torch.stack([rows[n] for rows, n in zip(sample, numbers, strict=True)])
        sample = sample.flatten(0, 1)
    white = torch.zeros_like(seen)
    for blocks in columns_of(layer):  # one group
        parts = [sample[:, block] - sample[:, block].mean(0) for block in blocks]  # M B T
        for block, D in zip(blocks, exact_whitening(layer, parts), strict=True):
            off_centre = seen[..., block] - mean[block]
            white[..., block.flatten()] = off_centre.flatten(-2) @ D.T
    out = [
        part @ weight.T
        for part, weight in zip(
            white.chunk(layer.groups, dim=-1),
            layer.weight.flatten(1).chunk(layer.groups),
            strict=True,
        )
    ]
    out = torch.cat(out, dim=-1).transpose(1, 2).reshape(nn.Conv2d.forward(layer, x).shape)
    return out + (0 if layer.bias is None else layer.bias.reshape(1, -1, 1, 1))


def columns_of(layer):
    """Yield for every group a list of blocks: the (B, T) column numbers of the features."""
    taps = layer.weight[0, 0].numel()
    for columns in torch.arange(layer.in_channels * taps).chunk(layer.groups):
        count = len(columns) // taps // layer.block
        if layer.layout == "contiguous":
            blocks = columns.chunk(count)
        elif layer.mode in (4, 5):
            blocks = [columns[first::count] for first in range(count)]
        else:
            blocks = [columns.reshape(-1, taps)[first::count] for first in range(count)]
        yield [block.reshape(-1, taps) for block in blocks]


def exact_whitening(layer, parts):
    """Return D of every block of a group, from centred samples (M, B, T)."""

    def roots(equation):
        covs = [torch.einsum(equation, p, p) for p in parts]
        covs = [cov * len(cov) / parts[0].numel() for cov in covs]
        covs = [sum(covs) / len(covs)] * len(covs) if layer.shared else covs
        return [exact_root(layer, cov) for cov in covs]

    channels, taps = parts[0].shape[1:]
    if layer.mode in (4, 5):
        parts = [p.flatten(1) for p in parts]
        return roots("mf,mg->fg")
    by_channel = [torch.eye(channels)] * len(parts)
    if layer.mode in (1, 3):
        by_channel = roots("mct,mdt->cd")
        parts = [D @ p for D, p in zip(by_channel, parts, strict=True)]
    by_tap = roots("mct,mcu->tu") if layer.mode in (1, 2) else [torch.eye(taps)] * len(parts)
    return [torch.kron(c, t) for c, t in zip(by_channel, by_tap, strict=True)]


def spread_out(x, layer):
    """Insert the zeros of a transposed convolution between pixels and around them."""
    shape = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], layer.stride, strict=True)]
    wide = x.new_zeros(*x.shape[:2], *shape)
    wide[(..., *(slice(None, None, s) for s in layer.stride))] = x
    sides = []
    for k, d, p, more in zip(
        layer.kernel_size, layer.dilation, layer.padding, layer.output_padding, strict=True
    ):
        sides = [d * (k - 1) - p, d * (k - 1) - p + more, *sides]
    return F.pad(wide, sides)


def patches_of(layer, x):
    """Return all patches, (N, *positions, groups, C, T), and the weight (out, C, T)."""
    dims, weight, stride = len(layer.kernel_size), layer.weight, layer.stride
    if layer.transposed:
        x, stride = spread_out(x, layer), (1,) * dims
        parts = [part.transpose(0, 1) for part in weight.chunk(layer.groups)]
        weight = torch.cat(parts).flip(*range(2, dims + 2))
    else:
        mode = {"zeros": "constant"}.get(layer.padding_mode, layer.padding_mode)
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode)
    for d, (k, s, dilation) in enumerate(
        zip(layer.kernel_size, stride, layer.dilation, strict=True)
    ):
        x = x.unfold(2 + d, (k - 1) * dilation + 1, s)[..., ::dilation]
    x = x.flatten(2 + dims).movedim(1, -2)  # N *positions C T
    return x.unflatten(-2, (layer.groups, -1)), weight.flatten(2)


def brute_force_joint(layer, x, steps):
    """Whiten all channels of a group by an exact root over every `steps`-th patch, then weigh."""
    patches, weight = patches_of(layer, x)
    looked_at = patches[(slice(None), *(slice(None, None, step) for step in steps))]
    out = []
    for group, kernel in enumerate(weight.chunk(layer.groups)):
        rows = looked_at[..., group, :, :].flatten(-2).flatten(0, -2)
        mean, cov = rows.mean(0), torch.cov(rows.T, correction=0)
        values, basis = torch.linalg.eigh(cov + layer.eps * torch.eye(len(cov)))
        white = (patches[..., group, :, :].flatten(-2) - mean) @ basis @ torch.diag(values**-0.5)
        out.append(white @ basis.T @ kernel.flatten(1).T)
    out = torch.cat(out, -1) + (0 if layer.bias is None else layer.bias)
    return out.movedim(-1, 1)
