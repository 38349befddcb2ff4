"""The published layers by their names and signatures, built on the layers of this package.

    from deconv.published import ChannelDeconv, DeConv2d, DeLinear, Delinear, FastDeconv
    from deconv.published import NormalizedDeconv, NormalizedDelinear
    from deconv.published.signals import FastDeconv    # for signals (N, C, L)

Code that copied the published layers changes one import line. Values, gradients, running statistics
and state_dict equal those of the published layers, so that checkpoints load in both directions. The
modules of the package `deconv` are the better layers where nothing published must be matched.

`PUBLISHED` holds the keywords with which `deconv.FastDeconv` and `convert` use these numerics.

Source: Ye et al., Network Deconvolution, ICLR 2020. The code of 2019 and 2020, and of the follow-up
(Ye et al., AAAI 2022), differ in signatures and in running statistics.
"""

from ..dialects import covariance_behind
from .channel import ChannelDeconv
from .conv import DeConv2d, FastDeconv, FastDeconv1d, FastDeconv2019, NormalizedDeconv
from .linear import DeLinear, Delinear, NormalizedDelinear
from .statistics import PUBLISHED

__all__ = [
    "PUBLISHED",
    "ChannelDeconv",
    "DeConv2d",
    "DeLinear",
    "Delinear",
    "FastDeconv",
    "FastDeconv1d",
    "FastDeconv2019",
    "NormalizedDeconv",
    "NormalizedDelinear",
    "covariance_behind",
]
