"""What holds for layers of any arguments: drawn by hypothesis, the smallest that fails is shown."""

import pytest
import torch
from torch import nn

from deconv import FastDeconv, convert, fuse

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as draw  # noqa: E402

few = settings(max_examples=40, deadline=None, derandomize=True)


@draw.composite
def convolutions(pick, kind=nn.Conv2d, **more):
    """A float64 convolution, and pictures that it takes."""

    def pair(low, high):
        return pick(draw.tuples(*[draw.integers(low, high)] * 2))

    groups, kernel, dilation = pick(draw.integers(1, 3)), pair(1, 4), pair(1, 2)
    stride = pair(1, 3)
    padding = pick(draw.sampled_from(["valid", "same"])) if stride == (1, 1) else pair(0, 3)
    conv = kind(
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
    least = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    sides = [side + pick(draw.integers(0, 6)) for side in least]
    torch.manual_seed(pick(draw.integers(0, 9)))
    shape = (pick(draw.integers(1, 4)), conv.in_channels, *sides)
    x = torch.randn(shape, dtype=torch.float64)
    if pick(draw.booleans()):
        conv, x = (value.to(memory_format=torch.channels_last) for value in (conv, x))
    return conv, x


OPTIONS = dict(
    mode=draw.integers(1, 5),
    block=draw.integers(1, 6),
    n_iter=draw.integers(1, 8),
    eps=draw.floats(1e-3, 1),
    layout=draw.sampled_from(["interleaved", "contiguous"]),
    shared=draw.booleans(),
    sampling_stride=draw.integers(1, 4),
    root=draw.sampled_from(["newton", "cholesky"]),
)


@few
@given(convolutions(FastDeconv, **OPTIONS))
def test_a_layer_has_the_shape_of_a_convolution_and_fuses_to_one(drawn):
    layer, x = drawn
    y = layer(x)
    y.square().mean().backward()
    assert y.shape == nn.Conv2d.forward(layer, x).shape
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())
    assert layer.num_batches_tracked == 1
    plain = fuse(layer.eval())
    assert type(plain) is nn.Conv2d
    torch.testing.assert_close(plain(x), layer(x), rtol=1e-10, atol=1e-10)


@few
@given(convolutions(), draw.booleans())
def test_a_pair_is_converted_with_what_it_knows(drawn, affine):
    conv, x = drawn
    norm = nn.BatchNorm2d(conv.out_channels, affine=affine, dtype=torch.float64)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    model = nn.Sequential(conv, norm).eval()
    new = convert(model, pretrained=True)
    assert [type(module) for module in new] == [FastDeconv, nn.Identity]
    torch.testing.assert_close(new(x), model(x), rtol=1e-9, atol=1e-9)
    assert new.train()(x).shape == model(x).shape
