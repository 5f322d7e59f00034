"""Convolutions over clips, computed piece by piece.

A convolution asks for some frames of its input; they are normalised, activated and padded on the way into a small buffer, and
the result goes straight into its place in the output. So no layer holds a padded or normalised copy of the whole clip, and the
pieces give what one convolution would. All tensors are (B, C, T, H, W).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from hunyuan_model.vae.cpu_kernels import by_onednn, convolution, memory_format

PIECE_ELEMENTS = {"cpu": 2**20, "cuda": 2**23}
"""Numbers in one piece of what is computed at a time: small beside a clip, large beside a call."""

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
        if self.scale is None:
            return window
        return F.silu(torch.addcmul(self.shift, window, self.scale), inplace=True).to(window.dtype)

    def read_into(self, target: torch.Tensor, frames: slice, columns: slice) -> None:
        """Write the window to ``target`` (B, C, t, H, w), without a float32 copy of more than a piece."""
        window = self.tensor[:, :, frames, :, columns]
        if self.scale is None:
            target.copy_(window)
        elif window.dtype == torch.float32:
            F.silu(torch.addcmul(self.shift, window, self.scale, out=target), inplace=True)
        else:
            scale, shift = self.scale[:, :, 0], self.shift[:, :, 0]
            for part, place in zip(_bands(window), _bands(target)):
                place.copy_(F.silu(torch.addcmul(shift, part, scale), inplace=True))


def normalised(x: torch.Tensor, norm: nn.GroupNorm) -> ConvInput:
    """``silu(norm(x))`` as a convolution's input: statistics of all of ``x`` in float32, the values window by window."""
    mean, variance = group_statistics(x, norm.num_groups)  # (B, groups)
    scale = torch.rsqrt(variance + norm.eps).repeat_interleave(x.shape[1] // norm.num_groups, dim=1) * norm.weight.float()
    shift = norm.bias.float() - mean.repeat_interleave(x.shape[1] // norm.num_groups, dim=1) * scale
    return ConvInput(x, scale[:, :, None, None, None], shift[:, :, None, None, None])


def group_statistics(x: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and (biased) variance of each group of channels over all frames and positions: two float32 (B, groups).

    The variance is taken around the mean: a sum of squares minus a squared mean would lose the small variances of bright, flat
    images.
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
    rows = max(1, piece_elements(x.device.type) * x.shape[3] // max(x[:, :, 0].numel(), 1))
    for frame in x.unbind(2):
        yield from frame.split(rows, dim=2)


def piece_elements(device_type: str) -> int:
    """``PIECE_ELEMENTS`` of a device."""
    return PIECE_ELEMENTS.get(device_type, PIECE_ELEMENTS["cuda"])


def frames_at_once(device_type: str, dtype: torch.dtype, values: int) -> int:
    """Frames that one call of a convolution makes, which reads or makes ``values`` numbers for each."""
    return max(1, piece_elements(device_type) // values) if by_onednn(device_type, dtype) else 1


def empty_beside(x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """An output (B, C, T, H, W) of the dtype and on the device of ``x``, laid out as convolutions compute it."""
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x, shape[1]))


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

    Frames are computed a few at a time, and columns ``chunk_size`` at a time where it is given. In time there is padding in
    front only, and less of it than the kernel is long.

    Args:
        reuse_buffers: write each window over the one before it, as autograd could not follow.
    """
    (frames_in, _, columns_in), (frames_out, _, columns_out) = source.tensor.shape[2:], out.shape[2:]
    if frames_in == 1 and weight.shape[2] > 1:
        # Every tap in time falls on the one frame or on its replicas, so their sum is an exact 2D kernel.
        weight, padding = weight.sum(2, keepdim=True), ((0, 0), *padding[1:])
    (time_kernel, _, column_kernel), (time_stride, _, column_stride) = weight.shape[2:], stride
    per_frame = max(source.tensor[:, :, 0].numel() * time_stride, out[:, :, 0].numel())
    frames = _slices(frames_out, frames_at_once(out.device.type, out.dtype, per_frame))
    spans = [(piece.start * time_stride, (piece.stop - 1) * time_stride + time_kernel) for piece in frames]
    for columns in _slices(columns_out, chunk_size or columns_out):
        first = columns.start * column_stride - padding[2][0]
        end = (columns.stop - 1) * column_stride - padding[2][0] + column_kernel
        read = slice(max(first, 0), min(end, columns_in))
        edges = (*padding[:2], (max(-first, 0), max(end - columns_in, 0)))
        for piece, window in zip(frames, _windows(source, read, edges, spans, reuse_buffers)):
            result = convolution(window, weight, bias, stride)
            target = out[:, :, piece, :, columns]
            if accumulate:
                target.add_(result)
            else:
                target.copy_(result)
            del window, result  # before the next ones are made


def _slices(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _windows(
    source: ConvInput, columns: slice, padding: tuple[Padding, Padding, Padding], spans: Sequence[tuple[int, int]], reuse: bool
) -> Iterator[torch.Tensor]:
    """Padded frames of a convolution's input, for each span from one frame to another, counted with the padding in front.

    With ``reuse`` they stand in one buffer, in which the frames that the next window needs again move to the front: each frame
    is normalised and padded once, and a window holds until the next one is asked for.
    """
    x, ((lead, _), (above, below), (left, right)) = source.tensor, padding
    padded = any((lead, above, below, left, right))
    if not reuse or (source.scale is None and not padded):
        for start, stop in spans:
            window = source.read(slice(max(start - lead, 0), stop - lead), columns)
            if padded:
                window = F.pad(window, (left, right, above, below, max(lead - start, 0), 0), mode="replicate")
            yield window
            del window
        return
    batch, channels, _, rows, _ = x.shape
    width, most_frames = columns.stop - columns.start, max(stop - start for start, stop in spans)
    buffer = empty_beside(x, (batch, channels, most_frames, above + rows + below, left + width + right))
    held_start = held_stop = 0
    for start, stop in spans:
        kept = max(held_stop - start, 0)
        for index in range(kept):  # one by one: where they come from and go to may overlap
            buffer[:, :, index] = buffer[:, :, start - held_start + index]
        first = max(start + kept, lead)  # before it is padding
        new = buffer[:, :, first - start : stop - start]
        inner = new[:, :, :, above : above + rows, left : left + width]
        source.read_into(inner, slice(first - lead, stop - lead), columns)
        for dim, (before, after) in ((3, padding[1]), (4, padding[2])):
            end = new.shape[dim] - after
            new.narrow(dim, 0, before).copy_(new.narrow(dim, before, 1))
            new.narrow(dim, end, after).copy_(new.narrow(dim, end - 1, 1))
        buffer[:, :, kept : first - start] = new[:, :, :1]
        held_start, held_stop = start, stop
        yield buffer[:, :, : stop - start]
