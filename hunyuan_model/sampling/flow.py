"""Sampling as functions: noise in, schedule in, latents out. Generation and the samples during training call these.

Sigma runs from 1 (noise) to 0 (data), and the network predicts noise - data: rectified flow as in
https://arxiv.org/abs/2403.03206; the shift is that paper's resolution-dependent one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hunyuan_model.vae.model import SPATIAL_COMPRESSION, TIME_COMPRESSION
from utils.errors import UserError

TIMESTEPS = 1000  # the network reads sigma * 1000
GUIDANCE_UNIT = 1000  # the network reads guidance scale * 1000
LATENT_CHANNELS = 16
PATCH_PIXELS = 16  # one token covers 2 x 2 latent positions of 8 x 8 pixels
MAX_TOKENS = 4_000_000  # over thirty times what the model was trained with; only slips of the finger ask for more


def shift_sigmas(sigmas: Tensor, shift: float) -> Tensor:
    """Move sigmas in [0, 1] towards noise: ``shift * s / (1 + (shift - 1) * s)``. Same shape; shift 1 is the identity."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def flow_sigmas(steps: int, shift: float) -> Tensor:
    """The ``steps + 1`` sigmas of a sampling run, float32 on the CPU, from 1 down to 0."""
    return shift_sigmas(torch.linspace(1, 0, steps + 1, dtype=torch.float32), shift)


def euler_step(latents: Tensor, velocity: Tensor, sigma: Tensor, next_sigma: Tensor) -> Tensor:
    """One Euler step in float32: ``latents + (next_sigma - sigma) * velocity``; any shape, float32 out."""
    return latents.float() + (next_sigma - sigma) * velocity.float()


def latent_size(height: int, width: int, frames: int) -> tuple[int, int, int]:
    """(frames, height, width) of the latent for a video of ``frames`` x ``height`` x ``width`` pixels.

    Raises:
        UserError: a side is not divisible by 16, the number of frames is not 4n + 1, or the video is larger than any memory.
    """
    if height <= 0 or width <= 0 or height % PATCH_PIXELS or width % PATCH_PIXELS:
        good = [max(PATCH_PIXELS, round(side / PATCH_PIXELS) * PATCH_PIXELS) for side in (height, width)]
        raise UserError(
            f"the video size {height} x {width} (height x width) is not divisible by {PATCH_PIXELS}; "
            f"use {good[0]} x {good[1]}, for example."
        )
    if frames <= 0 or (frames - 1) % TIME_COMPRESSION:
        good_frames = max(0, round((frames - 1) / TIME_COMPRESSION)) * TIME_COMPRESSION + 1
        raise UserError(f"the video length {frames} is not 4n + 1 (1, 5, 9, ... 129); use {good_frames}, for example.")
    latent_frames = (frames - 1) // TIME_COMPRESSION + 1
    tokens = latent_frames * (height // PATCH_PIXELS) * (width // PATCH_PIXELS)
    if tokens > MAX_TOKENS:
        raise UserError(
            f"a video of {frames} frames of {height} x {width} pixels has {tokens} tokens, and more than {MAX_TOKENS} are not "
            "sampled: the model was trained with up to 118800 (129 frames of 720 x 1280). Make it smaller or shorter."
        )
    return latent_frames, height // SPATIAL_COMPRESSION, width // SPATIAL_COMPRESSION


def initial_noise(size: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Gaussian noise (1, 16, F, H, W), float32, on the generator's device, for a latent of ``size`` (F, H, W).

    Made latent frame by latent frame, so that the first frames do not depend on the length of the video.
    """
    frames, height, width = size
    one_frame = (1, LATENT_CHANNELS, 1, height, width)
    noise = (torch.randn(one_frame, generator=generator, device=generator.device, dtype=torch.float32) for _ in range(frames))
    return torch.cat(tuple(noise), dim=2)


@torch.no_grad()
def sample_latents(
    transformer: Callable[..., Tensor],
    noise: Tensor,
    text_states: Tensor,
    text_mask: Tensor,
    text_states_2: Tensor,
    *,
    sigmas: Tensor,
    guidance_scale: float,
    device: torch.device,
    dtype: torch.dtype,
    on_step: Callable[[int], None] = lambda step: None,
    on_estimate: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Integrate the flow from noise to latents.

    Args:
        transformer: the network, or what takes its place and has its ``config``, as ``step_cache.StepCache`` does.
        noise: (B, 16, F, H, W), float32.
        text_states, text_mask, text_states_2: (B, L, D), (B, L), (B, P) from the text encoders.
        sigmas: (steps + 1,), falling from 1 to 0.
        guidance_scale: of the distilled guidance; ignored by networks without a guidance input.
        dtype: what the network computes in; the Euler steps are float32.
        on_step: called with the number of steps done, after each.
        on_estimate: called before it with the same number and where the step's velocity leads: latents without noise, float32.

    Returns:
        latents (B, 16, F, H, W), float32, on ``device``, in the network's scale.
    """
    batch = noise.shape[0]
    latents = noise.to(device, torch.float32)
    text_states, text_states_2 = text_states.to(device, dtype), text_states_2.to(device, dtype)
    text_mask = text_mask.cpu()  # the network only needs lengths, and reading them from the device would stall it
    guidance = torch.full((batch,), guidance_scale * GUIDANCE_UNIT, device=device) if transformer.config.guidance else None
    sigmas = sigmas.to(device, torch.float32)
    for step in range(len(sigmas) - 1):
        t = (sigmas[step] * TIMESTEPS).expand(batch)
        velocity = transformer(latents.to(dtype), t, text_states, text_mask, text_states_2, guidance)
        if on_estimate is not None:
            on_estimate(step + 1, euler_step(latents, velocity, sigmas[step], torch.zeros_like(sigmas[step])))
        latents = euler_step(latents, velocity, sigmas[step], sigmas[step + 1])
        on_step(step + 1)
    return latents
