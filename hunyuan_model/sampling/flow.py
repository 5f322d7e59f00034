"""The flow-matching schedule of the sampler: sigma runs from 1 (noise) to 0 (data), the network predicts noise - data.

Rectified flow as in https://arxiv.org/abs/2403.03206; the shift is that paper's resolution-dependent one.
"""

from __future__ import annotations

import torch
from torch import Tensor

TIMESTEPS = 1000  # the network reads sigma * 1000
GUIDANCE_UNIT = 1000  # the network reads guidance scale * 1000


def shift_sigmas(sigmas: Tensor, shift: float) -> Tensor:
    """Move sigmas in [0, 1] towards noise: ``shift * s / (1 + (shift - 1) * s)``. Same shape; shift 1 is the identity."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def flow_sigmas(steps: int, shift: float) -> Tensor:
    """The ``steps + 1`` sigmas of a sampling run, float32 on the CPU, from 1 down to 0."""
    return shift_sigmas(torch.linspace(1, 0, steps + 1, dtype=torch.float32), shift)


def euler_step(latents: Tensor, velocity: Tensor, sigma: Tensor, next_sigma: Tensor) -> Tensor:
    """One Euler step in float32: ``latents + (next_sigma - sigma) * velocity``; any shape, float32 out."""
    return latents.float() + (next_sigma - sigma) * velocity.float()
