"""Take the initial weights of a run from an earlier run or a file, and calibrate them."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable

from torch import Tensor, nn

from util.checkpoint.weights import Weights, read_weights
from util.console import join_names, print_line
from util.data.loader import ImageLoader
from util.errors import CheckpointError, RunError
from util.training.hooks import ModelHooks, enter_batch
from util.training.session import RunContext

CALIBRATION_BATCHES = 10
# Weights of a deconvolution fit only the whitening that they were trained with.
OF_WHITENING = (
    *("method", "mode", "num_groups", "num_groups_final", "layout", "share_blocks"),
    *("root", "root_final", "deconv_iter", "stem_iter", "eps", "norm_type"),
)


def start_from(
    context: RunContext,
    model: nn.Module,
    loader: ImageLoader,
    hooks: ModelHooks,
    build: Callable[[Namespace], nn.Module],
) -> None:
    """Copy the weights that --init names into `model`, and list the layers that keep their own.

    Weights for inputs without whitening, such as those of BatchNorm, are calibrated.

    Args:
        context: of the run.
        model: built by the flags, on the CPU; changed in place.
        loader: of the training images.
        hooks: of the model; must have `take_weights` and `calibrate`.
        build: builds the network that other flags describe.

    Raises:
        RunError: the weights cannot be read, or would be wrong in this network.
    """
    flags = context.flags
    try:
        weights = read_weights(flags.init)
    except CheckpointError as error:
        raise RunError(f"--init {error}") from error
    _check_flags(flags, weights)
    build_batchnorm = (lambda: build(_choose_batchnorm(flags))) if flags.deconv else None
    try:
        transfer = hooks.take_weights(model, weights.state, build_batchnorm)
    except ValueError as error:
        raise RunError(f"--init {weights.file}: {error}") from error
    print_line(f"{transfer.taken} of {transfer.total} tensors taken from {weights.file}")
    for kind, layers in (("new", transfer.new), ("unused", transfer.unused)):
        if layers:
            print_line(f"{kind} layers: {join_names(layers)}")
    if transfer.needs_calibration:
        calibrate_weights(context, loader, model, hooks)


def calibrate_weights(
    context: RunContext, loader: ImageLoader, model: nn.Module, hooks: ModelHooks
) -> None:
    """Calibrate a model so that training starts at its evaluation outputs."""
    accelerator = context.build_accelerator()
    accelerator.to_device(model)
    loader.batch_sampler.set_epoch(1)

    def forward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
        images, _ = accelerator.batch_to_device(*batch)
        offset = context.world.batch_offset(len(images))
        with enter_batch(hooks.batch_context, *offset):
            model(images)

    count = hooks.calibrate(model, loader, CALIBRATION_BATCHES, forward=forward)
    print_line(f"pretrained weights calibrated on {count} training batches")


def _check_flags(flags: Namespace, weights: Weights) -> None:
    """Raise RunError if the whitening of this run does not suit the weights."""
    whitens = any("running_cov" in name or "running_deconv" in name for name in weights.state)
    has_batchnorm = any(name.endswith("running_var") for name in weights.state)
    if whitens and not has_batchnorm and not flags.deconv:
        raise RunError(f"--init {weights.file}: holds deconvolution layers; add --deconv True")
    if not whitens and flags.deconv and not flags.bias:
        reason = "whose calibration needs the bias of each deconvolution"
        raise RunError(f"--bias False contradicts --init {weights.file}, {reason}")
    if not whitens and flags.norm_type != "none":
        reason = "whose weights expect inputs that are not normalized"
        raise RunError(f"--norm-type {flags.norm_type} contradicts --init {weights.file}, {reason}")
    if not (weights.config.get("deconv") and flags.deconv):
        return
    words = []
    for name in OF_WHITENING:
        here = vars(flags).get(name)
        there = weights.config.get(name, here)
        if repr(there) != repr(here):
            flag = f"--{name.replace('_', '-')}"
            words.append(f"no {flag}" if there is None else f"{flag} {there}")
    if words:
        raise RunError(
            f"--init {weights.file}: fits only the whitening that it was trained with; "
            f"use {' '.join(words)}"
        )


def _choose_batchnorm(flags: Namespace) -> Namespace:
    """Return the flags of the same network with BatchNorm."""
    plain = {"deconv": False, "batchnorm": True, "bias": False, "num_groups_final": 0}
    if getattr(flags, "method", None) is not None:
        plain |= {"method": 1, "bias": True}
    return Namespace(**{**vars(flags), **plain})
