"""Which VAE, and how it works through a clip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from utils.errors import UserError

if TYPE_CHECKING:
    import torch

DEFAULT_TILE_SIZE = 256
TILE_SIZE_UNIT = 32  # a quarter of a tile, by which tiles overlap, must be whole latent positions of 8 pixels
DEFAULT_CHUNK_SIZE = 32


@dataclass(frozen=True)
class VAESettings:
    """The VAE of a run.

    Attributes:
        vae: path; None in runs that need no VAE.
        vae_dtype: of the weights and the computation.
        vae_chunk_size: columns that a convolution takes at a time, None for all: same result, less memory.
        vae_spatial_tile_sample_min_size: side of a spatial tile in pixels, None without tiles.

    Raises:
        UserError: a tile size that the VAE cannot work with.
    """

    vae: str | None
    vae_dtype: torch.dtype
    vae_chunk_size: int | None = None
    vae_spatial_tile_sample_min_size: int | None = None

    def __post_init__(self) -> None:
        if self.vae_spatial_tile_sample_min_size is not None:
            check_tile_size(self.vae_spatial_tile_sample_min_size)

    @property
    def automatic(self) -> bool:
        """Whether free memory decides on chunks and tiles (see ``vae.memory.VAEFit``), as no flag does."""
        return self.vae_chunk_size is None and self.vae_spatial_tile_sample_min_size is None

    @property
    def lighter_flags(self) -> str:
        """Flags with which the VAE takes less memory than with these settings; empty where there are none."""
        chunk, tile = self.vae_chunk_size, self.vae_spatial_tile_sample_min_size
        flags = [] if chunk is not None and chunk <= DEFAULT_CHUNK_SIZE else [f"--vae_chunk_size {DEFAULT_CHUNK_SIZE}"]
        if tile is None or tile > 64:
            flags.append(f"--vae_spatial_tile_sample_min_size {128 if tile is None or tile > 128 else 64}")
        return " and ".join(flags)


def check_tile_size(pixels: int) -> None:
    """Raise a UserError unless ``pixels`` is a positive multiple of 32."""
    if pixels <= 0 or pixels % TILE_SIZE_UNIT:
        lower = max(pixels // TILE_SIZE_UNIT, 1) * TILE_SIZE_UNIT
        raise UserError(
            f"--vae_spatial_tile_sample_min_size {pixels} is not a multiple of {TILE_SIZE_UNIT} pixels, which tiles of the VAE "
            f"must be; use {lower} or {lower + TILE_SIZE_UNIT}."
        )
