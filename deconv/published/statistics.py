"""Means and running statistics of the published layers."""

from __future__ import annotations

from math import gcd
from typing import Any

import torch
from torch import Tensor

from ..dialects import MATRIX_NAMES
from ..ops.blocks import Blocks
from ..ops.covariance import Statistics, move_centre
from ..whitening import Matrices, Whitening, require_positive

# Keywords that select the numerics of the code of 2020 in `FastDeconv` and `convert`.
PUBLISHED: dict[str, Any] = {"eps": 1e-5, "block": 64, "root": "newton", "rows_per_feature": 0}
NORM_TYPES = {"none": "none", "l1norm": "l1", "layernorm": "layer"}


class PublishedStatistics(Whitening):
    """Base class of layers with the statistics of the code of 2020.

    Statistics differ from those of `Whitening` in three points:
    - All blocks share one mean. The distance of a block's own mean from it counts as variance.
    - The layer averages D over batches, not the covariance.
    - Running averages begin at mean 0 and D = I. The first batch does not replace these values.

    Buffers: `running_mean` (F,) and `running_deconv` (F, F); with several groups, (groups * F,) and
    (groups, F, F). With `freeze`, the state_dict also contains `freeze_steps`.
    """

    matrix_name = "running_deconv"
    replaces_initial = False

    def make_statistics(self, mean_taps: int, **like: Any) -> dict[str, Tensor]:
        groups, features = self.blocks.groups, self.blocks.features
        identity = torch.eye(features, **like)
        matrix = identity if groups == 1 else identity.repeat(groups, 1, 1)
        return {"running_mean": torch.zeros(groups * features, **like), self.matrix_name: matrix}

    def init_whitening(self, *args: Any, **options: Any) -> None:
        super().init_whitening(*args, **options)
        # Published state_dicts lack this buffer. Only `recalibrate` needs it, and starts at 0.
        self.register_buffer("num_batches_tracked", self.num_batches_tracked, persistent=False)

    def running_covariances(self) -> Matrices:
        """Return the running averages of D, which this layer keeps, by axis: views (G, F, F)."""
        matrix = getattr(self, self.matrix_name)
        return {"joint": matrix.view(-1, *matrix.shape[-2:])}

    def running_patch_mean(self) -> Tensor | None:
        return None if self.running_mean is None else self.blocks.expand(self.running_mean)

    @torch.no_grad()
    def running_whitening(self) -> tuple[Tensor, Matrices]:
        mean = self.require_running_mean()
        return mean, {axis: matrix.clone() for axis, matrix in self.running_covariances().items()}

    def recentre(self, stats: Statistics, blocks: Blocks, axis: str) -> Statistics:
        """Return the statistics about the mean that all blocks share."""
        if blocks.count == 1:
            return stats
        return move_centre(stats, blocks.expand(blocks.pool(stats.mean)), axis, blocks)

    def batch_whitening(self, x: Tensor) -> tuple[Tensor, int | Tensor, Tensor, Matrices, Matrices]:
        """Return as `Whitening` does, with the shared mean and D in place of the covariance."""
        x, count, mean, _, whiten = super().batch_whitening(x)
        return x, count, mean, {"mean": self.blocks.pool(mean), **whiten}, whiten

    def _update_running(
        self, count: int | Tensor, mean: Tensor, covs: Matrices, bias: Tensor
    ) -> None:
        observed = dict(covs)
        super()._update_running(count, observed.pop("mean"), observed, bias)

    def read_statistics(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Read D under either published name; restart the cycle of `freeze` if it has no counter.

        Raises:
            ValueError: the statistics belong to a layer of `deconv`, or their shapes differ.
        """
        own = prefix + self.matrix_name
        for other in MATRIX_NAMES:
            if own not in state_dict and prefix + other in state_dict:
                state_dict[own] = state_dict.pop(prefix + other)
        if own in state_dict and self.freeze:
            state_dict.setdefault(f"{prefix}freeze_steps", torch.tensor(0))
        if f"{prefix}running_cov_joint" in state_dict:
            raise ValueError("the checkpoint has running_cov_joint: load it into a layer of deconv")
        for name in ("running_mean", self.matrix_name):
            value, buffer = state_dict.get(prefix + name), getattr(self, name)
            if value is not None and buffer is not None and value.shape != buffer.shape:
                raise ValueError(
                    f"{name} has shape {(*value.shape,)} in the checkpoint, {(*buffer.shape,)} "
                    "in the layer: match block and groups, or use FastDeconv2019 (num_groups)"
                )


def find_input_norm(norm_type: str) -> str:
    """Return the `input_norm` that equals a published `norm_type`."""
    if norm_type not in NORM_TYPES:
        raise ValueError(f"norm_type must be one of {[*NORM_TYPES]}, got {norm_type!r}")
    return NORM_TYPES[norm_type]


def published_block(channels: int, block: int) -> int:
    """Return the channels per block in the published code: all, or their gcd with `block`."""
    require_positive(block=block)
    return channels if block >= channels else gcd(channels, block)
