"""Building blocks of the causal 3D VAE: convolutions, residual blocks, resampling and the middle attention.

Every layer that looks at its neighbourhood runs piece by piece: a convolution asks for a window of its input, the
window is normalised, activated and padded on the way, and the result goes straight into its place in the output. So
no layer ever holds a padded or normalised copy of the whole clip, and the pieces give what one convolution would.

All tensors are (B, C, T, H, W). Sizes and windows below are (T, H, W); a window of rows is never cut, only frames
and, on request, columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

NORM_EPS = 1e-6
PIECE_ELEMENTS = 2**23
"""Numbers in one piece of a convolution's input or output (at least a frame): small beside a clip, large beside a call."""

Padding = tuple[int, int]
"""How many positions are replicated before the first and after the last one."""


@dataclass(frozen=True)
class ConvInput:
    """What a convolution reads: a tensor, and an element-wise function applied to each window of it.

    ``apply`` gets a copy-or-view window (B, C, t, H, w) and returns a tensor of that shape.
    """

    tensor: torch.Tensor
    apply: Callable[[torch.Tensor], torch.Tensor] | None = None

    def read(self, frames: slice, columns: slice) -> torch.Tensor:
        window = self.tensor[:, :, frames, :, columns]
        return window if self.apply is None else self.apply(window)


