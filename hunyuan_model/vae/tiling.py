"""Running a network on overlapping tiles of a clip and joining the results: squares in space, stretches in time.

Tiles start every three quarters of a tile and are blended linearly over the last quarter. Of tiles already done only
their blended edges are kept beside the result, so memory is the result and one tile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

Run = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class TileSize:
    """Length of a tile in the network's input and in its output; both divisible by 4. Their ratio scales lengths."""

    input: int
    output: int

    @property
    def input_step(self) -> int:
        return self.input * 3 // 4

    @property
    def output_step(self) -> int:
        return self.output * 3 // 4

    @property
    def overlap(self) -> int:
        """Length of the blended part, in the output."""
        return self.output - self.output_step

    def scaled(self, length: int) -> int:
        return length * self.output // self.input


def run_in_squares(run: Run, x: torch.Tensor, tile: TileSize) -> torch.Tensor:
    """``run`` on squares of ``x`` (B, C, T, H, W); one call on all of it where it is no larger than one tile.

    A square is blended first with the one above it, then with the one to its left, each as it is after blending.
    """
    height, width = x.shape[3:]
    if height <= tile.input and width <= tile.input:
        return run(x)
    out = None
    above: list[torch.Tensor] = []
    for top in range(0, height, tile.input_step):
        edges_below: list[torch.Tensor] = []
        left_edge = None
        for column, left in enumerate(range(0, width, tile.input_step)):
            square = run(x[:, :, :, top : top + tile.input, left : left + tile.input])
            if above:
                _blend(above[column], square, dim=3)
            if left_edge is not None:
                _blend(left_edge, square, dim=4)
            edges_below.append(square[:, :, :, -tile.overlap :].clone())
            left_edge = square[:, :, :, :, -tile.overlap :].clone()
            if out is None:
                out = square.new_empty(*square.shape[:3], tile.scaled(height), tile.scaled(width))
            kept = square[:, :, :, : tile.output_step, : tile.output_step]
            row, col = tile.scaled(top), tile.scaled(left)
            out[:, :, :, row : row + kept.shape[3], col : col + kept.shape[4]] = kept
            del square, kept  # before the next one is made
        above = edges_below
    return out


def run_in_stretches(run: Run, x: torch.Tensor, tile: TileSize) -> torch.Tensor:
    """``run`` on stretches of frames of ``x`` (B, C, T, H, W), for networks that treat the first frame alone.

    Every stretch has one frame more than a tile, in front; what comes of it is dropped, but for the first stretch.
    One call on all of ``x`` where it has no more frames than one tile.
    """
    frames = x.shape[2]
    if frames <= tile.input:
        return run(x)
    out = before = None
    for start in range(0, frames - 1, tile.input_step):
        stretch = run(x[:, :, start : start + tile.input + 1])
        if out is None:
            out = stretch.new_empty(*stretch.shape[:2], tile.scaled(frames - 1) + 1, *stretch.shape[3:])
            out[:, :, 0] = stretch[:, :, 0]
        stretch = stretch[:, :, 1:]
        if before is not None:
            _blend(before, stretch, dim=2)
        before = stretch[:, :, -tile.overlap :].clone()
        kept = stretch[:, :, : tile.output_step]
        position = tile.scaled(start) + 1
        out[:, :, position : position + kept.shape[2]] = kept
        del stretch, kept  # before the next one is made
    return out


def _blend(before: torch.Tensor, tile: torch.Tensor, dim: int) -> None:
    """Fade from the end of ``before`` into the start of ``tile`` along ``dim``, in place: the tile's weight is k / n."""
    length = min(before.shape[dim], tile.shape[dim])
    shape = [1] * tile.dim()
    shape[dim] = length
    weight = (torch.arange(length, device=tile.device) / length).to(tile.dtype).view(shape)
    start = tile.narrow(dim, 0, length)
    start.copy_(torch.lerp(before.narrow(dim, before.shape[dim] - length, length), start, weight))
