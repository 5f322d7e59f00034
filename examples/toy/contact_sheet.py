"""Pictures side by side with a few words to each, drawn with Pillow."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GAP = 6  # pixels of the sheet, around every picture
FONT_SIZE = 11
LINE_HEIGHT = 14
LARGEST_LABEL = 150  # pixels; longer row labels go on in the next line
TEXT = (40, 40, 40)
WRONG = (230, 0, 0)
FRAME = 2  # pixels of the picture


def film_strip(clip: np.ndarray) -> np.ndarray:
    """The first, middle and last frame of a clip (T, H, W, 3) side by side, a single picture alone: (H, W', 3) uint8."""
    if len(clip) == 1:
        return clip[0]
    gap = np.full((clip.shape[1], 2, 3), 255, np.uint8)
    return np.concatenate([clip[0], gap, clip[len(clip) // 2], gap, clip[-1]], axis=1)


def framed(picture: np.ndarray, colour: tuple[int, int, int] = WRONG) -> np.ndarray:
    """``picture`` (H, W, 3) uint8 within a thin frame of ``colour``: (H + 4, W + 4, 3)."""
    height, width = picture.shape[:2]
    result = np.empty((height + 2 * FRAME, width + 2 * FRAME, 3), np.uint8)
    result[:] = colour
    result[FRAME:-FRAME, FRAME:-FRAME] = picture
    return result


def contact_sheet(
    rows: Sequence[Sequence[np.ndarray]],
    row_labels: Sequence[str] = (),
    captions: Sequence[Sequence[str]] | None = None,
    zoom: int = 2,
) -> np.ndarray:
    """Rows of pictures on white.

    Args:
        rows: pictures (H, W, 3) uint8; they may differ in size, and rows in length.
        row_labels: what to write left of each row; none, or one for each.
        captions: what to write below each picture, in rows as the pictures are; wrapped to the picture's width.
        zoom: pixels of the sheet, in either direction, for a pixel of a picture.

    Returns:
        the sheet (H, W, 3) uint8.
    """
    if row_labels and len(row_labels) != len(rows):
        raise ValueError(f"{len(row_labels)} labels for {len(rows)} rows")
    if captions is not None and [len(row) for row in captions] != [len(row) for row in rows]:
        raise ValueError("captions must be in rows as the pictures are")
    if not any(len(row) for row in rows):
        raise ValueError("no pictures")
    font = ImageFont.load_default(FONT_SIZE)
    cell = zoom * max(picture.shape[1] for row in rows for picture in row)
    texts = [[wrapped(text, font, cell) for text in row] for row in captions] if captions is not None else []
    labels = [wrapped(label, font, LARGEST_LABEL) for label in row_labels]
    left = GAP + (max(_width(line, font) for label in labels for line in label) + GAP if labels else 0)
    heights = [max((zoom * picture.shape[0] for picture in row), default=0) for row in rows]
    lines = [max((len(text) for text in row), default=0) for row in texts] or [0] * len(rows)
    bottoms = np.cumsum([height + LINE_HEIGHT * count + GAP for height, count in zip(heights, lines)])

    sheet = Image.new("RGB", (left + max(map(len, rows)) * (cell + GAP), GAP + int(bottoms[-1])), "white")
    draw = ImageDraw.Draw(sheet)
    for index, row in enumerate(rows):
        top = GAP + (int(bottoms[index - 1]) if index else 0)
        for column, picture in enumerate(row):
            x = left + column * (cell + GAP)
            size = (zoom * picture.shape[1], zoom * picture.shape[0])
            sheet.paste(Image.fromarray(np.ascontiguousarray(picture)).resize(size, Image.Resampling.NEAREST), (x, top))
            if texts:
                _write(draw, x, top + heights[index], texts[index][column], font)
        if labels:
            _write(draw, GAP, top, labels[index], font)
    return np.array(sheet)


def wrapped(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> list[str]:
    """``text`` in lines of at most ``width`` pixels, broken between words where that is possible, and at line breaks."""
    lines = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}" if line else word
            if line and _width(longer, font) > width:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
    return lines


def _width(line: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> int:
    return int(np.ceil(font.getlength(line)))


def _write(draw: ImageDraw.ImageDraw, x: int, y: int, lines: list[str], font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> None:
    for number, line in enumerate(lines):
        draw.text((x, y + LINE_HEIGHT * number), line, fill=TEXT, font=font)
