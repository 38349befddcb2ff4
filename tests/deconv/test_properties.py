"""Properties of layers with arguments drawn by hypothesis, which shrinks failing examples."""

import pytest
import torch
from torch import nn

from deconv import convert, fuse
from deconv.ops.inverse_sqrt import ROOTS
from deconv.surgery.plan import DECONVOLUTIONS

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as draw  # noqa: E402

few = settings(max_examples=40, deadline=None, derandomize=True)


NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


@draw.composite
def convolutions(pick, make=lambda kind: kind, **more):
    """Draw a float64 convolution, made by `make` of a class of torch, and images for it."""
    kind = pick(draw.sampled_from(list(DECONVOLUTIONS)))
    dims, transposed = int(kind.__name__[-2]), "Transpose" in kind.__name__

    def sides(low, high):
        return pick(draw.tuples(*[draw.integers(low, high)] * dims))

    groups, kernel, dilation = pick(draw.integers(1, 3)), sides(1, 4), sides(1, 2)
    least = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    stride = sides(1, 3)
    modes = ["zeros"] if transposed else ["zeros", "reflect", "replicate", "circular"]
    more["padding_mode"] = draw.sampled_from(modes)
    if transposed:
        padding = tuple(pick(draw.integers(0, (side - 1) // 2)) for side in least)
        more["output_padding"] = draw.just(tuple(s - 1 for s in stride))
    elif stride == (1,) * dims:
        padding = pick(draw.sampled_from(["valid", "same"]))
    else:
        padding = tuple(pick(draw.integers(0, side - 1)) for side in least)
    conv = make(kind)(
        groups * pick(draw.integers(1, 5)),
        groups * pick(draw.integers(1, 3)),
        kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=pick(draw.booleans()),
        dtype=torch.float64,
        **{name: pick(strategy) for name, strategy in more.items()},
    )
    size = [side + pick(draw.integers(0, 6 if dims < 3 else 2)) for side in least]
    torch.manual_seed(pick(draw.integers(0, 9)))
    shape = (pick(draw.integers(1, 4)), conv.in_channels, *size)
    x = torch.randn(shape, dtype=torch.float64)
    if dims > 1 and pick(draw.booleans()):
        last = torch.channels_last if dims == 2 else torch.channels_last_3d
        conv, x = (value.to(memory_format=last) for value in (conv, x))
    return conv, x


OPTIONS = dict(
    mode=draw.integers(1, 5),
    block=draw.integers(1, 6),
    n_iter=draw.integers(1, 8),
    eps=draw.floats(1e-3, 1),
    layout=draw.sampled_from(["interleaved", "contiguous"]),
    shared=draw.booleans(),
    sampling_stride=draw.integers(1, 4),
    root=draw.sampled_from(ROOTS),
)


@few
@given(convolutions(DECONVOLUTIONS.get, **OPTIONS))
def test_a_layer_has_the_shape_of_a_convolution_and_fuses_to_one(drawn):
    layer, x = drawn
    y = layer(x)
    y.square().mean().backward()
    assert y.shape == layer.plain.forward(layer, x).shape
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())
    assert layer.num_batches_tracked == 1
    plain = fuse(layer.eval())
    assert type(plain) is layer.plain
    torch.testing.assert_close(plain(x), layer(x), rtol=1e-10, atol=1e-10)


@few
@given(convolutions(), draw.booleans())
def test_a_pair_is_converted_with_what_it_knows(drawn, affine):
    conv, x = drawn
    norm = NORMS[x.dim() - 2](conv.out_channels, affine=affine, dtype=torch.float64)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    model = nn.Sequential(conv, norm).eval()
    new = convert(model, pretrained=True)
    assert [type(module) for module in new] == [DECONVOLUTIONS[type(conv)], nn.Identity]
    torch.testing.assert_close(new(x), model(x), rtol=1e-9, atol=1e-9)
    assert new.train()(x).shape == model(x).shape
