"""Building blocks of the causal 3D VAE: convolutions, residual blocks, resampling and the middle attention.

Every layer that looks at its neighbourhood runs piece by piece: a convolution asks for some frames of its input, they are
normalised, activated and padded on the way into a small buffer, and the result goes straight into its place in the output.
So no layer ever holds a padded or normalised copy of the whole clip, and the pieces give what one convolution would.

All tensors are (B, C, T, H, W). Sizes and windows below are (T, H, W); a window of rows is never cut, only frames
and, on request, columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

NORM_EPS = 1e-6
PIECE_ELEMENTS = {"cpu": 2**20, "cuda": 2**23}
"""Numbers in one piece of a convolution's input or output (at least a frame): small beside a clip, large beside a call."""
FEWEST_CHANNELS_LAST = 8

Padding = tuple[int, int]
"""How many positions are replicated before the first and after the last one."""


@dataclass(frozen=True)
class ConvInput:
    """What a convolution reads: a tensor, or ``silu(tensor * scale + shift)``, computed window by window in float32.

    Attributes:
        scale, shift: both float32 (B, C, 1, 1, 1), or both None.
    """

    tensor: torch.Tensor
    scale: torch.Tensor | None = None
    shift: torch.Tensor | None = None

    def read(self, frames: slice, columns: slice) -> torch.Tensor:
        """The window (B, C, t, H, w), as autograd can follow it."""
        window = self.tensor[:, :, frames, :, columns]
        return window if self.scale is None else F.silu(self._normalised(window), inplace=True).to(window.dtype)

    def read_into(self, target: torch.Tensor, frames: slice, columns: slice) -> None:
        """Write the window to ``target`` (B, C, t, H, w), without a float32 copy of more than a piece."""
        window = self.tensor[:, :, frames, :, columns]
        if self.scale is None:
            target.copy_(window)
        elif window.dtype == torch.float32:
            F.silu(torch.addcmul(self.shift, window, self.scale, out=target), inplace=True)
        else:
            for part, place in zip(_bands(window), _bands(target)):
                place.copy_(F.silu(self._normalised(part.unsqueeze(2)), inplace=True).squeeze(2))

    def _normalised(self, window: torch.Tensor) -> torch.Tensor:
        return torch.addcmul(self.shift, window, self.scale)


