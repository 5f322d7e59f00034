"""Muon: momentum whose matrices are made orthogonal before they are applied (K. Jordan et al., 2024; arXiv 2502.16982).

For the weights of linear and convolutional layers. torch has had one since 2.9, but for matrices only.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration: fast, and close enough to orthogonal
_ITERATIONS = 5


def orthogonalised(matrix: torch.Tensor) -> torch.Tensor:
    """The nearest (semi-)orthogonal matrix, roughly: singular values between 0.7 and 1.2. (rows, columns) float32."""
    a, b, c = _COEFFICIENTS
    x = matrix / (matrix.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, made orthogonal.

    Args:
        params: weights of at least two dimensions; all but the first are taken together as columns.
        lr: size of an update, times sqrt(rows / columns) for tall matrices.
        weight_decay: decoupled, as in AdamW.
    """

    def __init__(self, params: Iterable[torch.Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"].lerp_(parameter.grad, 1.0 - group["momentum"])
                update = parameter.grad.lerp(momentum, group["momentum"]).flatten(1)  # Nesterov
                size = max(1.0, update.shape[0] / update.shape[1]) ** 0.5
                parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
                parameter.add_(orthogonalised(update).view_as(parameter), alpha=-group["lr"] * size)
