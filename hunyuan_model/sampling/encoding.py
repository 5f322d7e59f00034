"""From frames to latents, without chance: what sampling starts from."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hunyuan_model.vae.memory import Clip, VAEFit, VAESettings
from hunyuan_model.vae.model import AutoencoderKLCausal3D
from utils.devices import explain_out_of_memory
from utils.errors import UserError


def pixels_to_input(pixels: np.ndarray, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Pixels (F, H, W, 3) uint8 -> (3, F, H, W) in [-1, 1]; scaled in float32, then cast, frame by frame."""
    frames = torch.from_numpy(pixels).to(device).permute(3, 0, 1, 2)
    out = torch.empty(frames.shape, dtype=dtype, device=device)
    for frame, place in zip(frames.unbind(1), out.unbind(1)):
        place.copy_(frame.float().div_(127.5).sub_(1))
    return out


class FrameEncoder:
    """Encodes clips one by one with a loaded VAE; chunks and tiles are those of the settings, or what free memory demands."""

    def __init__(self, vae: AutoencoderKLCausal3D, settings: VAESettings, device: torch.device) -> None:
        self._vae, self._settings, self._device = vae, settings, device
        self._fit = VAEFit(vae, settings, encode=True)

    @torch.inference_mode()
    def encode(self, frames: np.ndarray) -> Tensor:
        """Frames (T, H, W, 3) uint8 RGB -> latents (1, 16, F, H / 8, W / 8) in the network's scale, float32, on the CPU: the mean
        of the VAE's distribution.

        Raises:
            UserError: memory does not suffice, or the VAE gives NaN.
        """
        clip = Clip(1, *frames.shape[:3])
        self._fit.fit(clip)
        lighter = " or ".join(filter(None, (self._settings.lighter_flags, "a smaller --video_size or --video_length")))
        with explain_out_of_memory(f"encoding {clip}", f"use {lighter}", self._device):
            mean = self._vae.encode(pixels_to_input(frames, self._device, self._settings.vae_dtype)[None]).mean
        latents = mean.float().cpu() * self._vae.scaling_factor
        if not torch.isfinite(latents).all():
            raise UserError(f"the VAE gives NaN or infinity for {clip}. Use --vae_dtype bfloat16 or float32.")
        return latents
