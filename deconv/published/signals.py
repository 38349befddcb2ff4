"""Published layers for signals (N, C, L); `FastDeconv` is the 1-d convolution.

from deconv.published.signals import ChannelDeconv, Delinear, FastDeconv
"""

from .channel import ChannelDeconv
from .conv import FastDeconv1d as FastDeconv
from .linear import DeLinear, Delinear

__all__ = ["ChannelDeconv", "DeLinear", "Delinear", "FastDeconv"]
