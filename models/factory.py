"""The one place that decides BatchNorm or deconvolution: a bundle of makers of layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from inspect import signature

from torch import nn

from deconv import Delinear, FastDeconv, convert

Maker = Callable[..., nn.Module]


@dataclass(frozen=True)
class Method:
    """How the fully connected networks, simple_v1 and mlp, are built for one `method`.

    Args:
        gloss: a few words for the help text.
        image: image(in_channels, image_size, out) -> a layer that looks at the whole image,
            (N, C, image_size, image_size) -> (N, out).
        hidden: hidden(in_features, out_features) -> a linear layer.
        last: last(in_features, out_features) -> the last linear layer.
        norm: norm(features) -> what follows a hidden layer, on (N, features).
    """

    gloss: str
    image: Maker
    hidden: Maker
    last: Maker
    norm: Maker


@dataclass(frozen=True)
class Layers:
    """Makers of the layers that a network is built from.

    Args:
        conv: conv(in, out, kernel_size, stride=1, padding=0, dilation=1, groups=1, max_iter=None)
            -> module; `max_iter` is the most Newton-Schulz steps that it takes, where it whitens.
        stem: the same, for the first layer of a network.
        norm: norm(channels) -> the normalisation beside a convolution; `nn.Identity` for none.
        linear: linear(in, out) -> the last fully connected layer.
        methods: the variants of simple_v1 and mlp, by number.
        default_method: the one of them that is of the bundle's own kind.
        adapt: adapt(network, pretrained=) -> a network from elsewhere with layers of this kind, and
            with what it has learned; None where that is impossible.
    """

    conv: Maker
    stem: Maker
    norm: Maker
    linear: Maker
    methods: Mapping[int, Method]
    default_method: int
    adapt: Callable[..., nn.Module] | None

    def choose_method(self, number: int | None) -> Method:
        """The method of that number, `default_method` for None.

        Raises:
            ValueError: there is no such method.
        """
        number = self.default_method if number is None else number
        if number not in self.methods:
            choices = ", ".join(f"{key} {method.gloss}" for key, method in self.methods.items())
            raise ValueError(f"method must be one of {choices}; got {number!r}")
        return self.methods[number]


def make_layers(
    *,
    deconv: bool,
    mode: int = 5,
    block: int = 16,
    block_final: int | None = None,
    eps: float = 1e-2,
    n_iter: int = 5,
    bias: bool = True,
    sampling_stride: int = 3,
    batchnorm: bool = True,
    stem_iter: int | None = None,
    root: str = "cholesky",
    rows_per_feature: float = 24,
    **layer_options: object,
) -> Layers:
    """Bind every choice about layers once, into the bundle that `build_model` takes.

    Args:
        deconv: FastDeconv layers and no normalisation, else convolutions with BatchNorm.
        mode, block, eps, n_iter, sampling_stride: of the FastDeconv layers. The methods of
            simple_v1 and mlp bring their own mode and block.
        block_final: features whitened together before the last fully connected layer, 0 for a plain
            `nn.Linear`; with BatchNorm as well. None: 512 with deconv, 0 without, and what the
            method says in mlp.
        bias: convolutions have a bias, except those that BatchNorm would relieve of it. Linear
            layers always have one.
        batchnorm: False leaves the normalisation out where deconv is False; deconvolution
            never has any.
        stem_iter: Newton-Schulz steps of the first layer; None: `n_iter`.
        root, rows_per_feature: of the FastDeconv layers, but for those of the methods.
        layer_options: further keywords of FastDeconv; those that Delinear knows go there too.

    Raises:
        ValueError: `block_final` is negative.
        TypeError: FastDeconv has no such option.
    """
    if block_final is not None and block_final < 0:
        raise ValueError(f"block_final must be 0 (none) or a number of features, got {block_final}")
    signature(FastDeconv).bind_partial(**layer_options)
    options = {"eps": eps, "n_iter": n_iter, "sampling_stride": sampling_stride, **layer_options}
    first = {**options, "n_iter": n_iter if stem_iter is None else stem_iter}
    final = (512 if deconv else 0) if block_final is None else block_final
    linear = _delinear(final, options) if final else nn.Linear
    methods = _make_methods(
        first,
        options,
        bias=bias,
        norm=nn.BatchNorm1d if batchnorm and not deconv else nn.Identity,
        last=None if block_final is None else linear,
    )
    if deconv:
        make = partial(
            FastDeconv,
            bias=bias,
            mode=mode,
            block=block,
            root=root,
            rows_per_feature=rows_per_feature,
        )
        conv, stem = partial(_convolve, make, options), partial(make, **first)
        head = {"linear": bool(final), "block_linear": final or 1}
        adapt = partial(_adapt, stem_iter=first["n_iter"], **head, **make.keywords, **options)
        return Layers(conv, stem, nn.Identity, linear, methods, default_method=3, adapt=adapt)
    stem = partial(nn.Conv2d, bias=bias and not batchnorm)
    norm = nn.BatchNorm2d if batchnorm else nn.Identity
    adapt = _leave if batchnorm and not final else None
    conv = partial(_convolve, stem, {})
    return Layers(conv, stem, norm, linear, methods, default_method=1, adapt=adapt)


def _convolve(
    make: Maker,
    options: Mapping[str, object],
    *shape: int,
    max_iter: int | None = None,
    **where: object,
) -> nn.Module:
    """`make` with all these, and of Newton-Schulz steps, where it takes any, `max_iter` at most."""
    if max_iter is not None and "n_iter" in options:
        options = {**options, "n_iter": min(options["n_iter"], max_iter)}
    return make(*shape, **options, **where)


def _leave(network: nn.Module, *, pretrained: bool) -> nn.Module:
    """A network from elsewhere has ordinary layers already."""
    return network


def _adapt(network: nn.Module, *, pretrained: bool, stem_iter: int, **options: object) -> nn.Module:
    """Convert a network from elsewhere to deconvolution; its first layer has its own n_iter."""
    network = convert(network, pretrained=pretrained, **options)
    next(m for m in network.modules() if isinstance(m, FastDeconv)).n_iter = stem_iter
    return network


def _delinear(block: int, options: Mapping[str, object], **more: object) -> Maker:
    """Delinear with the options that it shares with FastDeconv."""
    known = signature(Delinear).parameters
    shared = {name: value for name, value in options.items() if name in known}
    return partial(Delinear, block=block, **shared, **more)


def _make_methods(
    first: Mapping[str, object],
    options: Mapping[str, object],
    *,
    bias: bool,
    norm: Maker,
    last: Maker | None,
) -> dict[int, Method]:
    """The table of methods; `last` replaces the last linear layer of all of them unless None."""

    def deconvolve(in_channels: int, out: int, kernel_size: int, *, mode: int) -> nn.Module:
        # A image is a patch: fewer rows than features, which the symmetric root makes use of.
        own = {"mode": mode, "block": in_channels, "root": "newton"}
        return FastDeconv(in_channels, out, kernel_size, bias=bias, **own, **first)

    def joint(in_features: int, out: int) -> nn.Module:
        return _delinear(in_features, options)(in_features, out)

    plain, channel = partial(nn.Conv2d, bias=bias), partial(deconvolve, mode=3)
    whole, rows = partial(deconvolve, mode=4), _delinear(32, first, bias=bias)
    blocks = _delinear(32, options)
    table = {
        1: ("plain", partial(_convolve_image, plain), nn.Linear, norm),
        2: ("channel deconvolution", partial(_convolve_image, channel), nn.Linear, nn.Identity),
        3: ("joint deconvolution", partial(_convolve_image, whole), joint, nn.Identity),
        4: ("deconvolution in blocks of 32", partial(_flatten_image, rows), blocks, nn.Identity),
    }
    return {
        number: Method(gloss, image, hidden, last or hidden, norm)
        for number, (gloss, image, hidden, norm) in table.items()
    }


def _convolve_image(conv: Maker, in_channels: int, image_size: int, out: int) -> nn.Module:
    """A linear layer on images, as one convolution the size of the image."""
    return nn.Sequential(conv(in_channels, out, image_size), nn.Flatten())


def _flatten_image(linear: Maker, in_channels: int, image_size: int, out: int) -> nn.Module:
    """A linear layer on images, as a row of in_channels * image_size**2 features."""
    return nn.Sequential(nn.Flatten(), linear(in_channels * image_size**2, out))
