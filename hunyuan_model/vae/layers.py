"""Building blocks of the causal 3D VAE: convolutions, residual blocks, resampling and the middle attention.

All tensors are (B, C, T, H, W).
"""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F

from hunyuan_model.vae.convolution import ConvInput, Padding, convolve, empty_beside, normalised

NORM_EPS = 1e-6


class CausalConv3d(nn.Module):
    """Convolution with replicated edges whose padding in time is all in front: a frame sees itself and earlier ones."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: tuple[int, int, int] = (1, 1, 1)):
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, kernel_size, stride)
        half = kernel_size // 2
        self.padding: tuple[Padding, Padding, Padding] = ((kernel_size - 1, 0), (half, half), (half, half))
        self.chunk_size: int | None = None
        self.reuse_buffers = False

    def forward(self, source: torch.Tensor | ConvInput, onto: torch.Tensor | None = None) -> torch.Tensor:
        """Convolve ``source`` (B, C, T, H, W); with ``onto``, add the result to that tensor, in place, and return it."""
        source, conv = source if isinstance(source, ConvInput) else ConvInput(source), self.conv
        out = onto
        if out is None:
            sizes = zip(source.tensor.shape[2:], self.padding, conv.kernel_size, conv.stride)
            size = ((length + sum(padding) - kernel) // stride + 1 for length, padding, kernel, stride in sizes)
            out = empty_beside(source.tensor, (source.tensor.shape[0], conv.out_channels, *size))
        convolve(
            source,
            conv.weight,
            conv.bias,
            out,
            stride=conv.stride,
            padding=self.padding,
            accumulate=onto is not None,
            chunk_size=self.chunk_size,
            reuse_buffers=self.reuse_buffers,
        )
        return out


class ResnetBlockCausal3D(nn.Module):
    """norm, SiLU, conv, norm, SiLU, conv, added to the input (through a 1x1x1 convolution where the width changes)."""

    def __init__(self, in_channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=NORM_EPS)
        self.conv1 = CausalConv3d(in_channels, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=NORM_EPS)
        self.conv2 = CausalConv3d(out_channels, out_channels)
        self.conv_shortcut = CausalConv3d(in_channels, out_channels, kernel_size=1) if in_channels != out_channels else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, T, H, W) -> (B, C', T, H, W). With ``reuse_buffers`` the result may take the place of ``x`` in memory."""
        hidden = self.conv1(normalised(x, self.norm1))
        if self.conv_shortcut is not None:
            residual = self.conv_shortcut(x)
        else:
            residual = x if self.conv1.reuse_buffers else x.clone()
        return self.conv2(normalised(hidden, self.norm2), onto=residual)


class Downsample(nn.Module):
    """Strided causal convolution; halves H and W, and T -> (T + 1) / 2 where ``time_stride`` is 2."""

    def __init__(self, channels: int, time_stride: int):
        super().__init__()
        self.conv = CausalConv3d(channels, channels, stride=(time_stride, 2, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """Nearest-neighbour doubling of H and W (and T -> 2T - 1, the first frame staying single), then a causal convolution.

    The enlarged clip is never made. Seen from one phase of the output (even or odd frames, rows, columns), neighbouring
    taps of the kernel fall on the same input position, so each phase is a convolution of the small input with a 2x2x2
    kernel of summed taps: the same numbers for 8/27 of the work.
    """

    def __init__(self, channels: int, time_factor: int):
        super().__init__()
        self.conv = CausalConv3d(channels, channels)
        self.time_factor = time_factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, channels, frames, rows, columns = x.shape
        out = empty_beside(x, (batch, channels, (frames - 1) * self.time_factor + 1, 2 * rows, 2 * columns))
        time_phases = [(slice(None), self.conv.conv.weight, self.conv.padding[0])]
        if self.time_factor == 2 and frames > 1:  # output frame t shows input frame (t + 1) // 2
            (even, even_padding), (odd, _) = _doubling_phases(self.conv.conv.weight, 2)
            time_phases = [(slice(0, None, 2), even, even_padding), (slice(1, None, 2), odd, (0, 0))]
        for time_phase, time_weight, time_padding in time_phases:
            for row, (row_weight, row_padding) in enumerate(_doubling_phases(time_weight, 3)):
                for column, (weight, column_padding) in enumerate(_doubling_phases(row_weight, 4)):
                    convolve(
                        ConvInput(x),
                        weight,
                        self.conv.conv.bias,
                        out[:, :, time_phase, row::2, column::2],
                        padding=(time_padding, row_padding, column_padding),
                        chunk_size=self.conv.chunk_size,
                        reuse_buffers=self.conv.reuse_buffers,
                    )
        return out


def _doubling_phases(weight: torch.Tensor, dim: int) -> list[tuple[torch.Tensor, Padding]]:
    """The even and odd outputs of a 3-tap kernel over a doubled axis, as 2-tap kernels over the axis itself."""
    first, second, third = weight.split(1, dim=dim)
    return [(torch.cat([first, second + third], dim=dim), (1, 0)), (torch.cat([first + second, third], dim=dim), (0, 1))]


class CausalAttention(nn.Module):
    """Single-head self-attention over a clip in which a token sees all tokens of its own and of earlier frames."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=NORM_EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, T, H, W) -> the same shape; the input is added to the result."""
        frames, rows, columns = x.shape[2:]
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, T * H * W, C)
        query, key, value = (project(tokens).unsqueeze(1) for project in (self.to_q, self.to_k, self.to_v))
        # Frame by frame over the keys up to it: exact, without the mask of (T * H * W)^2 entries.
        per_frame = rows * columns
        attended = torch.cat(
            [
                F.scaled_dot_product_attention(query[:, :, end - per_frame : end], key[:, :, :end], value[:, :, :end])
                for end in range(per_frame, frames * per_frame + 1, per_frame)
            ],
            dim=2,
        ).squeeze(1)
        return x + self.to_out[0](attended).transpose(1, 2).unflatten(2, (frames, rows, columns))
