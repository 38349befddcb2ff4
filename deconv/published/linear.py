"""Linear layers of the published code of 2020 and of the follow-up."""

from __future__ import annotations

from typing import Any

from .. import linear as layers
from .statistics import PublishedStatistics, find_input_norm, published_block


class Delinear(PublishedStatistics, layers.Delinear):
    """Published linear layer of 2020; `DeLinear` is the same class.

    Args:
        in_features, out_features, bias: as in `torch.nn.Linear`. With bias=False, the layer still
            subtracts the mean.
        eps: added to the diagonal of the covariance (default 1e-5), in units of variance.
        n_iter: Newton-Schulz steps, 1 to 15 (default 5).
        momentum: weight of a batch in the running statistics (default 0.1).
        block: maximum number of neighbouring features whitened together (default 512). Fewer
            features form one block. More form blocks of the greatest common divisor of `block` and
            the features.
        options: further keywords of `deconv.Delinear`. As published, `sync_stats` is False by
            default: each rank has its own statistics.

    Shape:
        (..., in_features) -> (..., out_features).

    Raises:
        ValueError: an argument is out of range, or the input has another number of features.

    Example:
        head = Delinear(512, 10)
        logits = head(torch.randn(128, 512))  # (128, 10)

    Source: Ye et al., Network Deconvolution, ICLR 2020, section 3.1. `PublishedStatistics` lists
    the differences from `deconv.Delinear`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        eps: float = 1e-5,
        n_iter: int = 5,
        momentum: float = 0.1,
        block: int = 512,
        **options: Any,
    ) -> None:
        super().__init__(
            in_features,
            out_features,
            bias,
            eps=eps,
            n_iter=n_iter,
            momentum=momentum,
            block=published_block(in_features, block),
            root="newton",
            layout="contiguous",
            **{"sync_stats": False, **options},
        )


class NormalizedDelinear(Delinear):
    """Linear layer of the follow-up: `Delinear` with `norm_type` and `sync`.

    Args:
        in_features to block: as in `Delinear`.
        norm_type: normalisation of each row: "none" (default), "l1norm" or "layernorm". It is
            `input_norm` of `deconv.Delinear`, with `eps` added to the divisor.
        sync: share the batch statistics between ranks (default False), as `sync_stats` of
            `deconv.Delinear`.
        options: as in `Delinear`.

    Shape:
        (..., in_features) -> (..., out_features).

    Raises:
        ValueError: an argument is out of range, or the input has another number of features.

    Example:
        head = NormalizedDelinear(512, 10, norm_type="l1norm")
        logits = head(torch.randn(128, 512))  # (128, 10)

    Source: Ye et al., AAAI 2022.
    """

    matrix_name = "running_cov_isqrt"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        eps: float = 1e-5,
        n_iter: int = 5,
        momentum: float = 0.1,
        block: int = 512,
        norm_type: str = "none",
        sync: bool = False,
        **options: Any,
    ) -> None:
        options = {"input_norm": find_input_norm(norm_type), "sync_stats": sync, **options}
        whitening: Any = (eps, n_iter, momentum, block)
        super().__init__(in_features, out_features, bias, *whitening, **options)
        self.input_norm_eps = eps


DeLinear = Delinear
