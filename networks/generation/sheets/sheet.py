"""The contact sheet of a batch: its cells come as they are decoded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np

from networks.generation.requests import Request
from utils.media.writing import save_picture, save_video
from utils.sheets.contact_sheet import Cell, ContactSheet, cell_side, reduced

SEPARATOR = " · "


@dataclass
class BatchSheet:
    """Collects the results of a batch, reduced to what the sheet shows, and outside of memory.

    Attributes:
        path: of the PNG; clips become an MP4 beside it as well.
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
    _failures: dict[Request, str] = field(default_factory=dict)

    @property
    def side(self) -> int:
        """Pixels of the longer side of a cell."""
        return cell_side(max(map(len, self.grid)))

    def add(self, request: Request, frames: np.ndarray) -> None:
        """Keep the frames (T, H, W, 3) uint8 of a request."""
        frames = np.ascontiguousarray(reduced(frames, self.side))
        with TemporaryFile() as file:
            file.write(frames.data)
            file.flush()
            self._frames[request] = np.memmap(file, np.uint8, "r", shape=frames.shape)

    def add_failure(self, request: Request, reason: str) -> None:
        """Its cell stays empty, with the reason."""
        self._failures[request] = reason

    def save(self, metadata: Mapping[str, str]) -> list[Path]:
        """Write the sheet; returns the paths of what was written."""
        parts = {request: in_words(request, self.lora_weight) for row in self.grid for request in row}
        first = next(iter(parts.values()))
        shared = {name: text for name, text in first.items() if all(each.get(name) == text for each in parts.values())}
        others = SEPARATOR.join(text for name, text in shared.items() if name != "prompt")
        sheet = ContactSheet(
            [[self._cell(request, parts[request], shared) for request in row] for row in self.grid],
            self.side,
            self.column_labels,
            self.row_labels,
            "\n".join(filter(None, (shared.get("prompt"), others))),
        )
        clips = [self.path.with_suffix(".mp4")] if sheet.length > 1 else []
        for clip in clips:
            save_video(clip, sheet.clip(), self.fps, dict(metadata))
        save_picture(self.path, sheet.picture(), dict(metadata))  # last: with it a restarted batch has its sheet
        return [self.path, *clips]

    def _cell(self, request: Request, parts: Mapping[str, str], shared: Mapping[str, str]) -> Cell:
        lines = [] if self.column_labels else [text for name, text in parts.items() if name not in shared]
        lines += filter(None, [self._failures.get(request)])
        return Cell(self._frames.get(request), "\n".join(lines), failed=request in self._failures)


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
