"""How the VAE works through clips: as flags say, else whole, or in parts as far as free memory demands."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from hunyuan_model.vae.convolution import frames_at_once, piece_elements
from hunyuan_model.vae.model import SPATIAL_COMPRESSION, TIME_COMPRESSION, AutoencoderKLCausal3D, VAEConfig
from utils.disk_space import readable
from utils.errors import UserError
from utils.free_memory import free_device_memory

logger = logging.getLogger(__name__)

DEFAULT_CHUNK_SIZE = 32
SHARE_OF_FREE = 0.8
"""The rest is for what is not counted: workspaces of libraries, and gaps between tensors."""
KERNEL = 3
LAYERS_OF_ATTENTION = 8  # tensors of its size: the input, its norm, query, key, value, frames attended to, all of them, the output


@dataclass(frozen=True)
class VAESettings:
    """The VAE of a run; the fields have the names of flags.

    Attributes:
        vae: path; None in runs that need no VAE.
        vae_dtype: of the weights and the computation.
        vae_chunk_size, vae_spatial_tile_sample_min_size: see ``AutoencoderKLCausal3D.split``; without both, free memory decides.

    Raises:
        UserError: a tile size that the VAE cannot work with.
    """

    vae: str | None
    vae_dtype: torch.dtype
    vae_chunk_size: int | None = None
    vae_spatial_tile_sample_min_size: int | None = None

    def __post_init__(self) -> None:
        # A quarter of a tile, by which tiles overlap, must be whole latent positions of 8 pixels.
        if (tile := self.vae_spatial_tile_sample_min_size) is not None and tile % 32:
            raise UserError(f"--vae_spatial_tile_sample_min_size {tile} is not a multiple of 32 pixels; use 128 or 256.")

    @property
    def splitting(self) -> Splitting:
        """What they fix; ``WHOLE`` where free memory decides."""
        return Splitting(self.vae_chunk_size, self.vae_spatial_tile_sample_min_size)

    @property
    def lighter_flags(self) -> str:
        """Flags with which the VAE takes less memory than with these settings; empty where there are none."""
        chunk, tile = self.vae_chunk_size, self.vae_spatial_tile_sample_min_size
        flags = [] if chunk is not None and chunk <= DEFAULT_CHUNK_SIZE else [f"--vae_chunk_size {DEFAULT_CHUNK_SIZE}"]
        if tile is None or tile > 64:
            flags.append(f"--vae_spatial_tile_sample_min_size {128 if tile is None or tile > 128 else 64}")
        return " and ".join(flags)


@dataclass(frozen=True)
class Splitting:
    """How the VAE works through a clip, as ``AutoencoderKLCausal3D.split`` takes it."""

    chunk_size: int | None = None
    tile_size: int | None = None

    def __str__(self) -> str:
        given = (("--vae_chunk_size", self.chunk_size), ("--vae_spatial_tile_sample_min_size", self.tile_size))
        return " ".join(f"{flag} {value}" for flag, value in given if value is not None)


WHOLE = Splitting()
CHOICES = (WHOLE, Splitting(DEFAULT_CHUNK_SIZE), Splitting(DEFAULT_CHUNK_SIZE, 256), Splitting(DEFAULT_CHUNK_SIZE, 128))
"""From the fastest to the lightest; chunks come first, as they change no value."""


@dataclass(frozen=True)
class Clip:
    """Size of what is encoded, or of what comes of decoding, in pixels and frames."""

    batch: int
    frames: int
    height: int
    width: int

    @classmethod
    def of_latents(cls, z: torch.Tensor) -> Clip:
        """From (B, 16, F, h, w)."""
        batch, _, frames, height, width = z.shape
        return cls(batch, (frames - 1) * TIME_COMPRESSION + 1, height * SPATIAL_COMPRESSION, width * SPATIAL_COMPRESSION)

    def __str__(self) -> str:
        return f"{self.batch} x {self.frames} frame(s) of {self.width}x{self.height}"


class VAEFit:
    """Splits the work of a VAE: as the settings say, else, clip by clip, only as far as free memory demands.

    Free memory is that of the VAE's device when this object is made. A choice other than ``WHOLE`` is logged once.

    Args:
        encode: whether clips are encoded; else they are decoded.
    """

    def __init__(self, vae: AutoencoderKLCausal3D, settings: VAESettings, *, encode: bool) -> None:
        self.vae, self.encode = vae, encode
        weight = next(vae.parameters())
        self.dtype, self.device = weight.dtype, weight.device.type
        self.free = free_device_memory(weight.device)
        self.fixed = None if settings.splitting == WHOLE else settings.splitting
        self._logged: set[Splitting] = {WHOLE}

    def must_split(self, clip: Clip) -> bool:
        """Whether free memory demands that ``clip`` is split; False where the settings decide."""
        return self.fixed is None and self._choose(clip) != WHOLE

    def fit(self, clip: Clip) -> Splitting:
        """Prepare the VAE for ``clip``; returns how it will be split."""
        splitting = self.fixed or self._choose(clip)
        self.vae.split(chunk_size=splitting.chunk_size, tile_size=splitting.tile_size)
        if self.fixed is None and splitting not in self._logged:
            self._logged.add(splitting)
            doing = "encoding" if self.encode else "decoding"
            whole, parts = self._bytes(clip, WHOLE), self._bytes(clip, splitting)
            logger.info(
                "%s are free; %s %s would take %s. %s is used, which takes %s.",
                *(readable(self.free), doing, clip, readable(whole), splitting, readable(parts)),
            )
            if parts > self.free:
                logger.warning("that is more than is free even in the smallest tiles; memory may run out. Use fewer frames.")
        return splitting

    def _choose(self, clip: Clip) -> Splitting:
        """The first of ``CHOICES`` that fits, the last where none does; WHOLE where it is not known what is free."""
        if self.free is None:
            return WHOLE
        return next((choice for choice in CHOICES if self._bytes(clip, choice) <= self.free * SHARE_OF_FREE), CHOICES[-1])

    def _bytes(self, clip: Clip, splitting: Splitting) -> int:
        return working_bytes(self.vae.config, clip, self.dtype, self.device, splitting, encode=self.encode)


def decoding_bytes(config: VAEConfig, clip: Clip, settings: VAESettings, device: torch.device) -> int:
    """The least memory of a VAE and of decoding ``clip`` with it, as ``VAEFit`` may split that."""
    with torch.device("meta"):
        weights = sum(weight.numel() for weight in AutoencoderKLCausal3D(config).parameters())
    splitting = CHOICES[-1] if settings.splitting == WHOLE else settings.splitting
    working = working_bytes(config, clip, settings.vae_dtype, device.type, splitting, encode=False)
    return weights * settings.vae_dtype.itemsize + working


def working_bytes(config: VAEConfig, clip: Clip, dtype: torch.dtype, device: str, splitting: Splitting, *, encode: bool) -> int:
    """Peak memory of encoding to or decoding from latents without gradients, the weights and the input excepted.

    Args:
        device: type of the device; the size of pieces depends on it.
    """

    def result(clip: Clip) -> int:
        if not encode:
            return clip.batch * config.out_channels * clip.frames * clip.height * clip.width
        frames = (clip.frames - 1) // TIME_COMPRESSION + 1
        return 2 * clip.batch * config.latent_channels * frames * clip.height * clip.width // SPATIAL_COMPRESSION**2

    tile, side, joined = clip, splitting.tile_size, 0
    if side is not None and max(clip.height, clip.width) > side:
        tile = replace(clip, height=min(clip.height, side), width=min(clip.width, side))
        joined = result(clip) + result(replace(clip, height=side * 2 // 3))  # and the edges of this row of tiles and of the last
    busiest = max(_stages(config, tile, encode, device, dtype, splitting.chunk_size))
    in_float32 = 0 if dtype == torch.float32 else piece_elements(device) * (torch.float32.itemsize + dtype.itemsize)
    return (joined + busiest) * dtype.itemsize + in_float32


def _stages(config: VAEConfig, clip: Clip, encode: bool, device: str, dtype: torch.dtype, chunk_size: int | None) -> Iterator[int]:
    """Numbers that are held at once in the residual blocks of each size, and in the attention."""
    widths = config.block_out_channels
    half, quarter = (clip.frames + 1) // 2, (clip.frames + 3) // 4
    lengths = (clip.frames, clip.frames, half, quarter) if encode else (clip.frames, half, quarter, quarter)
    befores = (widths[0], *widths[:-1]) if encode else (*widths[1:], widths[-1])

    def window(inputs: int, outputs: int) -> int:
        at_once = frames_at_once(device, dtype, clip.batch * max(inputs, outputs) * size[1] * size[2])
        return _window(clip.batch, size, inputs, outputs, at_once, chunk_size)

    for index, (width, before, frames) in enumerate(zip(widths, befores, lengths)):
        size = (frames, clip.height >> index, clip.width >> index)
        values = clip.batch * math.prod(size)
        first = (before + width) * values + window(before, width)
        held = (2 * width + (before if before != width else 0)) * values
        yield max(first, held + window(width, width))
    yield LAYERS_OF_ATTENTION * widths[-1] * values


def _window(batch: int, size: tuple[int, int, int], inputs: int, outputs: int, at_once: int, chunk_size: int | None) -> int:
    """Numbers in the window that a convolution reads and in what it makes of it, ``at_once`` frames."""
    frames, rows, columns = size
    at_once = min(frames, at_once)
    width = min(columns, chunk_size or columns)
    window = (at_once + (KERNEL - 1 if frames > 1 else 0)) * inputs * (rows + KERNEL - 1) * (width + KERNEL - 1)
    return batch * (window + at_once * outputs * rows * width)
