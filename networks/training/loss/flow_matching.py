"""The loss of flow matching: how far the predicted velocity is from the one that leads from noise to the latents."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from hunyuan_model.sampling.flow import GUIDANCE_UNIT, TIMESTEPS
from hunyuan_model.vae.model import SCALING_FACTOR
from networks.training.loss.timestep_sampling import TimestepSampler, loss_weights, noisy_latents, timesteps_from_uniform
from utils.devices import to_device

VALIDATION_TIMESTEPS = 4  # for each item, at the middle of as many equally likely parts of the distribution


@dataclass(frozen=True)
class FlowSettings:
    """The distilled guidance as a user writes it: the transformer gets 1000 times as much."""

    guidance_scale: float = 1.0


@dataclass
class FlowMatching:
    """The losses of a transformer on batches of ``dataset.batches.batches.read_batch``.

    Attributes:
        noise: generator of the noise, on the accelerator's device.
        dtype: what the transformer computes in.
        network_off: inside it the transformer predicts as if no network were hooked into it.
    """

    transformer: nn.Module
    accelerator: Accelerator
    timesteps: TimestepSampler
    noise: torch.Generator
    dtype: torch.dtype
    guidance_scale: float
    network_off: Callable[[], AbstractContextManager[None]] = nullcontext

    def sample(self, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Random noise for latents of ``shape``, (B, C, F, H, W), and timesteps t (B,) in [0, 1]."""
        noise = torch.randn(shape, generator=self.noise, device=self.accelerator.device)
        return noise, self.timesteps.sample(len(noise))

    def loss_at(self, batch: Mapping[str, Any], noise: Tensor, t: Tensor) -> Tensor:
        """Weighted mean squared error between the predicted and the true velocity, noise - latents. The device is not waited for.

        Args:
            batch: with ``prior_preservation`` the target is what the transformer predicts without the network.
            noise: (B, 16, F, H, W), float32.
            t: (B,) in [0, 1].
        """
        device = self.accelerator.device
        latents, t = to_device(batch["latents"], device, torch.float32) * SCALING_FACTOR, to_device(t, device)
        noisy = noisy_latents(latents, noise, t)
        if batch.get("prior_preservation"):
            with torch.no_grad(), self.network_off():
                target = self._predict(batch, noisy, t).float()
        else:
            target = noise - latents
        velocity = self._predict(batch, noisy, t).float()

        losses = nn.functional.mse_loss(velocity, target, reduction="none").flatten(1).mean(1)  # (B,)
        return (losses * loss_weights(t, self.timesteps.settings.weighting_scheme)).mean()

    def empty_loss(self) -> Tensor:
        """Zero, and so are its gradients, from a pass over the smallest latents and caption."""
        config, device = self.transformer.config, self.accelerator.device
        batch = {
            "text_states": torch.zeros(1, 1, config.text_dim),
            "text_mask": torch.ones(1, 1),
            "text_states_2": torch.zeros(1, config.pooled_dim),
        }
        latents = torch.zeros(1, config.in_channels, *config.patch_size, device=device)
        return 0 * self._predict(batch, latents, torch.zeros(1, device=device)).float().mean()

    def _predict(self, batch: Mapping[str, Any], noisy: Tensor, t: Tensor) -> Tensor:
        device = self.accelerator.device
        guidance = torch.full((len(noisy),), self.guidance_scale * GUIDANCE_UNIT, device=device)
        with self.accelerator.autocast():
            return self.transformer(
                noisy.to(self.dtype),
                t * TIMESTEPS,
                to_device(batch["text_states"], device, self.dtype),
                batch["text_mask"],  # stays on the CPU: the transformer only needs lengths
                to_device(batch["text_states_2"], device, self.dtype),
                guidance if self.transformer.config.guidance else None,
            )

    @torch.no_grad()
    def validation_loss(self, items: Sequence[Mapping[str, Any]], together: bool = False) -> float:
        """The mean loss of batches of one item each, at the same noise and timesteps every time; moves no generator.

        Several processes share out the items, unless they make every pass ``together``.
        """
        quantiles = (torch.arange(VALIDATION_TIMESTEPS, dtype=torch.float64) + 0.5) / VALIDATION_TIMESTEPS
        timesteps = timesteps_from_uniform(quantiles, self.timesteps.settings)
        first, count = (0, 1) if together else (self.accelerator.process_index, self.accelerator.num_processes)
        losses = []
        for index in range(first, len(items), count):
            item = items[index]
            generator = torch.Generator().manual_seed(index)
            for t in timesteps.split(1):
                noise = torch.randn(item["latents"].shape, generator=generator)
                losses.append(self.loss_at(item, to_device(noise, self.accelerator.device), t))
        values = torch.stack(losses).tolist() if losses else []  # read at the end: the device is not waited for in between
        values = values if together else gather_object(values)
        return math.fsum(values) / len(values)  # which depends on no order
