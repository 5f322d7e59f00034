"""From latents to frames, and the files of either."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hunyuan_model.sampling.flow import LATENT_CHANNELS
from hunyuan_model.vae.loading import load_vae
from hunyuan_model.vae.memory import Clip, VAEFit, VAESettings
from hunyuan_model.vae.model import AutoencoderKLCausal3D
from utils.devices import explain_out_of_memory
from utils.errors import UserError
from utils.files import atomic_folder
from utils.media.writing import save_animation, save_picture, save_video, unused_stem
from utils.safetensors_io import read_tensors, save_tensors

LATENT_ENDING = "_latent.safetensors"
PREVIEW_ENDING = "_preview.png"
ENDINGS = {
    "video": (".mp4",),
    "images": ("",),
    "latent": (LATENT_ENDING,),
    "both": (".mp4", LATENT_ENDING),
    "webp": (".webp",),
    "gif": (".gif",),
}

Decode = Callable[[Tensor], Tensor]
"""Latents (B, 16, F, H, W) in the network's scale -> uint8 RGB frames (B, T, H, W, 3) on the CPU."""


@dataclass(frozen=True)
class OutputSettings:
    """Where results go, and in which form; the fields have the names of flags.

    Attributes:
        save_path: folder.
        output_type: video (MP4), images (a folder of PNG), latent, both (latent and MP4), webp or gif (animated).
        no_metadata: leave prompt and settings out of the files.
        preview_every: write a preview after so many steps; None for none.
    """

    save_path: str
    output_type: str = "video"
    fps: int = 24
    no_metadata: bool = False
    preview_every: int | None = None

    @property
    def keeps_latents(self) -> bool:
        """Whether the latents are a result; else their file is there only until they are decoded."""
        return LATENT_ENDING in ENDINGS[self.output_type]

    def unused_stem(self, stem: str, beside_latents: bool = False) -> str:
        """``stem``, or with a number behind it, so that nothing is overwritten: latents neither, but ``beside_latents``, which are
        only read."""
        endings = ENDINGS[self.output_type] if beside_latents else {*ENDINGS[self.output_type], LATENT_ENDING}
        return unused_stem(Path(self.save_path), stem, endings)

    def preview_path(self, stem: str) -> Path:
        """Where previews of a result are written, over what a killed run left."""
        return Path(self.save_path) / f"{stem}{PREVIEW_ENDING}"

    def path_of_frames(self, stem: str) -> Path:
        """Of the file, or the folder of PNG; not for latents alone."""
        return Path(self.save_path) / (stem + ENDINGS[self.output_type][0])

    def save_latents(self, stem: str, latents: Tensor, metadata: dict[str, str]) -> Path:
        """Write latents (1, 16, F, H, W), in the network's scale, as the tensor ``latent`` (16, F, H, W); returns the path."""
        path = Path(self.save_path) / f"{stem}{LATENT_ENDING}"
        save_tensors(path, {"latent": latents[0]}, None if self.no_metadata else metadata)
        return path

    def save_frames(self, stem: str, frames: Tensor, metadata: dict[str, str]) -> Path:
        """Write uint8 RGB frames (T, H, W, 3) as a folder with 00000.png and on, MP4, WebP or GIF; returns its path."""
        path, pictures, metadata = self.path_of_frames(stem), frames.numpy(), {} if self.no_metadata else metadata
        if self.output_type == "images":
            with atomic_folder(path) as temporary:
                for index, picture in enumerate(pictures):
                    save_picture(temporary / f"{index:05d}.png", picture, metadata)
            return path
        save = save_video if path.suffix == ".mp4" else save_animation
        save(path, pictures, self.fps, metadata)
        return path


def read_latents(path: str | os.PathLike[str], flag: str) -> tuple[Tensor, dict[str, str]]:
    """Latents (1, 16, F, H, W), float32, that ``OutputSettings.save_latents`` wrote, and the metadata.

    Raises:
        UserError: not such a file, or values that are not finite; names ``flag``.
    """
    file = read_tensors(path, flag)
    latent = file.tensors.get("latent")
    if latent is None or latent.ndim != 4 or latent.shape[0] != LATENT_CHANNELS or 0 in latent.shape:
        raise UserError(
            f"{flag} {path} holds no tensor named latent of the shape (16, frames, height, width); "
            "give a file that --output_type latent wrote."
        )
    if not torch.isfinite(latent).all():
        raise UserError(f"{flag} {path} holds NaN or infinity; sample it again.")
    return latent[None].float(), file.metadata


def load_decoder(settings: VAESettings, device: torch.device) -> Decode:
    """``decoder_of`` the VAE of the settings; errors as of ``load_vae``, too."""
    return decoder_of(load_vae(settings.vae, device=device, dtype=settings.vae_dtype), settings, device)


def decoder_of(vae: AutoencoderKLCausal3D, settings: VAESettings, device: torch.device) -> Decode:
    """With a VAE that is loaded.

    Chunks and tiles are those of the settings, or what the memory demands that is free now.

    Raises:
        UserError: when it decodes: memory that does not suffice, with the flags to change.
    """
    fit = VAEFit(vae, settings, encode=False)
    lighter = " or ".join(filter(None, (settings.lighter_flags and f"use {settings.lighter_flags}", "make it smaller or shorter")))

    def decode(latents: Tensor) -> Tensor:
        fit.fit(Clip.of_latents(latents))
        with explain_out_of_memory("decoding", lighter, device):
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
