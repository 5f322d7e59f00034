"""The causal 3D VAE of HunyuanVideo: clips of RGB frames to latents, 4x smaller in time and 8x in space, and back.

Frame 0 is encoded alone and every four frames after it together, so a clip has 4n + 1 frames and n + 1 latent frames.
The state dict has the published key names.
"""

from __future__ import annotations

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
from hunyuan_model.vae.tiling import run_in_tiles
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


class ResnetStack(nn.Module):
    """Residual blocks, then what halves or doubles the clip, where there is such a module, under its published name."""

    def __init__(self, in_channels: int, out_channels: int, layers: int, groups: int, name: str, resample: nn.Module | None):
        super().__init__()
        inputs = [in_channels, *[out_channels] * (layers - 1)]
        self.resnets = nn.ModuleList(ResnetBlockCausal3D(channels, out_channels, groups) for channels in inputs)
        if resample is not None:
            self.add_module(name, nn.ModuleList([resample]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layers in self.children():
            for layer in layers:
                x = layer(x)
        return x


class Encoder(nn.Module):
    """(B, 3, T, H, W) -> moments before ``quant_conv``, (B, 2 * latent channels, F, H / 8, W / 8)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, layers, groups = config.block_out_channels, config.layers_per_block, config.norm_num_groups
        self.conv_in = CausalConv3d(config.in_channels, widths[0])
        halving = [Downsample(widths[0], 1), Downsample(widths[1], 2), Downsample(widths[2], 2), None]
        self.down_blocks = nn.ModuleList(
            ResnetStack(before, width, layers, groups, "downsamplers", last)
            for before, width, last in zip((widths[0], *widths), widths, halving)
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
        widths, layers, groups = config.block_out_channels[::-1], config.layers_per_block + 1, config.norm_num_groups
        self.conv_in = CausalConv3d(config.latent_channels, widths[0])
        self.mid_block = MidBlock(widths[0], groups)
        doubling = [Upsample(widths[0], 1), Upsample(widths[1], 2), Upsample(widths[2], 2), None]
        self.up_blocks = nn.ModuleList(
            ResnetStack(before, width, layers, groups, "upsamplers", last)
            for before, width, last in zip((widths[0], *widths), widths, doubling)
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
    Tiles, chunks and the reuse of buffers are off until enabled.
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

    def split(self, *, chunk_size: int | None = None, tile_size: int | None = None) -> None:
        """Work through clips in parts, for less memory. Only space is split: a clip's frames stay together.

        Args:
            chunk_size: columns that a convolution takes at a time, None for all: the same values.
            tile_size: side in pixels, a multiple of 32, of squares that overlap by a quarter and are blended linearly, None for
                whole frames. The values differ a little: a tile does not see beyond its edges.
        """
        self.spatial_tile = tile_size
        for module in self.modules():
            if isinstance(module, CausalConv3d):
                module.chunk_size = chunk_size

    def reuse_buffers(self, reuse: bool = True) -> None:
        """Let layers write over what is no longer needed: about a third less memory, and no gradients through the VAE."""
        for module in self.modules():
            if isinstance(module, CausalConv3d):
                module.reuse_buffers = reuse

    def encode(self, x: torch.Tensor) -> DiagonalGaussian:
        """(B, 3, T, H, W) in [-1, 1] -> posterior over latents (B, 16, (T - 1) / 4 + 1, H / 8, W / 8).

        Raises:
            UserError: T is not 4n + 1, or H or W is not divisible by 8.
        """
        frames, height, width = x.shape[2:]
        if frames % TIME_COMPRESSION != 1 or height % SPATIAL_COMPRESSION or width % SPATIAL_COMPRESSION:
            raise UserError(
                "the VAE encodes clips of 4n + 1 frames whose sides are multiples of 8 pixels, "
                f"not {frames} frames of {width}x{height}."
            )
        tile = self.spatial_tile or max(height, width)
        moments = run_in_tiles(self._moments, x, tile, tile // SPATIAL_COMPRESSION)
        mean, logvar = moments.chunk(2, dim=1)
        return DiagonalGaussian(mean, logvar.clamp(*LOGVAR_RANGE))

    def _moments(self, x: torch.Tensor) -> torch.Tensor:
        return self.quant_conv(self.encoder(x)).contiguous()

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Latents (B, 16, F, h, w), already divided by the scaling factor -> (B, 3, 4F - 3, 8h, 8w), not clamped."""
        tile = self.spatial_tile or SPATIAL_COMPRESSION * max(z.shape[3:])
        return run_in_tiles(lambda part: self.decoder(self.post_quant_conv(part)), z, tile // SPATIAL_COMPRESSION, tile)
