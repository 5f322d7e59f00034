"""Pictures or clips side by side in a grid, with labels of columns and rows and a few words to each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from utils.sheets.text import Lettering

TEXT_COLOUR, EMPTY_COLOUR, FAILED_COLOUR = "#202020", "#e8e8e8", "#d00000"
NARROWEST = 9  # cells, in letters of full width: words must fit below them
TEXT_SIZES = (13, 22)  # the smallest and the largest, in pixels
WIDTH, SIDES = 2400, (160, 512)  # of a sheet, where that leaves its cells such a side, in pixels


class Cell(NamedTuple):
    """Frames (T, H, W, 3) uint8, None for an empty cell; what to write below them; whether to put them in a red frame."""

    frames: np.ndarray | None
    caption: str = ""
    failed: bool = False


def cell_side(columns: int) -> int:
    """Pixels of the longer side of the cells of a sheet with so many columns."""
    return min(max(WIDTH // columns, SIDES[0]), SIDES[1])


def reduced(frames: np.ndarray, side: int) -> np.ndarray:
    """Frames (T, H, W, 3) with no side above ``side`` pixels; smaller ones as they are."""
    height, width = frames.shape[1:3]
    if max(height, width) <= side:
        return frames
    size = tuple(max(1, round(length * side / max(height, width))) for length in (width, height))
    pictures = (Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0) for frame in frames)
    return np.stack([np.asarray(picture) for picture in pictures])


def enlarged(frame: np.ndarray, side: int) -> np.ndarray:
    """A small frame (H, W, 3) times a whole number: as large as the smallest cell, but with no side above ``side`` pixels.

    Not larger, as encoding a video of the sheet takes memory for each pixel.
    """
    largest = max(frame.shape[:2])
    zoom = max(1, min(side // largest, -(-SIDES[0] // largest)))
    return frame.repeat(zoom, 0).repeat(zoom, 1)


@dataclass(frozen=True)
class ContactSheet:
    """A grid of cells, whose frames are enlarged by whole numbers up to ``side`` pixels, or reduced to it.

    Attributes:
        rows: may differ in length.
        side: of the longer side of a cell.
        column_labels, row_labels: one for each, or none.
        title: what concerns all cells.
    """

    rows: Sequence[Sequence[Cell]]
    side: int
    column_labels: Sequence[str] = ()
    row_labels: Sequence[str] = ()
    title: str = ""

    @property
    def length(self) -> int:
        """Frames of the longest clip."""
        return max((len(cell.frames) for row in self.rows for cell in row if cell.frames is not None), default=1)

    def picture(self) -> np.ndarray:
        """The sheet (H, W, 3) with the middle frame of each clip."""
        return self._with(lambda frames: frames[len(frames) // 2])

    def clip(self) -> Iterator[np.ndarray]:
        """The sheet (H, W, 3) frame by frame: all cells in step, shorter clips with their last frame. Sides are even."""
        for number in range(self.length):
            yield self._with(lambda frames, number=number: frames[min(number, len(frames) - 1)])

    def _with(self, frame_of: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        canvas, placed = self._layout
        canvas = canvas.copy()
        for frames, left, top in placed:
            frame = enlarged(frame_of(frames), self.side)
            canvas[top : top + frame.shape[0], left : left + frame.shape[1]] = frame
        return canvas

    @cached_property
    def _layout(self) -> tuple[np.ndarray, list[tuple[np.ndarray, int, int]]]:
        """The sheet without its pictures; and the frames, left and top of each of them."""
        rows = [[None if cell.frames is None else reduced(cell.frames, self.side) for cell in row] for row in self.rows]
        sizes = [enlarged(frames[0], self.side).shape for row in rows for frames in row if frames is not None]
        height = max((size[0] for size in sizes), default=self.side)
        picture_width = max((size[1] for size in sizes), default=self.side)
        letters = Lettering.of_size(min(max(self.side // 16, TEXT_SIZES[0]), TEXT_SIZES[1]))
        gap, line = letters.fonts.size, letters.line_height
        width = max(picture_width, NARROWEST * gap)

        texts, boxes, placed = [], [], []  # lines with left, top and, if centred, width; corners with colour and whether filled
        labels = [letters.wrapped(label, width) for label in self.row_labels]
        label_width = max((math.ceil(letters.length(text)) for label in labels for text in label), default=-gap)
        lefts = [2 * gap + label_width + column * (width + gap) for column in range(max(map(len, self.rows)))]
        right = lefts[-1] + width
        title = letters.wrapped(self.title, right - gap) if self.title else []
        texts.append((title, gap, gap, None))
        top = gap + len(title) * line + (gap if title else 0)
        heads = [letters.wrapped(label, width) for label in self.column_labels]
        tallest = max(map(len, heads), default=0)
        texts += [(head, left, top + (tallest - len(head)) * line, width) for head, left in zip(heads, lefts)]
        top += tallest * line
        for number, row in enumerate(rows):
            label = labels[number] if labels else []
            texts.append((label, gap, top + max(0, height - len(label) * line) // 2, None))
            captions = [letters.wrapped(cell.caption, width) if cell.caption else [] for cell in self.rows[number]]
            for cell, frames, left, caption in zip(self.rows[number], row, lefts, captions):
                texts.append((caption, left, top + height + 3, width))
                size = (height, picture_width) if frames is None else enlarged(frames[0], self.side).shape
                x, y = left + (width - size[1]) // 2, top + (height - size[0]) // 2
                if frames is None:
                    boxes.append((x, y, x + size[1] - 1, y + size[0] - 1, EMPTY_COLOUR))
                else:
                    placed.append((frames, x, y))
                if cell.failed:
                    boxes.append((x - 3, y - 3, x + size[1] + 2, y + size[0] + 2, FAILED_COLOUR))
            top += max(height + 3 + max(map(len, captions), default=0) * line, len(label) * line) + gap

        canvas = Image.new("RGB", (right + gap + (right + gap) % 2, top + top % 2), "white")
        for *corners, colour in boxes:
            filled = colour == EMPTY_COLOUR
            ImageDraw.Draw(canvas).rectangle(corners, fill=colour if filled else None, outline=colour, width=3)
        for lines, left, upper, centred_in in texts:
            for number, text in enumerate(lines):
                indent = (centred_in - letters.length(text)) / 2 if centred_in else 0
                letters.write(canvas, left + indent, upper + number * line, text, TEXT_COLOUR)
        return np.asarray(canvas), placed
