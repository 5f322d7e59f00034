"""What turns latents, timesteps, guidance and text into vectors of the hidden size, and the MLP of tokens."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hunyuan_model.transformer.gelu import gelu

MAX_PERIOD = 10000


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoids of t: (B,) in 0..1000 -> (B, dim) float32, cosines first (DDPM, arXiv 2006.11239)."""
    half = dim // 2
    frequencies = torch.exp(-math.log(MAX_PERIOD) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


class PatchEmbed(nn.Module):
    """(B, C, T, H, W) -> (B, tokens, hidden): one token per patch, tokens in (time, row, column) order."""

    def __init__(self, patch_size: tuple[int, int, int], in_channels: int, hidden_size: int):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv3d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, frames, height, width = x.shape
        pt, ph, pw = self.patch_size
        patches = x.reshape(batch, channels, frames // pt, pt, height // ph, ph, width // pw, pw)
        patches = patches.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(batch, -1, channels * pt * ph * pw)
        # Patches do not overlap, so the convolution is a matmul, for which every dtype has a fast kernel.
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class TimestepEmbedder(nn.Module):
    """(B,) timestep or guidance in 0..1000 -> (B, hidden)."""

    def __init__(self, hidden_size: int, frequency_dim: int):
        super().__init__()
        self.frequency_dim = frequency_dim
        self.mlp = nn.Sequential(nn.Linear(frequency_dim, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(timestep_embedding(t, self.frequency_dim).to(self.mlp[0].weight.dtype))


class VectorEmbedder(nn.Module):
    """Pooled text (B, pooled_dim) -> (B, hidden)."""

    def __init__(self, pooled_dim: int, hidden_size: int):
        super().__init__()
        self.in_layer = nn.Linear(pooled_dim, hidden_size)
        self.out_layer = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


class MLP(nn.Module):
    """Linear, activation (GELU in its tanh approximation), Linear."""

    def __init__(self, hidden_size: int, mlp_size: int, activation: Callable[[Tensor], Tensor] = gelu):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, mlp_size)
        self.fc2 = nn.Linear(mlp_size, hidden_size)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class TextProjection(nn.Module):
    """Mean text state (B, text_dim) -> (B, hidden)."""

    def __init__(self, text_dim: int, hidden_size: int):
        super().__init__()
        self.linear_1 = nn.Linear(text_dim, hidden_size)
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))
