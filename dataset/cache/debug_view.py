"""Look at what training will see: contact sheets as PNG files, clips as MP4 files, and pictures in the terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from dataset.cache.preparation import Failure, Prepared, prepare
from dataset.items import Item
from dataset.media.frame_rate import MODEL_FPS
from utils.errors import UserError
from utils.media.writing import save_picture, save_video
from utils.output import show

SHEET_FRAMES = 16  # frames of a clip shown on its sheet
SHADES = " .:-=+*#%@"  # from dark to bright
CONSOLE_BACKS = ("BLACK", "RED", "GREEN", "YELLOW", "BLUE", "MAGENTA", "CYAN", "WHITE")  # in the order of the ANSI codes from 40 on
RESET = "\x1b[0m"
CONSOLE_WIDTH = 80


@dataclass(frozen=True)
class ViewSettings:
    """The flags of looking at the data: ``debug_mode`` is "html", "image", "video", "console", or None to cache instead."""

    debug_mode: str | None = None
    console_width: int | None = None
    console_back: str | None = None
    console_num_images: int | None = None
    preview_latents: bool = False

    def __post_init__(self) -> None:
        if self.preview_latents and self.debug_mode != "html":
            raise UserError("--preview_latents is a way of looking at the data: give --debug_mode html, too.")


def show_items(items: Sequence[Item], view: ViewSettings, num_workers: int) -> list[Failure]:
    """Write or print every picture and window as training will see it; returns the items that could not be read."""
    failures, shown = [], 0
    colours = sys.stdout.isatty() or "FORCE_COLOR" in os.environ  # a file or a pipe would keep the codes as text
    for result in prepare(items, num_workers):
        if isinstance(result, Failure):
            failures.append(result)
        elif isinstance(result, Prepared):
            show(describe(result))
            if view.debug_mode == "console":
                print(console_picture(result.pixels, view.console_width or CONSOLE_WIDTH, view.console_back, colours))
                shown += 1
                if shown == view.console_num_images:
                    break
            else:
                show(f"    {save_view(result, as_video=view.debug_mode == 'video')}")
    return failures


def describe(prepared: Prepared) -> str:
    """One line: file, frames, sizes and caption."""
    target = prepared.target
    sizes = " -> ".join(f"{width}x{height}" for width, height in (target.original_size, target.bucket))
    caption = "(no caption)" if target.item.caption is None else repr(target.item.caption)
    return f"{target.label}: {sizes}, {caption}"


def contact_sheet(pixels: np.ndarray) -> np.ndarray:
    """Frames (F, H, W, 3) side by side on a grid that is about as wide as high: at most 16 of them, first and last included."""
    shown = pixels[np.unique(np.linspace(0, len(pixels) - 1, min(len(pixels), SHEET_FRAMES), dtype=int))]
    columns = int(np.ceil(np.sqrt(len(shown))))
    rows = -(-len(shown) // columns)
    shown = np.pad(shown, ((0, rows * columns - len(shown)), (0, 0), (0, 0), (0, 0)))
    _, height, width, _ = pixels.shape
    grid = shown.reshape(rows, columns, height, width, 3).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(grid.reshape(rows * height, columns * width, 3))


def save_view(prepared: Prepared, as_video: bool = False) -> Path:
    """Write a contact sheet into the folder ``debug`` of the cache directory, named like the cache file; returns its path.

    ``as_video``: of a clip its frames instead, at the speed that the model learns.
    """
    path = prepared.target.cache_path
    path = path.parent / "debug" / path.name.removesuffix(".safetensors")
    if as_video and prepared.target.window is not None:
        path = path.with_name(f"{path.name}.mp4")
        save_video(path, prepared.pixels, MODEL_FPS)
    else:
        path = path.with_name(f"{path.name}.png")
        save_picture(path, contact_sheet(prepared.pixels))
    return path


def console_picture(pixels: np.ndarray, columns: int, back: str | None = None, colours: bool = True) -> str:
    """The first frame of (F, H, W, 3) as text with 24-bit ANSI colours, ``columns`` characters wide.

    Without ``back`` every character is an upper half block, two pixels above each other. With the name of a colour in
    ``CONSOLE_BACKS`` the picture is made of characters of more or less ink on that background; without ``colours`` of these
    characters alone.
    """
    _, height, width, _ = pixels.shape
    rows = max(1, round(columns * height / width / 2))  # a character cell is about twice as high as wide
    # Text cells are averages of what they stand for, hence BOX.
    half_blocks = back is None and colours
    cells = (columns, 2 * rows) if half_blocks else (columns, rows)
    small = np.asarray(Image.fromarray(pixels[0]).resize(cells, Image.Resampling.BOX)).tolist()
    if not colours:
        return "\n".join("".join(map(_ink, row)) for row in small)
    if half_blocks:
        lines = (
            "".join(f"{_colour(38, upper)}{_colour(48, lower)}\u2580" for upper, lower in zip(small[row], small[row + 1]))
            for row in range(0, 2 * rows, 2)
        )
    else:
        ground = f"\x1b[{40 + CONSOLE_BACKS.index(back)}m"
        lines = (ground + "".join(f"{_colour(38, pixel)}{_ink(pixel)}" for pixel in row) for row in small)
    return "\n".join(line + RESET for line in lines)


def _colour(ground: int, rgb: Sequence[int]) -> str:
    """The escape for a colour in front (``ground`` 38) or behind (48)."""
    return f"\x1b[{ground};2;{rgb[0]};{rgb[1]};{rgb[2]}m"


def _ink(rgb: Sequence[int]) -> str:
    return SHADES[max(rgb) * len(SHADES) // 256]
