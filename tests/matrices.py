"""Covariances for the tests of the roots, and what one of these makes of their eigenvalues."""

import torch

from deconv.ops.resolvent import TERMS


def covariances(batch, side, eps=1e-4):
    rows = torch.randn(batch, 3 * side, side, dtype=torch.float64) * torch.logspace(0, -3, side)
    return rows.mT @ rows / (3 * side) + eps * torch.eye(side)


def follow(x, n_iter):
    """The sum of terms by which resolvents follow `deconv.ops.spectrum.respond`."""
    constant, slope, poles = TERMS[n_iter]
    return constant + slope * x + sum(share / (x + shift) for shift, share in poles)
