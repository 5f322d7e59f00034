"""The causal 3D VAE of HunyuanVideo: clips of RGB frames to latents, 4x smaller in time and 8x in space, and back.

Frame 0 is encoded alone and every four frames after it together, so a clip has 4n + 1 frames and n + 1 latent frames.
The state dict has the published key names. Convolutions work piece by piece (``vae.convolution``); tiles
are in ``vae.tiling``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn as nn

from hunyuan_model.vae.convolution import normalised
from hunyuan_model.vae.layers import (
    NORM_EPS,
    CausalAttention,
    CausalConv3d,
    Downsample,
    ResnetBlockCausal3D,
    Upsample,
)
from hunyuan_model.vae.settings import check_tile_size
from hunyuan_model.vae.tiling import TileSize, run_in_tiles
from utils.errors import UserError

SPATIAL_COMPRESSION = 8
TIME_COMPRESSION = 4
LOGVAR_RANGE = (-30.0, 20.0)
SCALING_FACTOR = 0.476986  # latents times this have about unit variance


@dataclass(frozen=True)
class VAEConfig:
    """The sizes of a VAE. The defaults are those of the published model (246 478 803 parameters)."""

    block_out_channels: tuple[int, int, int, int] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    latent_channels: int = 16
    in_channels: int = 3
    out_channels: int = 3
    scaling_factor: float = SCALING_FACTOR


@dataclass(frozen=True)
class DiagonalGaussian:
    """The posterior of an encoded clip: mean and log variance, each (B, 16, F, H / 8, W / 8)."""

    mean: torch.Tensor
    logvar: torch.Tensor

    @classmethod
    def from_moments(cls, moments: torch.Tensor) -> DiagonalGaussian:
        """Split the encoder's output (B, 2 * channels, F, H, W); the log variance is clamped to [-30, 20]."""
        mean, logvar = moments.chunk(2, dim=1)
        return cls(mean, logvar.clamp(*LOGVAR_RANGE))

    def sample(self, generator: torch.Generator | None = None) -> torch.Tensor:
        """One random sample, shape and dtype of ``mean``. The noise is made in float32 on the generator's own device."""
        device = generator.device if generator is not None else self.mean.device
        noise = torch.randn(self.mean.shape, generator=generator, device=device, dtype=torch.float32)
        return self.mean + torch.exp(0.5 * self.logvar) * noise.to(self.mean)


