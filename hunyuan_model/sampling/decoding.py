"""From latents to frames."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hunyuan_model.vae.loading import load_vae
from hunyuan_model.vae.memory import Clip, VAEFit, VAESettings


def load_decoder(settings: VAESettings, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Load the VAE: a function from latents (B, 16, F, H, W) in the network's scale to frames (B, T, H, W, 3).

    Chunks and tiles are those of the settings, or what free memory demands.

    Raises:
        UserError: as ``load_vae``.
    """
    vae = load_vae(settings.vae, device=device, dtype=settings.vae_dtype)
    fit = VAEFit(vae, settings, encode=False)

    def decode(latents: Tensor) -> Tensor:
        fit.fit(Clip.of_latents(latents))
        return decode_latents(vae, latents, device=device, dtype=settings.vae_dtype)

    return decode


@torch.no_grad()
def decode_latents(vae: torch.nn.Module, latents: Tensor, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Latents in the network's scale (B, 16, F, H, W) -> frames uint8 (B, T, H, W, 3) on the CPU."""
    pixels = vae.decode((latents.float() / vae.scaling_factor).to(device, dtype))
    batch, channels, *size = pixels.shape
    out = torch.empty(batch, *size, channels, dtype=torch.uint8)
    for index, frame in enumerate(pixels.unbind(2)):  # one by one: no float32 copy of the whole video
        frame = frame.float().add_(1).mul_(127.5).round_().clamp_(0, 255)
        out[:, index] = frame.to(torch.uint8).permute(0, 2, 3, 1)
    return out
