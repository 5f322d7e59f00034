"""What the transformer reads of a prompt."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class TextConditions(NamedTuple):
    """One prompt, in the order in which ``sampling.sample_latents`` takes it; on the CPU, in the encoders' dtype."""

    states: Tensor  # (1, 256, D)
    mask: Tensor  # (1, 256)
    pooled: Tensor  # (1, P)
