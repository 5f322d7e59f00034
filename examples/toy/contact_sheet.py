"""Pictures side by side with a few words to each."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from utils.files import atomic_path

DPI = 100
FONT_SIZE = 8  # points
LETTER = 6  # pixels that a letter takes on average
LINE = 14  # pixels that a line of text takes


class Cell(NamedTuple):
    """A picture (H, W, 3) uint8, what to write below it, and whether to put it in a red frame."""

    picture: np.ndarray
    caption: str = ""
    wrong: bool = False


def film_strip(clip: np.ndarray) -> np.ndarray:
    """The first, middle and last frame of a clip (T, H, W, 3) side by side, a single picture alone: (H, W', 3) uint8."""
    if len(clip) == 1:
        return clip[0]
    gap = np.full((clip.shape[1], 2, 3), 255, np.uint8)
    return np.concatenate([clip[0], gap, clip[len(clip) // 2], gap, clip[-1]], axis=1)


def save_contact_sheet(path: Path, rows: Sequence[Sequence[Cell]], row_labels: Sequence[str] = (), zoom: int = 2) -> None:
    """Write rows of pictures as PNG; rows may differ in length, and a pixel of a picture takes ``zoom`` pixels."""
    columns = max(map(len, rows))
    width = zoom * max(cell.picture.shape[1] for row in rows for cell in row)
    height = zoom * max(cell.picture.shape[0] for row in rows for cell in row)
    captions = [
        ["\n".join(textwrap.fill(line, width // LETTER) for line in cell.caption.split("\n")) for cell in row] for row in rows
    ]
    lines = max(caption.count("\n") + 1 for row in captions for caption in row)
    size = (columns * (width + LINE) + 2 * LINE, len(rows) * (height + LINE * (lines + 1)))
    figure = Figure(figsize=(size[0] / DPI, size[1] / DPI), dpi=DPI, layout="constrained")
    for axes_row, row, texts in zip(figure.subplots(len(rows), columns, squeeze=False), rows, captions):
        for axes in axes_row[len(row) :]:
            axes.set_axis_off()
        for axes, cell, text in zip(axes_row, row, texts):
            axes.imshow(cell.picture, interpolation="nearest")
            axes.set_xlabel(text, fontsize=FONT_SIZE)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set(visible=cell.wrong, color="red", linewidth=2)
    for label, axes_row in zip(row_labels, figure.axes[::columns]):
        axes_row.set_ylabel(label, fontsize=FONT_SIZE)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
