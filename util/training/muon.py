"""Optimize the weights of hidden layers by Muon, and all other parameters by AdamW."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, optim
from torch.optim import Optimizer


class Muon(Optimizer):
    """`torch.optim.Muon` on matrices, `torch.optim.AdamW` on the rest.

    Muon makes the singular values of a matrix's momentum about equal and steps in that direction
    (Jordan 2024, https://kellerjordan.github.io/posts/muon). Its steps have the size of AdamW's
    ("match_rms_adamw", Liu et al. 2025, https://arxiv.org/abs/2502.16982). Both halves therefore
    share one learning rate and one weight decay.

    `torch.optim.Muon` takes matrices only. The weight of a convolution (O, C, h, w) is stepped as
    the matrix (O, C * h * w), and so is its momentum.

    Muon has no fused kernel. `Accelerator.step` therefore waits for the GPU once a step, and skips
    a bad step on the host.

    Args:
        params: parameter groups. A group with "matrices": True is stepped by Muon.
        lr: learning rate of both halves.
        weight_decay: decoupled weight decay of both halves.
    """

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "matrices": False})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Step all parameters that have a gradient; `closure` is not supported."""
        if closure is not None:
            raise ValueError("closure is not supported")
        for group in self.param_groups:
            params = [parameter for parameter in group["params"] if parameter.grad is not None]
            if params:
                rates = {"lr": group["lr"], "weight_decay": group["weight_decay"]}
                (self._step_matrices if group["matrices"] else self._step_rest)(params, rates)

    def _step_matrices(self, params: list[Tensor], rates: dict[str, float]) -> None:
        matrices = [parameter.detach().flatten(1) for parameter in params]
        muon = optim.Muon(matrices, **rates, adjust_lr_fn="match_rms_adamw")
        for matrix, parameter in zip(matrices, params, strict=True):
            matrix.grad = parameter.grad.flatten(1)
            muon.state[matrix] = self.state[parameter]
        muon.step()
        for matrix, parameter in zip(matrices, params, strict=True):
            if matrix.data_ptr() != parameter.data_ptr():  # a copy, with channels_last
                parameter.copy_(matrix.view_as(parameter))

    def _step_rest(self, params: list[Tensor], rates: dict[str, float]) -> None:
        adamw = optim.AdamW(params, **rates)
        for parameter in params:
            adamw.state[parameter] = self.state[parameter]
        adamw.step()
