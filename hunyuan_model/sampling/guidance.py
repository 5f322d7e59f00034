"""Classifier-free guidance (https://arxiv.org/abs/2207.12598): away from what a negative prompt describes."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence

import torch
from torch import Tensor

Network = Callable[..., Tensor]


class GuidedTransformer:
    """Takes the place of a transformer while one video is sampled: ``negative + scale * (positive - negative)``.

    Args:
        positive: the transformer, or a ``StepCache`` of it.
        negative: what computes the negative prompt in a pass of its own; None for one batch of both, through ``positive``.
        text: states, mask and pooled states of the negative prompt, as ``sample_latents`` takes them.
        steps: those in which guidance applies, from 0. In the others the negative prompt is not computed.
    """

    def __init__(
        self, positive: Network, negative: Network | None, text: Sequence[Tensor], scale: float, steps: Container[int]
    ) -> None:
        self.config = positive.config
        self._positive, self._negative, self._text = positive, negative, tuple(text)
        self._scale, self._steps, self._step = scale, steps, 0

    def __call__(
        self,
        x: Tensor,
        t: Tensor,
        text_states: Tensor,
        text_mask: Tensor,
        text_states_2: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Velocity at x, (B, C, F, H, W); float32 where guidance applies. Arguments as of the transformer."""
        step, self._step = self._step, self._step + 1
        text = (text_states, text_mask, text_states_2)
        if step not in self._steps:
            return self._positive(x, t, *text, guidance)
        negative_text = self._text = tuple(
            given.to(like.device, like.dtype).expand_as(like) for given, like in zip(self._text, text, strict=True)
        )
        if self._negative is None:
            both = (torch.cat(pair) for pair in zip(text, negative_text))
            guidance = None if guidance is None else guidance.repeat(2)
            positive, negative = self._positive(x.repeat(2, 1, 1, 1, 1), t.repeat(2), *both, guidance).float().chunk(2)
        else:
            positive = self._positive(x, t, *text, guidance).float()
            negative = self._negative(x, t, *negative_text, guidance).float()
        return negative + self._scale * (positive - negative)
