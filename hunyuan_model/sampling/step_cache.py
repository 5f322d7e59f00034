"""Step caching: steps of sampling whose velocity is not computed, but continued from the steps before.

When a step may be skipped is decided as in TeaCache (https://arxiv.org/abs/2411.19108): what the first block reads, its
modulated input, costs next to nothing to compute, and its relative changes from step to step are added up since the last
computed step. As long as the sum stays below a threshold, the output of the blocks hardly changes. TeaCache translates the
changes by a polynomial that is fitted to each model; here they are taken as they are, so that no table is needed.

In place of a skipped velocity stands the straight line through the last two computed ones, which at small thresholds is much closer
than the last one again (``benchmarks/step_cache.py`` compares them), and needs no memory for tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hunyuan_model.transformer.blocks import modulated_norm
from hunyuan_model.transformer.model import HYVideoDiffusionTransformer
from utils.errors import UserError

MIN_STEPS = 4  # the first two and the last are always computed
MAX_TOKENS = 4096  # that are compared: evenly spaced ones, as all tokens of a large video would fill gigabytes


def check_step_cache(threshold: float, steps: int) -> None:
    """Raise a UserError for a step cache that has nothing to skip."""
    if threshold and steps < MIN_STEPS:
        raise UserError(
            f"--step_cache has nothing to skip in so few steps ({steps}): the first two and the last are always computed. "
            f"Use at least {MIN_STEPS} steps, or leave it out."
        )


class StepCache:
    """Takes the place of a transformer while one video, or one batch of videos, is sampled.

    It calls the transformer, which stays as it is, at the steps that are not skipped. What it remembers is of one run: make one
    for each video, and one for each branch where guidance needs two velocities.

    Args:
        transformer: with whatever is put on it: swapped blocks, float8 weights, LoRA, compiled blocks.
        steps: how many there will be. The first two and the last are always computed.
        threshold: a step is skipped while the changes add up to less than this, for every sample of the batch. With 0 none is.
        agree: what is done of what was decided, where several processes compute together.

    Attributes:
        config: the transformer's, which sampling asks for.
        computed: the steps, from 0, at which the transformer was called.
    """

    def __init__(
        self,
        transformer: HYVideoDiffusionTransformer,
        steps: int,
        threshold: float,
        agree: Callable[[bool], bool] = bool,
    ) -> None:
        self.config = transformer.config
        self.computed: list[int] = []
        self._transformer, self._steps, self._threshold = transformer, steps, threshold
        self._step, self._agree = 0, agree
        self._first_modulation: tuple[Tensor, Tensor] | None = None
        self._last_input: Tensor | None = None
        self._change: Tensor | float = 0.0  # (B,)
        self._velocities: deque[tuple[Tensor, Tensor]] = deque(maxlen=2)  # with their timesteps

    def __call__(
        self,
        x: Tensor,
        t: Tensor,
        text_states: Tensor,
        text_mask: Tensor,
        text_states_2: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Velocity at x, as ``HYVideoDiffusionTransformer.forward`` has it; float32 where it is not computed."""
        step, self._step = self._step, self._step + 1
        modulated = self._modulated_input(x, t, text_states_2, guidance)
        if self._last_input is not None:
            difference = (modulated - self._last_input).abs().mean((1, 2))
            self._change = self._change + difference / self._last_input.abs().mean((1, 2))
        self._last_input = modulated
        if 1 < step < self._steps - 1 and self._agree(bool((self._change < self._threshold).all())):
            return self._continued(t)
        velocity = self._transformer(x, t, text_states, text_mask, text_states_2, guidance)
        self.computed.append(step)
        self._velocities.append((t, velocity))
        self._change = 0.0
        return velocity

    def _continued(self, t: Tensor) -> Tensor:
        """The velocity at ``t`` on the line through the last two computed ones, (B, C, F, H, W), float32."""
        (t_before, before), (t_last, last) = ((when, velocity.float()) for when, velocity in self._velocities)
        gap = t_last - t_before
        # Timesteps coincide where the schedule is shifted beyond what float32 tells apart; then there is no line.
        ahead = torch.where(gap == 0, torch.zeros_like(gap), (t - t_last) / gap)
        return last + (last - before) * ahead.view(-1, 1, 1, 1, 1)

    def _modulated_input(self, x: Tensor, t: Tensor, text_states_2: Tensor, guidance: Tensor | None) -> Tensor:
        """What the first block's attention reads of the image, at most ``MAX_TOKENS`` tokens of it: (B, L, hidden), float32."""
        if self._first_modulation is None:  # a copy of it, as the block itself may be in host memory between its turns
            linear, rows = self._transformer.double_blocks[0].img_mod.linear, 2 * self.config.hidden_size
            self._first_modulation = tuple(part.detach()[:rows].to(x.device, copy=True) for part in (linear.weight, linear.bias))
        img = self._transformer.img_in(x.to(self._transformer.dtype))
        img = img[:, :: -(-img.shape[1] // MAX_TOKENS)]
        vec = self._transformer.conditioning(t, text_states_2, guidance)
        shift, scale = F.linear(F.silu(vec), *self._first_modulation)[:, None].chunk(2, dim=-1)
        return modulated_norm(img, shift, scale).float()
