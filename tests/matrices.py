"""Covariances for the tests of the roots."""

import torch


def covariances(batch, side, eps=1e-4):
    rows = torch.randn(batch, 3 * side, side, dtype=torch.float64) * torch.logspace(0, -3, side)
    return rows.mT @ rows / (3 * side) + eps * torch.eye(side)
