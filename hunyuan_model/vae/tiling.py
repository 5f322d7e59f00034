"""Running a network on overlapping tiles of a clip and joining the results.

Tiles start every three quarters of a tile and are blended linearly over the last quarter. Of tiles already done only
their blended edges are kept beside the result, so memory is the result and one tile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


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


def run_in_tiles(run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, tile: TileSize) -> torch.Tensor:
    """``run`` on square tiles of ``x`` (B, C, T, H, W); one call on all of it where it is no larger than one tile.

    A tile is blended first with the one above it, then with the one to its left, each as it is after blending.
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
            tile_out = run(x[:, :, :, top : top + tile.input, left : left + tile.input])
            if above:
                _blend(above[column], tile_out, dim=3)
            if left_edge is not None:
                _blend(left_edge, tile_out, dim=4)
            edges_below.append(tile_out[:, :, :, -tile.overlap :].clone())
            left_edge = tile_out[:, :, :, :, -tile.overlap :].clone()
            if out is None:
                out = tile_out.new_empty(*tile_out.shape[:3], tile.scaled(height), tile.scaled(width))
            kept = tile_out[:, :, :, : tile.output_step, : tile.output_step]
            row, col = tile.scaled(top), tile.scaled(left)
            out[:, :, :, row : row + kept.shape[3], col : col + kept.shape[4]] = kept
            del tile_out, kept  # before the next one is made
        above = edges_below
    return out


def _blend(before: torch.Tensor, tile: torch.Tensor, dim: int) -> None:
    """Fade from the end of ``before`` into the start of ``tile`` along ``dim``, in place: the tile's weight is k / n."""
    length = min(before.shape[dim], tile.shape[dim])
    shape = [1] * tile.dim()
    shape[dim] = length
    weight = (torch.arange(length, device=tile.device) / length).to(tile.dtype).view(shape)
    start = tile.narrow(dim, 0, length)
    start.copy_(torch.lerp(before.narrow(dim, before.shape[dim] - length, length), start, weight))
