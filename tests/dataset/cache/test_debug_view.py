"""Contact sheets and terminal pictures show the pixels they are given."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from dataset.cache.debug_view import SHADES, console_picture, contact_sheet, describe
from dataset.cache.preparation import Prepared, Target
from dataset.config import DatasetConfig
from dataset.items import Item

COLOUR = re.compile(r"\x1b\[(38|48);2;(\d+);(\d+);(\d+)m")


def grey_clip(frames: int, height: int = 4, width: int = 6) -> np.ndarray:
    return np.arange(frames, dtype=np.uint8)[:, None, None, None] * np.ones((1, height, width, 3), np.uint8)


def prepared_clip(folder: Path, caption: str | None) -> Prepared:
    item = Item(DatasetConfig(0, "video", folder, None, folder), folder / "a_b.mp4", caption, "a_b")
    return Prepared(Target(item, (3, 5), (640, 480), (6, 4)), grey_clip(5), {})


@pytest.mark.parametrize(("frames", "grid", "last"), [(1, (1, 1), 0), (5, (2, 3), 4), (129, (4, 4), 128)])
def test_sheet_shows_frames_from_first_to_last(frames, grid, last):
    sheet = contact_sheet(grey_clip(frames))
    assert sheet.shape == (grid[0] * 4, grid[1] * 6, 3)
    shown = sheet[::4, ::6, 0].ravel()[: min(frames, 16)].tolist()
    assert shown[0] == 0 and shown[-1] == last and shown == sorted(set(shown))


def test_description_tells_frames_sizes_and_caption(tmp_path):
    assert describe(prepared_clip(tmp_path, "a cat")) == f"{tmp_path / 'a_b.mp4'} frames 3 to 7: 640x480 -> 6x4, 'a cat'"
    assert describe(prepared_clip(tmp_path, None)).endswith("(no caption)")


def test_half_blocks_carry_two_pixels_each():
    pixels = np.random.default_rng(0).integers(0, 256, (1, 4, 4, 3), np.uint8)
    lines = console_picture(pixels, columns=4).split("\n")
    assert len(lines) == 2
    for row, line in enumerate(lines):
        colours = [tuple(map(int, match)) for match in COLOUR.findall(line)]
        assert colours[::2] == [(38, *pixel) for pixel in pixels[0, 2 * row].tolist()]
        assert colours[1::2] == [(48, *pixel) for pixel in pixels[0, 2 * row + 1].tolist()]
        assert line.count("\u2580") == 4 and line.endswith("\x1b[0m")


def test_characters_stand_on_the_background_asked_for():
    pixels = np.zeros((1, 8, 8, 3), np.uint8)
    pixels[0, :, 4:] = 255
    lines = console_picture(pixels, columns=8, back="RED").split("\n")
    assert len(lines) == 4
    for line in lines:
        assert line.startswith("\x1b[41m")  # ECMA-48: a red background
        assert COLOUR.sub("", line)[5:].removesuffix("\x1b[0m") == SHADES[0] * 4 + SHADES[-1] * 4


def test_width_is_the_one_asked_for_and_proportions_are_kept():
    lines = console_picture(np.zeros((1, 100, 200, 3), np.uint8), columns=40).split("\n")
    assert len(lines) == 10 and all(line.count("\u2580") == 40 for line in lines)