class MidBlock(nn.Module):
    """Residual block, causal attention, residual block, at the smallest size."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlockCausal3D(channels, channels, groups) for _ in range(2)])
        self.attentions = nn.ModuleList([CausalAttention(channels, groups)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.resnets[0](x)
        x = self.attentions[0](x)
        return self.resnets[1](x)


class DownBlock(nn.Module):
    """Residual blocks, then halving in space (and in time) unless it is the last one."""

    def __init__(self, in_channels: int, out_channels: int, layers: int, groups: int, downsample: nn.Module | None):
        super().__init__()
        self.resnets = _resnets(in_channels, out_channels, layers, groups)
        self.downsamplers = nn.ModuleList([downsample] if downsample else [])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class UpBlock(nn.Module):
    """Residual blocks, then doubling in space (and in time) unless it is the last one."""

    def __init__(self, in_channels: int, out_channels: int, layers: int, groups: int, upsample: nn.Module | None):
        super().__init__()
        self.resnets = _resnets(in_channels, out_channels, layers, groups)
        self.upsamplers = nn.ModuleList([upsample] if upsample else [])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


def _resnets(in_channels: int, out_channels: int, layers: int, groups: int) -> nn.ModuleList:
    inputs = [in_channels, *[out_channels] * (layers - 1)]
    return nn.ModuleList(ResnetBlockCausal3D(channels, out_channels, groups) for channels in inputs)


class Encoder(nn.Module):
    """(B, 3, T, H, W) -> moments before ``quant_conv``, (B, 2 * latent channels, F, H / 8, W / 8)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = CausalConv3d(config.in_channels, widths[0])
        halving = [Downsample(widths[0], 1), Downsample(widths[1], 2), Downsample(widths[2], 2), None]
        self.down_blocks = nn.ModuleList(
            [DownBlock(widths[max(i - 1, 0)], widths[i], config.layers_per_block, groups, halving[i]) for i in range(len(widths))]
        )
        self.mid_block = MidBlock(widths[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=NORM_EPS)
        self.conv_out = CausalConv3d(widths[-1], 2 * config.latent_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        return self.conv_out(normalised(x, self.conv_norm_out))


class Decoder(nn.Module):
    """Latents after ``post_quant_conv``, (B, channels, F, h, w) -> (B, 3, 4 * F - 3, 8 * h, 8 * w)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = CausalConv3d(config.latent_channels, widths[0])
        self.mid_block = MidBlock(widths[0], groups)
        doubling = [Upsample(widths[0], 1), Upsample(widths[1], 2), Upsample(widths[2], 2), None]
        self.up_blocks = nn.ModuleList(
            [
                UpBlock(widths[max(i - 1, 0)], widths[i], config.layers_per_block + 1, groups, doubling[i])
                for i in range(len(widths))
            ]
        )
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=NORM_EPS)
        self.conv_out = CausalConv3d(widths[-1], config.out_channels)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(z)
        x = self.mid_block(x)
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(normalised(x, self.conv_norm_out))


class AutoencoderKLCausal3D(nn.Module):
    """Encode clips to a Gaussian over latents and decode latents to clips.

    Latents are those of the encoder: neither multiplied by ``scaling_factor`` on encoding nor divided on decoding.
    Tiling, chunks and the reuse of buffers are off until enabled.
    """

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv3d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv3d(config.latent_channels, config.latent_channels, 1)
        self.spatial_tile: int | None = None  # pixels

    @property
    def scaling_factor(self) -> float:
        """Latents times this have about unit variance: what the transformer is trained on."""
        return self.config.scaling_factor

    def enable_spatial_tiling(self, sample_min_size: int = 256) -> None:
        """Work on squares of ``sample_min_size`` pixels that overlap by a quarter and are blended linearly.

        Memory is bounded by the tile, at the price of values that differ from the untiled ones: a tile does not see
        beyond its edges.

        Raises:
            UserError: not a positive multiple of 32 (a quarter of a tile must be whole latent positions).
        """
        check_tile_size(sample_min_size)
        self.spatial_tile = sample_min_size

    def disable_tiling(self) -> None:
        """Work on whole frames, as at first."""
        self.spatial_tile = None

    def reuse_buffers(self, reuse: bool = True) -> None:
        """Let layers write over what is no longer needed: about a third less memory, and no gradients through the VAE."""
        for module in self.modules():
            if isinstance(module, CausalConv3d):
                module.reuse_buffers = reuse

    def set_chunk_size(self, chunk_size: int | None) -> None:
        """Let every convolution work on at most ``chunk_size`` columns at a time (None: all): less memory, same values.

        Raises:
            UserError: less than 1.
        """
        if chunk_size is not None and chunk_size < 1:
            raise UserError(f"--vae_chunk_size {chunk_size} is too small: give the number of columns of a chunk, for example 32.")
        for module in self.modules():
            if isinstance(module, CausalConv3d):
                module.chunk_size = chunk_size

    def encode(self, x: torch.Tensor) -> DiagonalGaussian:
        """(B, 3, T, H, W) in [-1, 1] -> posterior over latents (B, 16, (T - 1) / 4 + 1, H / 8, W / 8).

        Raises:
            UserError: T is not 4n + 1, or H or W is not divisible by 8.
        """
        frames, height, width = x.shape[2:]
        if frames % TIME_COMPRESSION != 1:
            raise UserError(f"the VAE encodes clips of 4n + 1 frames (1, 5, 9, ...), not of {frames}.")
        if height % SPATIAL_COMPRESSION or width % SPATIAL_COMPRESSION or not height or not width:
            raise UserError(f"the VAE encodes frames whose sides are multiples of 8 pixels, not {width}x{height}.")
        return DiagonalGaussian.from_moments(self._in_tiles(x, self._encode_whole, from_pixels=True))

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Latents (B, 16, F, h, w), already divided by the scaling factor -> (B, 3, 4F - 3, 8h, 8w), not clamped."""
        return self._in_tiles(z, self._decode_whole, from_pixels=False)

    def _encode_whole(self, x: torch.Tensor) -> torch.Tensor:
        return self.quant_conv(self.encoder(x)).contiguous()

    def _decode_whole(self, z: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.post_quant_conv(z))

    def _in_tiles(self, x: torch.Tensor, run: Callable[[torch.Tensor], torch.Tensor], *, from_pixels: bool) -> torch.Tensor:
        """``run`` on tiles of ``x``, where tiling is enabled and ``x`` is larger than one."""
        if self.spatial_tile is None:
            return run(x)
        pixels, latent = self.spatial_tile, self.spatial_tile // SPATIAL_COMPRESSION
        return run_in_tiles(run, x, TileSize(pixels, latent) if from_pixels else TileSize(latent, pixels))
