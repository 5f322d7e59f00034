"""Which frames of a video are trained, so that it plays at the speed it was filmed at.

The model knows one frame rate. A video of another rate, or with uneven times between its frames, is resampled: at each
moment of the wanted rate the frame that is nearest in time. Frames are left out or repeated, never mixed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MODEL_FPS = 24
TOLERANCE = 0.05  # rates that differ by less count as equal: 23.976 and 25 as 24
UNEVEN_FRAMES = 1.5  # how far, in frames of the wanted rate, a frame may be from its place in an even video
ROUNDING_FRAMES = 0.05  # containers round times to milliseconds; so little more is no frame more
TIE_SECONDS = 1e-3  # for the same reason: one video in two containers gives the same frames

EVERY_FRAME = "every frame"


@dataclass(frozen=True)
class Resampling:
    """What is done to one video; rates are in frames per second."""

    fps: float  # its own rate
    target_fps: float
    indices: tuple[int, ...]  # the frames of the file, in order, that are the frames of the clip; one may come several times
    uneven: bool = False  # whether the times between its frames differ
    given: bool = False  # whether ``fps`` is the source_fps of the dataset, so that the times in the file do not count

    @property
    def record(self) -> str:
        """How the frames were chosen, for the record."""
        return _record(self.target_fps, self.fps if self.given else None)

    def __str__(self) -> str:
        return f"{'uneven, ' if self.uneven else ''}{self.fps:.4g} -> {self.target_fps:.4g} frames per second"


def _record(target_fps: float, given_fps: float | None) -> str:
    return f"{target_fps:g} from {'timestamps' if given_fps is None else f'{given_fps:g}'}"


def possible_records(target_fps: float, source_fps: float | None) -> set[str]:
    """Every frame_rate record that clips can get with these settings of a dataset, whatever rates the files have."""
    if not target_fps or (source_fps is not None and _is_near(source_fps, target_fps)):
        return {EVERY_FRAME}
    resampled = _record(target_fps, source_fps)
    return {EVERY_FRAME, resampled} if source_fps is None else {resampled}


def _is_near(fps: float, target_fps: float) -> bool:
    return abs(fps / target_fps - 1) <= TOLERANCE


def resample(times: Sequence[float], stated_fps: float | None, target_fps: float, given: bool = False) -> Resampling | None:
    """Choose the frames of a video, or None if every frame is kept, as ``target_fps`` 0 wants.

    ``times``: when its frames are shown, in seconds since the first, never falling. ``stated_fps``: the rate that the file, or if
    ``given`` the dataset, states.
    """
    shown = np.asarray(times, dtype=np.float64)
    if not target_fps or len(shown) < 2:
        return None
    fps = own_rate(shown, stated_fps)
    even = np.linspace(0, shown[-1], len(shown))
    uneven = bool(np.abs(shown - even).max() * target_fps > UNEVEN_FRAMES)
    if _is_near(fps, target_fps) and not uneven:
        return None
    duration = shown[-1] + min(1 / fps, shown[-1] - shown[-2])  # files do not state how long the last frame is shown
    count = max(1, int(np.ceil(duration * target_fps - ROUNDING_FRAMES)))
    # Between two frames the nearer one wins; in the middle the earlier one.
    indices = np.searchsorted((shown[1:] + shown[:-1]) / 2, np.arange(count) / target_fps - TIE_SECONDS)
    return Resampling(fps, target_fps, tuple(indices.tolist()), uneven, given)


def own_rate(times: np.ndarray, stated_fps: float | None) -> float:
    """Frames per second by the times of at least two frames, or as stated where that is about the same."""
    measured = (len(times) - 1) / times[-1]
    return stated_fps if stated_fps and abs(stated_fps / measured - 1) <= TOLERANCE else float(measured)
