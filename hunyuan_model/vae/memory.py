"""How much memory the VAE takes for a clip, and the settings with which it fits into what is free."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from hunyuan_model.vae.convolution import PIECE_ELEMENTS
from hunyuan_model.vae.loading import configure_vae
from hunyuan_model.vae.model import SPATIAL_COMPRESSION, TIME_COMPRESSION, AutoencoderKLCausal3D, VAEConfig
from hunyuan_model.vae.settings import VAESettings
from utils.free_memory import free_device_memory

logger = logging.getLogger(__name__)

SHARE_OF_FREE = 0.8
"""The rest is for what is not counted: workspaces of libraries, and gaps between tensors."""
KERNEL = 3
LAYERS_OF_ATTENTION = 8  # tensors of its size: the input, its norm, query, key, value, frames attended to, all of them, the output


@dataclass(frozen=True)
class Splitting:
    """How the VAE works through a clip.

    Attributes:
        chunk_size: columns that a convolution takes at a time, None for all: the same result.
        tile_size: side of a spatial tile in pixels, None without tiles.
    """

    chunk_size: int | None = None
    tile_size: int | None = None

    @property
    def flags(self) -> str:
        """The flags that ask for it."""
        given = (("--vae_chunk_size", self.chunk_size), ("--vae_spatial_tile_sample_min_size", self.tile_size))
        return " ".join(f"{flag} {value}" for flag, value in given if value is not None)


WHOLE = Splitting()
CHOICES = (WHOLE, Splitting(32), Splitting(32, 256), Splitting(32, 128))
"""From the fastest to the lightest; chunks come first, as they change no value."""


@dataclass(frozen=True)
class Clip:
    """Size of what is encoded, or of what comes of decoding: pixels and frames."""

    batch: int
    frames: int
    height: int
    width: int

    @classmethod
    def of_latents(cls, z: torch.Tensor) -> Clip:
        """From (B, 16, F, h, w)."""
        batch, _, frames, height, width = z.shape
        return cls(batch, (frames - 1) * TIME_COMPRESSION + 1, height * SPATIAL_COMPRESSION, width * SPATIAL_COMPRESSION)


class VAEFit:
    """Splits the work of a VAE into chunks and tiles: as the settings say, else only as far as free memory demands.

    Free memory is that of the VAE's device when this object is made. A choice other than ``WHOLE`` is logged once.

    Args:
        settings: how to split; where they are ``automatic``, or None, each clip decides.
        encode: whether clips are encoded; else they are decoded.
    """

    def __init__(self, vae: AutoencoderKLCausal3D, settings: VAESettings | None = None, *, encode: bool) -> None:
        self.vae, self.encode = vae, encode
        weight = next(vae.parameters())
        self.dtype, self.device = weight.dtype, weight.device.type
        self.fixed: Splitting | None = None
        if settings is not None and not settings.automatic:
            self.fixed = Splitting(settings.vae_chunk_size, settings.vae_spatial_tile_sample_min_size)
            configure_vae(vae, chunk_size=self.fixed.chunk_size, tile_size=self.fixed.tile_size)
        self.free = free_device_memory(weight.device)
        self._logged: set[Splitting] = set()
        self._warned = False

    def must_split(self, clip: Clip) -> bool:
        """Whether free memory demands that ``clip`` is split; False where the settings decide."""
        return self.fixed is None and self._choose(clip) != WHOLE

    def fit(self, clip: Clip) -> Splitting:
        """Prepare the VAE for ``clip``; returns how it will be split."""
        if self.fixed is not None:
            return self.fixed
        splitting = self._choose(clip)
        configure_vae(self.vae, chunk_size=splitting.chunk_size, tile_size=splitting.tile_size)
        if splitting != WHOLE and splitting not in self._logged:
            self._logged.add(splitting)
            self._log(clip, splitting)
        if splitting == CHOICES[-1] and not self._warned and self._bytes(clip, splitting) > self.free:
            self._warned = True
            logger.warning(
                "%d frame(s) of %dx%d take more than the free memory even in the smallest tiles; memory may run out. Use fewer.",
                clip.frames,
                clip.width,
                clip.height,
            )
        return splitting

    def _choose(self, clip: Clip) -> Splitting:
        return choose_splitting(self.vae.config, clip, self.dtype, self.device, self.free, encode=self.encode)

    def _log(self, clip: Clip, splitting: Splitting) -> None:
        logger.info(
            "%s are free; %s %d x %d frame(s) of %dx%d would take %s. %s is used, which takes %s.",
            _size(self.free),
            "encoding" if self.encode else "decoding",
            clip.batch,
            clip.frames,
            clip.width,
            clip.height,
            _size(self._bytes(clip, WHOLE)),
            splitting.flags,
            _size(self._bytes(clip, splitting)),
        )

    def _bytes(self, clip: Clip, splitting: Splitting) -> int:
        return working_bytes(self.vae.config, clip, self.dtype, self.device, splitting, encode=self.encode)


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def choose_splitting(
    config: VAEConfig, clip: Clip, dtype: torch.dtype, device: str, free: int | None, *, encode: bool
) -> Splitting:
    """The first of ``CHOICES`` that fits into ``free`` bytes, the last where none does; WHOLE where ``free`` is not known."""
    if free is None:
        return WHOLE
    for splitting in CHOICES:
        if working_bytes(config, clip, dtype, device, splitting, encode=encode) <= free * SHARE_OF_FREE:
            return splitting
    return CHOICES[-1]


def working_bytes(config: VAEConfig, clip: Clip, dtype: torch.dtype, device: str, splitting: Splitting, *, encode: bool) -> int:
    """Peak memory of encoding to or decoding from latents without gradients, the weights and the input excepted.

    Args:
        device: type of the device; the size of pieces depends on it.
    """
    tile, joined = clip, 0
    if splitting.tile_size is not None and max(clip.height, clip.width) > splitting.tile_size:
        tile = Clip(clip.batch, clip.frames, min(clip.height, splitting.tile_size), min(clip.width, splitting.tile_size))
        edges = Clip(clip.batch, clip.frames, splitting.tile_size * 2 // 3, clip.width)  # of this row of tiles and of the last one
        joined = _output_values(config, clip, encode) + _output_values(config, edges, encode)
    piece = PIECE_ELEMENTS.get(device, PIECE_ELEMENTS["cuda"])
    busiest = max(_stages(config, tile, encode, piece, splitting.chunk_size))
    in_float32 = 0 if dtype == torch.float32 else piece * (torch.float32.itemsize + dtype.itemsize)
    return (joined + busiest) * dtype.itemsize + in_float32


def _output_values(config: VAEConfig, clip: Clip, encode: bool) -> int:
    if not encode:
        return clip.batch * config.out_channels * clip.frames * clip.height * clip.width
    frames = (clip.frames - 1) // TIME_COMPRESSION + 1
    return 2 * clip.batch * config.latent_channels * frames * clip.height * clip.width // SPATIAL_COMPRESSION**2


def _stages(config: VAEConfig, clip: Clip, encode: bool, piece: int, chunk_size: int | None) -> Iterator[int]:
    """Numbers that are held at once in the residual blocks of each size, and in the attention."""
    widths = config.block_out_channels
    half, quarter = (clip.frames + 1) // 2, (clip.frames + 3) // 4
    last = len(widths) - 1
    for index, width in enumerate(widths):
        if encode:
            frames = (clip.frames, clip.frames, half, quarter)[index]
            before = widths[max(index - 1, 0)]
        else:
            frames = (clip.frames, half, quarter, quarter)[index]
            before = widths[min(index + 1, last)]
        size = (frames, clip.height >> index, clip.width >> index)
        values = clip.batch * size[0] * size[1] * size[2]
        held = (2 * width + (before if before != width else 0)) * values
        first = (before + width) * values + _convolution(clip.batch, size, before, width, piece, chunk_size)
        yield max(first, held + _convolution(clip.batch, size, width, width, piece, chunk_size))
    yield LAYERS_OF_ATTENTION * widths[-1] * values


def _convolution(batch: int, size: tuple[int, int, int], inputs: int, outputs: int, piece: int, chunk_size: int | None) -> int:
    """Numbers in the window that a convolution reads and in what it makes of it."""
    frames, rows, columns = size
    at_once = min(frames, max(1, piece // (batch * max(inputs, outputs) * rows * columns)))
    width = min(columns, chunk_size or columns)
    window = (at_once + (KERNEL - 1 if frames > 1 else 0)) * inputs * (rows + KERNEL - 1) * (width + KERNEL - 1)
    return batch * (window + at_once * outputs * rows * width)