def normalised(x: torch.Tensor, norm: nn.GroupNorm) -> ConvInput:
    """``silu(norm(x))`` as a convolution's input: statistics of all of ``x`` in float32, the values window by window."""
    mean, variance = group_statistics(x, norm.num_groups)  # (B, groups)
    scale = torch.rsqrt(variance + norm.eps).repeat_interleave(x.shape[1] // norm.num_groups, dim=1) * norm.weight.float()
    shift = norm.bias.float() - mean.repeat_interleave(x.shape[1] // norm.num_groups, dim=1) * scale
    scale, shift = (values[:, :, None, None, None] for values in (scale, shift))  # (B, C, 1, 1, 1)
    return ConvInput(x, lambda window: F.silu(torch.addcmul(shift, window, scale), inplace=True).to(x.dtype))


def group_statistics(x: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and (biased) variance of each group of channels over all frames and positions: two float32 (B, groups).

    The variance is taken around the mean, frame by frame: a sum of squares minus a squared mean would lose the small
    variances of bright, flat images.
    """
    frames = x.unflatten(1, (groups, -1)).unbind(3)  # T times (B, groups, C / groups, H, W)
    count = frames[0][0, 0].numel() * len(frames)
    mean = torch.stack([frame.sum((2, 3, 4), dtype=torch.float32) for frame in frames]).sum(0) / count
    centre = mean[:, :, None, None, None]
    variance = torch.stack([(frame - centre).square_().sum((2, 3, 4)) for frame in frames]).sum(0) / count
    return mean, variance


def convolve(
    source: ConvInput,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    *,
    stride: tuple[int, int, int] = (1, 1, 1),
    padding: tuple[Padding, Padding, Padding],
    accumulate: bool = False,
    chunk_size: int | None = None,
) -> None:
    """Convolve ``source``, with replicated edges, into ``out`` (B, C_out, T, H, W), or onto it with ``accumulate``.

    Frames are taken a few at a time, and columns ``chunk_size`` at a time where it is given.
    """
    time_stride, _, column_stride = stride
    frames_in, _, columns_in = source.tensor.shape[2:]
    if frames_in == 1 and weight.shape[2] > 1:
        # Every tap in time falls on the one frame or on its replicas, so their sum is an exact 2D kernel.
        weight, padding = weight.sum(2, keepdim=True), ((0, 0), *padding[1:])
    kernel = weight.shape[2:]
    per_frame = max(source.tensor[:, :, 0].numel() * time_stride, out[:, :, 0].numel())
    for frames in _pieces(out.shape[2], max(1, PIECE_ELEMENTS // per_frame)):
        read_frames, pad_frames = _window(frames, time_stride, kernel[0], padding[0], frames_in)
        for columns in _pieces(out.shape[4], chunk_size or out.shape[4]):
            read_columns, pad_columns = _window(columns, column_stride, kernel[2], padding[2], columns_in)
            window = source.read(read_frames, read_columns)
            window = _replicate_edges(window, (pad_frames, padding[1], pad_columns))
            result = _convolve_window(window, weight, bias, stride)
            target = out[:, :, frames, :, columns]
            if accumulate:
                target.add_(result)
            else:
                target.copy_(result)


def _pieces(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _window(piece: slice, stride: int, kernel: int, padding: Padding, size: int) -> tuple[slice, Padding]:
    """Which of ``size`` input positions a piece of the output needs, and what to replicate around them."""
    first = piece.start * stride - padding[0]
    last = (piece.stop - 1) * stride - padding[0] + kernel
    return slice(max(first, 0), min(last, size)), (max(-first, 0), max(last - size, 0))


def _replicate_edges(x: torch.Tensor, padding: tuple[Padding, Padding, Padding]) -> torch.Tensor:
    frames, rows, columns = padding
    if x.shape[2] == 1 and frames == (0, 0):
        if not any((*rows, *columns)):
            return x
        return F.pad(x[:, :, 0], (*columns, *rows), mode="replicate").unsqueeze(2)
    if not any((*frames, *rows, *columns)):
        return x
    return F.pad(x, (*columns, *rows, *frames), mode="replicate")


def _convolve_window(
    window: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: tuple[int, int, int]
) -> torch.Tensor:
    if window.shape[2] == 1 and weight.shape[2] == 1:
        return F.conv2d(window[:, :, 0], weight[:, :, 0], bias, stride[1:]).unsqueeze(2)
    if window.device.type == "cpu" and window.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        # For a few small frames conv3d itself picks a matrix product that takes up to five times as long.
        return torch.mkldnn_convolution(window, weight, bias, (0, 0, 0), stride, (1, 1, 1), 1)
    return F.conv3d(window, weight, bias, stride)


class CausalConv3d(nn.Module):
    """Convolution with replicated edges whose padding in time is all in front: a frame sees itself and earlier ones."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: tuple[int, int, int] = (1, 1, 1)):
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, kernel_size, stride)
        half = kernel_size // 2
        self.padding: tuple[Padding, Padding, Padding] = ((kernel_size - 1, 0), (half, half), (half, half))
        self.chunk_size: int | None = None

    def forward(self, source: torch.Tensor | ConvInput, onto: torch.Tensor | None = None) -> torch.Tensor:
        """Convolve ``source`` (B, C, T, H, W); with ``onto``, add the result to that tensor, in place, and return it."""
        source = source if isinstance(source, ConvInput) else ConvInput(source)
        out = onto if onto is not None else self._empty_output(source.tensor)
        convolve(
            source,
            self.conv.weight,
            self.conv.bias,
            out,
            stride=self.conv.stride,
            padding=self.padding,
            accumulate=onto is not None,
            chunk_size=self.chunk_size,
        )
        return out

    def _empty_output(self, x: torch.Tensor) -> torch.Tensor:
        size = (
            (length + sum(padding) - kernel) // stride + 1
            for length, padding, kernel, stride in zip(x.shape[2:], self.padding, self.conv.kernel_size, self.conv.stride)
        )
        return x.new_empty(x.shape[0], self.conv.out_channels, *size)


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
        """(B, C, T, H, W) -> (B, C', T, H, W). Without gradients the result may take the place of ``x`` in memory."""
        hidden = self.conv1(normalised(x, self.norm1))
        if self.conv_shortcut is not None:
            residual = self.conv_shortcut(x)
        elif torch.is_grad_enabled():
            residual = x.clone()  # the backward of norm1 needs x as it was
        else:
            residual = x
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
        out_frames = (frames - 1) * self.time_factor + 1
        out = x.new_empty(batch, channels, out_frames, 2 * rows, 2 * columns)
        for time_phase, time_weight, time_padding in self._time_phases(self.conv.conv.weight, frames):
            for row, row_weight, row_padding in _doubling_phases(time_weight, 3):
                for column, weight, column_padding in _doubling_phases(row_weight, 4):
                    convolve(
                        ConvInput(x),
                        weight,
                        self.conv.conv.bias,
                        out[:, :, time_phase, row::2, column::2],
                        padding=(time_padding, row_padding, column_padding),
                        chunk_size=self.conv.chunk_size,
                    )
        return out

    def _time_phases(self, weight: torch.Tensor, frames: int) -> list[tuple[slice, torch.Tensor, Padding]]:
        """Which output frames, with which kernel and padding. Output frame t shows input frame (t + 1) // 2."""
        if self.time_factor == 1 or frames == 1:
            return [(slice(None), weight, self.conv.padding[0])]
        first, second, third = weight.split(1, dim=2)
        return [
            (slice(0, None, 2), torch.cat([first, second + third], dim=2), (1, 0)),
            (slice(1, None, 2), torch.cat([first + second, third], dim=2), (0, 0)),
        ]


def _doubling_phases(weight: torch.Tensor, dim: int) -> list[tuple[int, torch.Tensor, Padding]]:
    """The even and odd outputs of a 3-tap kernel over a doubled axis, as 2-tap kernels over the axis itself."""
    first, second, third = weight.split(1, dim=dim)
    return [
        (0, torch.cat([first, second + third], dim=dim), (1, 0)),
        (1, torch.cat([first + second, third], dim=dim), (0, 1)),
    ]


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
