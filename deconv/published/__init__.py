"""Layers of the published code, with its names, signatures and numerics.

    from deconv.published import ChannelDeconv, DeConv2d, DeLinear, Delinear, FastDeconv
    from deconv.published import NormalizedDeconv, NormalizedDelinear

Code that copied the published layers changes one import line. Outputs, gradients, running
statistics and state_dict equal those of the published layers, except as the classes state: for
example, `DeConv2d` has the state_dict of `deconv.FastDeconv`. Published checkpoints load. New
models should use the layers of `deconv`, which take less time at equal accuracy.

`PUBLISHED` contains the keywords that select the published numerics in `deconv.FastDeconv` and
`convert`.

Source: Ye et al., Network Deconvolution, ICLR 2020, and the follow-up, Ye et al., AAAI 2022. The
code of 2019, of 2020 and of the follow-up differ in signatures and running statistics.
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
