"""Layers of a network: the one place that chooses between BatchNorm and deconvolution."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

from torch import Tensor, distributed, nn

from deconv import (
    Delinear,
    FastDeconv,
    batch_share,
    calibrate,
    convert,
    fuse,
    group_statistics,
    whiteness,
)
from deconv.freezing import advance_phase, find_phase, hold_phase
from deconv.ops.inverse_sqrt import find_linear_root

Maker = Callable[..., nn.Module]
Options = Mapping[str, Any]  # keywords of FastDeconv


@dataclass(frozen=True)
class Method:
    """Layers of the fully connected networks, simple_v1 and mlp, for one `method`.

    Args:
        description: a few words for the help text.
        image: image(in_channels, image_size, out) -> a layer on whole images,
            (N, C, image_size, image_size) -> (N, out).
        hidden: hidden(in_features, out_features) -> a hidden linear layer.
        last: last(in_features, out_features) -> the last linear layer.
        norm: norm(features) -> the normalisation after a hidden layer, on (N, features).
    """

    description: str
    image: Maker
    hidden: Maker
    last: Maker
    norm: Maker


@dataclass(frozen=True)
class Layers:
    """Layer constructors that a network is built with.

    Args:
        conv: conv(in, out, kernel_size, stride=1, padding=0, dilation=1, groups=1, max_iter=None)
            -> module; `max_iter` limits the Newton-Schulz steps of a deconvolution.
        stem: the same without `max_iter`, for the first layer of a network.
        norm: norm(channels, **options) -> the normalisation next to a convolution; `nn.Identity`,
            which ignores its arguments, for none. The options are those of `nn.BatchNorm2d`.
        linear: linear(in, out, bias=True) -> the last fully connected layer.
        methods: variants of simple_v1 and mlp, by number.
        default_method: the number of the variant with the bundle's own kind of layers.
        adapt: adapt(model, pretrained=) -> a network of another library with this kind of layers,
            pretrained weights included; None if that is impossible.
    """

    conv: Maker
    stem: Maker
    norm: Maker
    linear: Maker
    methods: Mapping[int, Method]
    default_method: int
    adapt: Callable[..., nn.Module] | None

    def select_method(self, number: int | None) -> Method:
        """Return the method of a number, `default_method` for None.

        Raises:
            ValueError: there is no such method.
        """
        number = self.default_method if number is None else number
        if number not in self.methods:
            choices = ", ".join(f"{key} {entry.description}" for key, entry in self.methods.items())
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
    freeze: bool = False,
    freeze_iter: int = 100,
    root: str = "cholesky",
    root_final: str | None = None,
    rows_per_feature: float | None = None,
    **layer_options: Any,
) -> Layers:
    """Bind all options of layers into the bundle that `build_model` takes.

    Args:
        deconv: FastDeconv layers without normalisation, or else convolutions with BatchNorm.
        mode: of the FastDeconv layers, 1 to 5. The methods of simple_v1 and mlp set their own.
        block: channels that a FastDeconv whitens together. The methods set their own.
        block_final: features that the last fully connected layer whitens together, with BatchNorm
            as well; 0 for a plain `nn.Linear`. None: 512 with deconv, 0 without, and the choice of
            the method in mlp.
        eps: added to the diagonal of each covariance, in units of variance.
        n_iter: Newton-Schulz steps.
        bias: give a bias to convolutions, except to those that BatchNorm follows. Linear layers
            always have one.
        sampling_stride: of the sampled patches, in input pixels.
        batchnorm: False omits BatchNorm without deconv; deconvolution never has any.
        stem_iter: Newton-Schulz steps of the first layer; None: `n_iter`.
        freeze: the first layer alternates between batch and running statistics in training.
        freeze_iter: steps with batch statistics in a cycle of 10 * freeze_iter.
        root: algorithm of the inverse square root. The methods set their own.
        root_final: the same for linear layers; None: see `find_linear_root`.
        rows_per_feature: of the FastDeconv layers. The methods set their own.
        **layer_options: further keywords of FastDeconv; Delinear gets those that it knows.

    Raises:
        ValueError: `block_final` is negative.
        TypeError: FastDeconv has no such option.

    Example:
        >>> make_layers(deconv=False).conv(3, 8, 3)
        Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1), bias=False)
    """
    if block_final is not None and block_final < 0:
        raise ValueError(f"block_final must be 0 (none) or a number of features, got {block_final}")
    signature(FastDeconv).bind_partial(**layer_options)
    options = {"eps": eps, "n_iter": n_iter, "sampling_stride": sampling_stride, **layer_options}
    stem_own = {"n_iter": n_iter if stem_iter is None else stem_iter}
    stem_own |= {"freeze": freeze, "freeze_iter": freeze_iter}
    stem_options = {**options, **stem_own}
    final = (512 if deconv else 0) if block_final is None else block_final
    own_linear = {"root": find_linear_root(root, root_final)}
    linear = _bind_delinear(final, options, **own_linear) if final else nn.Linear
    norm = nn.BatchNorm1d if batchnorm and not deconv else nn.Identity
    last = None if block_final is None else linear
    methods = _make_methods(stem_options, options, own_linear, bias=bias, norm=norm, last=last)
    if not deconv:
        plain = partial(nn.Conv2d, bias=bias and not batchnorm)
        return Layers(
            conv=partial(_make_convolution, plain, {}),
            stem=plain,
            norm=nn.BatchNorm2d if batchnorm else nn.Identity,
            linear=linear,
            methods=methods,
            default_method=1,
            adapt=_keep if batchnorm and not final else None,
        )
    whitening = {"bias": bias, "mode": mode, "block": block, "root": root}
    whitening["rows_per_feature"] = rows_per_feature
    make = partial(FastDeconv, **whitening)
    heads = {"linear": bool(final), "block_linear": final or 1, "root_linear": own_linear["root"]}
    return Layers(
        conv=partial(_make_convolution, make, options),
        stem=partial(make, **stem_options),
        norm=nn.Identity,
        linear=linear,
        methods=methods,
        default_method=3,
        adapt=partial(_convert, stem_own, **heads, **whitening, **options),
    )


def _make_convolution(
    make: Maker, options: Options, *shape: int, max_iter: int | None = None, **geometry: Any
) -> nn.Module:
    """Make a convolution with at most `max_iter` Newton-Schulz steps, if it takes any."""
    if max_iter is not None and "n_iter" in options:
        options = {**options, "n_iter": min(options["n_iter"], max_iter)}
    return make(*shape, **options, **geometry)


def _keep(model: nn.Module, *, pretrained: bool) -> nn.Module:
    """Return a network of another library as it is, with its ordinary layers."""
    return model


def _convert(stem: Options, model: nn.Module, *, pretrained: bool, **options: Any) -> nn.Module:
    """Convert a network of another library; `stem` has the options of its first layer."""
    model = convert(model, pretrained=pretrained, **options)
    first = next((m for m in model.modules() if isinstance(m, FastDeconv)), None)
    if first is None:
        raise ValueError("no convolution of images can be replaced by a deconvolution")
    first.n_iter = stem["n_iter"]
    first.init_freeze(stem["freeze"], stem["freeze_iter"])
    return model


def _bind_delinear(block: int, options: Options, **kwargs: Any) -> Maker:
    """Bind Delinear to the options that it shares with FastDeconv."""
    known = signature(Delinear).parameters
    shared = {name: value for name, value in options.items() if name in known}
    return partial(Delinear, block=block, **shared, **kwargs)


def _make_methods(
    stem_options: Options,
    options: Options,
    own_linear: Options,
    *,
    bias: bool,
    norm: Maker,
    last: Maker | None,
) -> dict[int, Method]:
    """Make the table of methods.

    Args:
        stem_options: options of the layer on images.
        options: options of all other layers.
        own_linear: further options of linear layers that whiten.
        bias: give the layer on images a bias.
        norm: as in `Method`.
        last: the last linear layer of all methods; None: of the kind that the method has.
    """

    def make_deconv(in_channels: int, out: int, kernel_size: int, *, mode: int) -> nn.Module:
        # An image is one patch, so there are fewer rows than features: "newton" exploits that.
        own = {"mode": mode, "block": in_channels, "root": "newton"}
        return FastDeconv(in_channels, out, kernel_size, bias=bias, **own, **stem_options)

    def make_joint(in_features: int, out: int) -> nn.Module:
        return _bind_delinear(in_features, options, **own_linear)(in_features, out)

    plain = partial(_make_image_convolution, partial(nn.Conv2d, bias=bias))
    channel = partial(_make_image_convolution, partial(make_deconv, mode=3))
    joint = partial(_make_image_convolution, partial(make_deconv, mode=4))
    blocks = partial(_make_image_linear, _bind_delinear(32, stem_options, bias=bias, **own_linear))
    none, hidden = nn.Identity, _bind_delinear(32, options, **own_linear)
    return {
        1: Method("plain", plain, nn.Linear, last or nn.Linear, norm),
        2: Method("channel deconvolution", channel, nn.Linear, last or nn.Linear, none),
        3: Method("joint deconvolution", joint, make_joint, last or make_joint, none),
        4: Method("deconvolution in blocks of 32", blocks, hidden, last or hidden, none),
    }


def _make_image_convolution(conv: Maker, in_channels: int, image_size: int, out: int) -> nn.Module:
    """Make a linear layer on images as one convolution of the size of the image."""
    return nn.Sequential(conv(in_channels, out, image_size), nn.Flatten())


def _make_image_linear(linear: Maker, in_channels: int, image_size: int, out: int) -> nn.Module:
    """Make a linear layer on the in_channels * image_size**2 pixels of an image."""
    return nn.Sequential(nn.Flatten(), linear(in_channels * image_size**2, out))


def fold_batchnorm(model: nn.Module) -> nn.Module:
    """Return a copy whose convolutions have each BatchNorm folded in, for inputs as they are.

    The copy has deconvolutions without running statistics. Its weights are those of a model with
    deconvolution that `deconv.calibrate` has yet to see.
    """
    return convert(model, pretrained=True, linear=False, track_running_stats=False)


@contextmanager
def batch_context(first: int, total: int) -> Iterator[None]:
    """Share statistics between ranks, and update all running statistics at once."""
    several = distributed.is_available() and distributed.is_initialized()
    with batch_share(first, total) if several else nullcontext(), group_statistics():
        yield


def model_hooks() -> dict[str, Callable]:
    """Return what training must do for layers that whiten, by the attributes of `ModelHooks`."""
    return {
        "batch_context": batch_context,
        "eval_model": fuse,
        "phase": find_phase,
        "advance": advance_phase,
        "hold": hold_phase,
        "diagnose": _measure_whiteness,
        "calibrate": calibrate,
    }


def _measure_whiteness(model: nn.Module, images: Tensor) -> dict[str, float]:
    """Return the whiteness of each layer by tags such as whiteness/before/conv1."""
    scalars = whiteness(model, images).scalars()
    return {f"whiteness/{name}": value for name, value in scalars.items()}
