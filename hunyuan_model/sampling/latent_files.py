"""Latents as files, to be decoded later."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from hunyuan_model.sampling.euler import LATENT_CHANNELS
from utils.errors import UserError
from utils.safetensors_io import read_tensors, save_tensors

LATENT_ENDING = "_latent.safetensors"


def save_latents(path: str | os.PathLike[str], latents: Tensor, metadata: dict[str, str] | None) -> None:
    """Save latents (1, 16, F, H, W), in the network's scale, as the tensor ``latent`` (16, F, H, W)."""
    save_tensors(path, {"latent": latents[0]}, metadata or None)


def read_latents(path: str | os.PathLike[str], flag: str) -> tuple[Tensor, dict[str, str]]:
    """Latents (1, 16, F, H, W), float32, that ``save_latents`` wrote, and the metadata.

    Raises:
        UserError: not such a file, or values that are not finite; names ``flag``.
    """
    file = read_tensors(path, flag)
    if "latent" not in file.tensors:
        raise UserError(f"{flag} {path} holds no tensor named latent; give a file that --output_type latent wrote.")
    latent = file.tensors["latent"]
    if latent.ndim != 4 or latent.shape[0] != LATENT_CHANNELS or 0 in latent.shape:
        raise UserError(f"{flag} {path}: the latent has the shape {tuple(latent.shape)}, expected (16, frames, height, width).")
    if not torch.isfinite(latent).all():
        raise UserError(f"{flag} {path} holds NaN or infinity; sample it again.")
    return latent[None].float(), file.metadata
