"""The contact sheet of a batch, as files and as a page: its cells come as they are decoded."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np

from networks.generation.requests import Request
from networks.generation.sheets.page import BatchPage, Shown
from utils.errors import UserError, first_line
from utils.media.writing import save_picture, save_video
from utils.pages.page import write_page
from utils.sheets.contact_sheet import Cell, ContactSheet, cell_side, reduced

logger = logging.getLogger(__name__)

SEPARATOR = " · "


@dataclass
class BatchSheet:
    """Collects the results of a batch, reduced to what the sheet shows, and outside of memory.

    Attributes:
        path: of the PNG; a page stands beside it, and for clips an MP4.
        grid: the requests by row and column; a request may stand there several times.
        lora_weight: the LoRA files that the multipliers of the requests are for.
        column_labels, row_labels: without them the cells have captions.
        about: metadata besides what the results have in common.
    """

    path: Path
    grid: Sequence[Sequence[Request]]
    fps: int
    lora_weight: Sequence[str] = ()
    column_labels: Sequence[str] = ()
    row_labels: Sequence[str] = ()
    about: Mapping[str, str] = field(default_factory=dict)
    _frames: dict[Request, np.ndarray] = field(default_factory=dict)
    _paths: dict[Request, Path] = field(default_factory=dict)
    _failures: dict[Request, str] = field(default_factory=dict)

    @property
    def side(self) -> int:
        """Pixels of the longer side of a cell."""
        return cell_side(max(map(len, self.grid)))

    def add(self, request: Request, frames: np.ndarray, path: Path) -> None:
        """Keep the frames (T, H, W, 3) uint8 of a request, whose file or folder is ``path``."""
        self._paths[request] = path
        frames = np.ascontiguousarray(reduced(frames, self.side))
        with TemporaryFile() as file:
            file.write(frames.data)
            file.flush()
            self._frames[request] = np.memmap(file, np.uint8, "r", shape=frames.shape)

    def add_failure(self, request: Request, reason: str) -> None:
        """Its cell stays empty, with the reason."""
        self._failures[request] = reason

    def save(self, metadata: Mapping[str, str], of_each: Mapping[Request, Mapping[str, str]]) -> list[Path]:
        """Write the sheet with its metadata and, on its page, those of each result; returns the paths of what was written."""
        parts = {request: in_words(request, self.lora_weight) for row in self.grid for request in row}
        first = next(iter(parts.values()))
        shared = {name: text for name, text in first.items() if all(each.get(name) == text for each in parts.values())}
        others = SEPARATOR.join(text for name, text in shared.items() if name != "prompt")
        title = list(filter(None, (shared.get("prompt"), others)))
        captions = {
            request: [] if self.column_labels else [text for name, text in words.items() if name not in shared]
            for request, words in parts.items()
        }
        sheet = ContactSheet(
            [[self._cell(request, captions[request]) for request in row] for row in self.grid],
            self.side,
            self.column_labels,
            self.row_labels,
            "\n".join(title),
        )
        clips = [self.path.with_suffix(".mp4")] if sheet.length > 1 else []
        for clip in clips:
            save_video(clip, sheet.clip(), self.fps, dict(metadata))
        page_path = self.path.with_suffix(".html")
        places = {request: number for number, request in enumerate(captions)}
        page = BatchPage(
            self.path,
            [self._shown(request, caption, of_each.get(request, {})) for request, caption in captions.items()],
            [[places[request] for request in row] for row in self.grid],
            self.fps,
            self.side,
            self.column_labels,
            self.row_labels,
            title,
            metadata,
        )
        try:
            write_page(page_path, page.html())
            pages = [page_path]
        except (UserError, OSError) as error:  # the results matter more than their page
            logger.warning("%s is not written (%s); the contact sheet is.", page_path, first_line(error).rstrip("."))
            pages = []
        save_picture(self.path, sheet.picture(), dict(metadata))  # last: with it a restarted batch has its sheet
        return [self.path, *clips, *pages]

    def _cell(self, request: Request, caption: Sequence[str]) -> Cell:
        reason = [self._failures[request]] if request in self._failures else []
        return Cell(self._frames.get(request), "\n".join([*caption, *reason]), failed=bool(reason))

    def _shown(self, request: Request, caption: Sequence[str], metadata: Mapping[str, str]) -> Shown:
        frames, reason = self._frames.get(request), self._failures.get(request, "")
        return Shown(frames, caption, reason, self._paths.get(request), metadata)


def in_words(request: Request, lora_weight: Sequence[str]) -> dict[str, str]:
    """What made a result, by the names of flags."""
    sampling = request.sampling
    height, width = sampling.video_size
    parts = {
        "prompt": request.prompt,
        "seed": f"seed {sampling.seed}",
        "video_size": f"{width} x {height}",
        "video_length": f"{sampling.video_length} frames" if sampling.video_length > 1 else "",
        "infer_steps": f"{sampling.infer_steps} steps",
        "embedded_cfg_scale": f"guidance {sampling.embedded_cfg_scale:g}",
        "flow_shift": f"shift {sampling.flow_shift:g}",
        "guidance_scale": f"CFG {sampling.guidance_scale:g}" if sampling.guided else "",
        "negative_prompt": f"not: {request.negative_prompt}" if sampling.guided and request.negative_prompt else "",
        "start": f"from {Path(request.start).name}, strength {sampling.strength:g}" if request.start else "",
        "step_cache": f"step cache {sampling.step_cache:g}" if sampling.step_cache else "",
    }
    for path, multiplier in zip(lora_weight, request.lora_multiplier):
        parts[f"lora {path}"] = f"{Path(path).stem} x {multiplier:g}" if multiplier else ""
    return {name: text for name, text in parts.items() if text}
