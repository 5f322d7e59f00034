"""Which frames of a video become clips: windows (start, length) for each way of cutting."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

FRAME_EXTRACTIONS = ("head", "chunk", "slide", "uniform", "full")

MAX_FRAMES = 129  # the longest clip that the model was trained on

Window = tuple[int, int]


def is_clip_length(frames: int) -> bool:
    """Whether the VAE takes clips of this many frames: the first one alone, then groups of four."""
    return frames >= 1 and frames % 4 == 1


def longest_clip(frames: int) -> int:
    """The greatest 4n+1 that is at most ``frames`` (at least 1)."""
    return frames - (frames - 1) % 4


def cut_windows(
    frame_count: int, target_frames: Sequence[int], mode: str, stride: int = 1, sample: int = 1, max_frames: int = MAX_FRAMES
) -> list[Window]:
    """The distinct windows cut from a video of ``frame_count`` frames, as (first frame, number of frames).

    They come in the order of ``target_frames``, by start within each length; a length greater than the video gives none.

    Args:
        mode: ``head`` the first frames; ``chunk`` one clip after the other without overlap; ``slide`` a clip every
            ``stride`` frames; ``uniform`` ``sample`` clips spread evenly from the first frame to the last, those that coincide
            once; ``full`` one clip, all frames up to ``max_frames`` but the up to three beyond 4n+1, whatever ``target_frames`` is.
    """
    if mode == "full":
        return [(0, longest_clip(min(frame_count, max_frames)))] if frame_count else []
    windows = [
        (start, length)
        for length in target_frames
        if length <= frame_count
        for start in _starts(frame_count - length, length, mode, stride, sample)
    ]
    return list(dict.fromkeys(windows))


def _starts(last_start: int, length: int, mode: str, stride: int, sample: int) -> Iterable[int]:
    if mode == "head":
        return [0]
    if mode == "chunk":
        return range(0, last_start + 1, length)
    if mode == "slide":
        return range(0, last_start + 1, stride)
    if mode == "uniform":
        # existing caches carry these starts in their names, so the rounding of linspace is part of the format
        return np.linspace(0, last_start, sample, dtype=int).tolist()
    raise ValueError(f"unknown frame extraction {mode!r}")


def frames_needed(target_frames: Sequence[int], mode: str, max_frames: int = MAX_FRAMES) -> int | None:
    """How many frames of a video decide its windows: None means that all must be counted."""
    return {"head": max(target_frames), "full": max_frames}.get(mode)
