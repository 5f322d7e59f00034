"""Convolutions over clips, computed piece by piece.

A convolution asks for some frames of its input; they are normalised, activated and padded on the way into a small buffer, and
the result goes straight into its place in the output. So no layer holds a padded or normalised copy of the whole clip, and the
pieces give what one convolution would.

All tensors are (B, C, T, H, W). Sizes and windows below are (T, H, W); a window of rows is never cut, only frames
and, on request, columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from hunyuan_model.vae.cpu_kernels import convolution, memory_format

PIECE_ELEMENTS = {"cpu": 2**20, "cuda": 2**23}
"""Numbers in one piece of a convolution's input or output (at least a frame): small beside a clip, large beside a call."""

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
    reuse_buffers: bool = False,
) -> None:
    """Convolve ``source``, with replicated edges, into ``out`` (B, C_out, T, H, W), or onto it with ``accumulate``.

    Frames are taken a few at a time, and columns ``chunk_size`` at a time where it is given. In time there is padding in
    front only, and less of it than the kernel is long.

    Args:
        reuse_buffers: write each window over the one before it, as autograd could not follow.
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
        most_frames = (at_once - 1) * time_stride + kernel[0]
        windows = _Windows(source, read_columns, (padding[0], padding[1], pad_columns), most_frames, reuse_buffers)
        for frames in _pieces(out.shape[2], at_once):
            window = windows.read(frames.start * time_stride, (frames.stop - 1) * time_stride + kernel[0])
            result = convolution(window, weight, bias, stride)
            target = out[:, :, frames, :, columns]
            if accumulate:
                target.add_(result)
            else:
                target.copy_(result)
            del window, result  # before the next ones are made
        del windows


class _Windows:
    """Padded frames of a convolution's input, a few at a time, always further on.

    With ``reuse`` they stand in one buffer, in which the frames that the next window needs again move to the front: each frame
    is normalised and padded once, and nothing is allocated between two windows. Frames are counted with the padding in front.
    """

    def __init__(
        self, source: ConvInput, columns: slice, padding: tuple[Padding, Padding, Padding], most_frames: int, reuse: bool
    ) -> None:
        self.source, self.columns, self.padding = source, columns, padding
        self.buffer: torch.Tensor | None = None
        self.held = slice(0, 0)
        plain = source.scale is None and not any((*padding[0], *padding[1], *padding[2]))
        if reuse and not plain:
            x = source.tensor
            batch, channels, _, rows, _ = x.shape
            width = columns.stop - columns.start + sum(padding[2])
            shape = (batch, channels, most_frames, rows + sum(padding[1]), width)
            self.buffer = empty_beside(x, shape)

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


def empty_beside(x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """An output (B, C, T, H, W) of the dtype and on the device of ``x``, laid out as convolutions compute it."""
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x, shape[1]))


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
