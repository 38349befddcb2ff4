"""Covariances for the tests of roots, and the response of resolvents to eigenvalues."""

import torch

from deconv.ops.resolvent import TERMS


def covariances(batch, side, eps=1e-4):
    rows = torch.randn(batch, 3 * side, side, dtype=torch.float64) * torch.logspace(0, -3, side)
    return rows.mT @ rows / (3 * side) + eps * torch.eye(side)


def follow(x, n_iter):
    """Return the sum of terms that approximates `newton_schulz_response`."""
    constant, slope, poles = TERMS[n_iter]
    return constant + slope * x + sum(share / (x + shift) for shift, share in poles)
