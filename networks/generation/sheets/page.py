"""The page of a batch: its contact sheet with clips that play, and to each result its settings and the commands that make it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from networks.generation.record import command, command_again, facts, settings_of
from utils.media.metadata import PICTURE
from utils.pages.media import clip_uri, picture_uri
from utils.pages.page import render
from utils.sheets.contact_sheet import SIDES, enlarged

MOST_BYTES = 17 << 20  # about, of all pictures and clips of a page, as text
MOST_THREADS = 8


@dataclass(frozen=True)
class Shown:
    """One result.

    Attributes:
        frames: (T, H, W, 3) uint8, as large as on the sheet; None where there are none.
        caption: lines below it.
        reason: why it was not made; empty where it was.
        path: its file or folder; None where it was not made.
        metadata: as of ``Recorder``; empty where they are to stand nowhere.
    """

    frames: np.ndarray | None
    caption: Sequence[str] = ()
    reason: str = ""
    path: Path | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class BatchPage:
    """What a page shows.

    Attributes:
        sheet: path of the contact sheet, beside which the page is.
        results: of the grid, each once.
        grid: numbers of results, by row and column.
        side: pixels of the longer side of a cell.
        column_labels, row_labels: one for each, or none.
        title: texts that concern all results.
        metadata: of the sheet.
    """

    sheet: Path
    results: Sequence[Shown]
    grid: Sequence[Sequence[int]]
    fps: int
    side: int
    column_labels: Sequence[str] = ()
    row_labels: Sequence[str] = ()
    title: Sequence[str] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)

    def html(self) -> str:
        """The page. The more clips there are, the coarser they are."""
        share = MOST_BYTES // sum(map(len, self.grid))
        with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as pool:
            media = list(pool.map(lambda result: self._media(result.frames, share), self.results))
        sizes = [enlarged(result.frames[0], self.side).shape for result in self.results if result.frames is not None]
        return render(
            Path(__file__).with_name("sheet.html.j2"),
            name=self.sheet.stem,
            title=self.title,
            columns=self.column_labels,
            rows=self.row_labels,
            grid=self.grid,
            cells=[
                {"caption": result.caption, "reason": result.reason, "picture": picture, "clip": clip}
                for result, (picture, clip) in zip(self.results, media)
            ],
            cell_width=max((size[1] for size in sizes), default=self.side),
            enlarged=any(result.frames is not None and max(result.frames.shape[1:3]) < SIDES[0] for result in self.results),
            ratio="{1} / {0}".format(*next(iter(sizes), (1, 1))),
            details=[self._details(result) for result in self.results],
            failures=sum(bool(result.reason) for result in self.results),
            commands=self._commands(),
            random=(settings_of(self.metadata) or {}).get("random") == ["seed"],
        )

    def _media(self, frames: np.ndarray | None, share: int) -> tuple[str, str]:
        """Data URIs of the middle frame and of the clip, with about ``share`` bytes; empty where there is none."""
        if frames is None:
            return "", ""
        picture = picture_uri(frames[len(frames) // 2], self.side)
        return picture, clip_uri(frames, self.fps, self.side, most_bytes=share - len(picture)) if len(frames) > 1 else ""

    def _details(self, result: Shown) -> dict[str, Any]:
        """What the page shows of a single result, in JSON."""
        details = {"reason": result.reason, "facts": facts(result.metadata), "whole": command_again(result.metadata, self._folder)}
        if result.path is not None and not result.reason:
            path = result.path / PICTURE if result.path.is_dir() else result.path
            details["file"], details["href"] = self._link(path)
            details["repeat"] = command({"repeat": str(path)}) if result.metadata else None
        return details

    @property
    def _folder(self) -> Path:
        """Where the results are."""
        return next((result.path for result in self.results if result.path is not None), self.sheet).parent

    def _link(self, path: Path) -> tuple[str, str]:
        """As it is named, and as a URL, from the page's folder."""
        try:
            name = Path(os.path.relpath(path, self.sheet.parent)).as_posix()
        except ValueError:  # on another drive of Windows
            return str(path.absolute()), path.absolute().as_uri()
        return name, quote(os.fsencode(name))

    def _commands(self) -> list[tuple[str, str]]:
        """Of the whole batch, with what they are."""
        whole = command_again(self.metadata, self._folder)
        return [("From the contact sheet", command({"repeat": str(self.sheet)})), ("With all its flags", whole)] if whole else []
