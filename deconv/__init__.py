"""Network deconvolution: layers that whiten what their kernel sees."""

from .layers import Delinear, FastDeconv

__all__ = ["Delinear", "FastDeconv"]