def normalised(x: torch.Tensor, norm: nn.GroupNorm) -> ConvInput:
    """``silu(norm(x))`` as a convolution's input: statistics of all of ``x`` in float32, the values window by window."""
    mean, variance = group_statistics(x, norm.num_groups)  # (B, groups)
    scale = torch.rsqrt(variance + norm.eps).repeat_interleave(x.shape[1] // norm.num_groups, dim=1) * norm.weight.float()
    shift = norm.bias.float() - mean.repeat_interleave(x.shape[1] // norm.num_groups, dim=1) * scale
    return ConvInput(x, scale[:, :, None, None, None], shift[:, :, None, None, None])


def group_statistics(x: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and (biased) variance of each group of channels over all frames and positions: two float32 (B, groups).

    The variance is taken around the mean, piece by piece: a sum of squares minus a squared mean would lose the small
    variances of bright, flat images.
    """
    batch, channels = x.shape[:2]
    count = x[0].numel() // groups

    def over_groups(sums: list[torch.Tensor]) -> torch.Tensor:  # of (B, C)
        return torch.stack(sums).sum(0).view(batch, groups, -1).sum(2) / count

    mean = over_groups([band.sum((2, 3), dtype=torch.float32) for band in _bands(x)])
    centre = mean.repeat_interleave(channels // groups, dim=1)[:, :, None, None]
    return mean, over_groups([(band - centre).square_().sum((2, 3)) for band in _bands(x)])


def _bands(x: torch.Tensor) -> Iterator[torch.Tensor]:
    """The frames of ``x``, cut into rows where a frame is more than a piece: views (B, C, h, W)."""
    rows = max(1, _piece_elements(x) * x.shape[3] // max(x[:, :, 0].numel(), 1))
    for frame in x.unbind(2):
        yield from frame.split(rows, dim=2)


def _piece_elements(x: torch.Tensor) -> int:
    return PIECE_ELEMENTS.get(x.device.type, PIECE_ELEMENTS["cuda"])


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

    Frames are taken a few at a time, and columns ``chunk_size`` at a time where it is given. In time there is padding in
    front only, and less of it than the kernel is long.
    """
    time_stride, _, column_stride = stride
    frames_in, _, columns_in = source.tensor.shape[2:]
    if frames_in == 1 and weight.shape[2] > 1:
        # Every tap in time falls on the one frame or on its replicas, so their sum is an exact 2D kernel.
        weight, padding = weight.sum(2, keepdim=True), ((0, 0), *padding[1:])
    kernel = weight.shape[2:]
    per_frame = max(source.tensor[:, :, 0].numel() * time_stride, out[:, :, 0].numel())
    at_once = min(out.shape[2], max(1, _piece_elements(out) // per_frame))
    for columns in _pieces(out.shape[4], chunk_size or out.shape[4]):
        read_columns, pad_columns = _window(columns, column_stride, kernel[2], padding[2], columns_in)
        windows = _Windows(source, read_columns, (padding[0], padding[1], pad_columns), (at_once - 1) * time_stride + kernel[0])
        for frames in _pieces(out.shape[2], at_once):
            window = windows.read(frames.start * time_stride, (frames.stop - 1) * time_stride + kernel[0])
            result = _convolve_window(window, weight, bias, stride)
            target = out[:, :, frames, :, columns]
            if accumulate:
                target.add_(result)
            else:
                target.copy_(result)
            del window, result  # before the next ones are made
        del windows


class _Windows:
    """Padded frames of a convolution's input, a few at a time, always further on.

    They stand in one buffer, in which the frames that the next window needs again move to the front: each frame is normalised
    and padded once, and nothing is allocated between two windows. Frames are counted with the padding in front.
    """

    def __init__(self, source: ConvInput, columns: slice, padding: tuple[Padding, Padding, Padding], most_frames: int) -> None:
        self.source, self.columns, self.padding = source, columns, padding
        self.buffer: torch.Tensor | None = None
        self.held = slice(0, 0)
        plain = source.scale is None and not any((*padding[0], *padding[1], *padding[2]))
        if not plain and not torch.is_grad_enabled():
            x = source.tensor
            batch, channels, _, rows, _ = x.shape
            width = columns.stop - columns.start + sum(padding[2])
            shape = (batch, channels, most_frames, rows + sum(padding[1]), width)
            self.buffer = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout(x, channels))

    def read(self, start: int, stop: int) -> torch.Tensor:
        """The padded frames ``start`` to ``stop``; it holds until the next call, and may be a view of the input."""
        lead = self.padding[0][0]
        if self.buffer is None:
            window = self.source.read(slice(max(start - lead, 0), stop - lead), self.columns)
            return _replicate_edges(window, ((max(lead - start, 0), 0), *self.padding[1:]))
        kept = max(self.held.stop - start, 0)
        for index in range(kept):  # one by one: where they come from and go to may overlap
            self.buffer[:, :, index] = self.buffer[:, :, start - self.held.start + index]
        first = max(start + kept, lead)
        new = self.buffer[:, :, first - start : stop - start]
        (above, _), (left, _) = self.padding[1:]
        inner = new[:, :, :, above : above + self.source.tensor.shape[3], left : left + self.columns.stop - self.columns.start]
        self.source.read_into(inner, slice(first - lead, stop - lead), self.columns)
        for dim, (before, after) in ((3, self.padding[1]), (4, self.padding[2])):
            last = new.shape[dim] - after - 1
            new.narrow(dim, 0, before).copy_(new.narrow(dim, before, 1))
            new.narrow(dim, last + 1, after).copy_(new.narrow(dim, last, 1))
        if start + kept < lead:
            self.buffer[:, :, kept : lead - start] = self.buffer[:, :, lead - start : lead - start + 1]
        self.held = slice(start, stop)
        return self.buffer[:, :, : stop - start]


def layout(x: torch.Tensor, channels: int) -> torch.memory_format:
    """How a tensor of ``channels`` channels is laid out beside ``x``: as oneDNN computes it, so that it copies nothing.

    Only where no gradients are wanted, and not for the few channels of pictures.
    """
    suits = _by_onednn(x) and channels >= FEWEST_CHANNELS_LAST and not torch.is_grad_enabled()
    return torch.channels_last_3d if suits else torch.contiguous_format


def _by_onednn(x: torch.Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available()


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
    if _by_onednn(window):
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
        channels = self.conv.out_channels
        shape = (x.shape[0], channels, *size)
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout(x, channels))


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
        shape = (batch, channels, out_frames, 2 * rows, 2 * columns)
        out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout(x, channels))
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
