"""Running a network on overlapping square tiles of a clip and joining the results."""

from __future__ import annotations

from collections.abc import Callable

import torch


def run_in_tiles(run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, tile: int, tile_out: int) -> torch.Tensor:
    """``run`` on tiles of ``x`` (B, C, T, H, W) with a side of ``tile``, of which it makes tiles with a side of ``tile_out``.

    Tiles start every three quarters of a tile and are blended linearly over the last quarter, first with the one above, then with
    the one to the left, each as it is after blending. Of tiles already done only their blended edges are kept beside the
    result, so memory is the result and one tile. A clip no larger than one tile is run as it is.
    """
    height, width = x.shape[3:]
    if height <= tile and width <= tile:
        return run(x)
    step, kept = tile * 3 // 4, tile_out * 3 // 4
    overlap = tile_out - kept
    out = None
    above: list[torch.Tensor] = []
    for row, top in enumerate(range(0, height, step)):
        edges_below: list[torch.Tensor] = []
        left_edge = None
        for column, left in enumerate(range(0, width, step)):
            done = run(x[:, :, :, top : top + tile, left : left + tile])
            if above:
                _blend(above[column], done, dim=3)
            if left_edge is not None:
                _blend(left_edge, done, dim=4)
            edges_below.append(done[:, :, :, -overlap:].clone())
            left_edge = done[:, :, :, :, -overlap:].clone()
            if out is None:
                out = done.new_empty(*done.shape[:3], height * tile_out // tile, width * tile_out // tile)
            place = out[:, :, :, row * kept : (row + 1) * kept, column * kept : (column + 1) * kept]
            place.copy_(done[:, :, :, : place.shape[3], : place.shape[4]])
            del done  # before the next one is made
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
