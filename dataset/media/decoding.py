"""What is known of a video, its frames, and clips cut out of it. How its pixels are read is decided in ``videos.py``."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dataset.media.errors import MediaError
from dataset.media.frame_rate import MODEL_FPS, Resampling, own_rate, resample
from dataset.media.frames import Window
from dataset.media.resizing import fit_to_bucket
from dataset.media.videos import Frame, open_video

# compared with the suffix in lower case
VIDEO_EXTENSIONS = frozenset(
    {".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".flv", ".wmv", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".3gp", ".ogv"}
    | {".gif", ".webp"}
)

RATE_SECONDS = 1.0  # of a video, at least, are needed to measure its frame rate; single gaps between frames vary
LONGEST_GAP = 10.0  # seconds between two frames, beyond which a timestamp is taken for a fault


@dataclass(frozen=True)
class VideoInfo:
    """What is known of a video without decoding all of it. Width and height are those of the upright picture.

    Attributes:
        done: what is done to its pixels, such as "HLG to SDR"; empty for a plain video.
        seconds: how long it plays, as stated.
        filmed_fps: the rate of the camera, where the file says that; slow motion plays at a lower one.
    """

    width: int
    height: int
    fps: float | None
    done: str = ""
    seconds: float | None = None
    filmed_fps: float | None = None


def probe_video(path: Path) -> VideoInfo:
    """Size, stated frame rate, and what is done to the pixels; decodes the first frames."""
    with open_video(path) as video:
        width, height = video.size(next(video.frames()))
        return VideoInfo(width, height, video.fps, video.done, video.seconds, video.filmed_fps)


def frame_times(
    path: Path, fps: float | None = None, use_timestamps: bool = True, limit: tuple[int, float] | None = None
) -> list[float]:
    """When each frame that ``iterate_frames`` gives is shown, in seconds since the first; found by decoding.

    Args:
        fps: the rate for frames without a usable timestamp, or for all if not ``use_timestamps``; 24 where unknown.
        limit: stop once there are as many frames (first number) that reach as many seconds (second).

    Times never fall. Where timestamps go back, are missing, or jump by more than 10 seconds, the file is at fault, and the frame
    is taken to follow the one before it as usual.
    """
    usual = 1 / (fps or MODEL_FPS)
    times: list[float] = []
    before = None
    with open_video(path) as video:
        for frame in video.decoded:
            now = frame.time if use_timestamps else None
            gap = None if now is None or before is None else now - before
            if times:
                times.append(times[-1] + (gap if gap is not None and 0 <= gap <= LONGEST_GAP else usual))
            else:
                times.append(0.0)
            before = now
            if limit is not None and len(times) >= limit[0] and times[-1] >= limit[1]:
                break
    if times[-1] == 0:  # all of them at one moment
        return [index * usual for index in range(len(times))]
    return times


def frames_at_rate(
    path: Path, fps: float | None, target_fps: float, needed: int | None = None, source_fps: float | None = None
) -> tuple[int, Resampling | None, float | None]:
    """How many frames a video has at ``target_fps`` (0: at its own rate), which of the file they are (None: every frame), and the
    rate of the file: by the times of its frames, or as stated where there is one frame or ``source_fps`` counts.

    Args:
        fps: what the file states.
        needed: counting may stop once there are so many.
        source_fps: the rate that counts in place of what the file holds.
    """
    limit = None
    if needed is not None:
        limit = needed, max(needed / target_fps, RATE_SECONDS) if target_fps else 0.0
    times = frame_times(path, source_fps or fps, source_fps is None, limit)
    resampling = resample(times, source_fps or fps, target_fps, given=source_fps is not None)
    own = fps if source_fps is not None or len(times) < 2 else own_rate(np.asarray(times), fps)
    return len(times if resampling is None else resampling.indices), resampling, own


def iterate_frames(path: Path) -> Iterator[np.ndarray]:
    """Each frame of the video in order as (H, W, 3) uint8 sRGB; one in memory at a time.

    Raises:
        MediaError: missing, not a video, cut short, without frames, or with a frame that cannot be decoded.
    """
    with open_video(path) as video:
        for frame in video.frames():
            yield video.rgb(frame)


def read_clip_windows(
    path: Path,
    windows: Iterable[Window],
    bucket: tuple[int, int],
    indices: Sequence[int] | None = None,
    see: Callable[[np.ndarray], object] = lambda frame: None,
) -> Iterator[tuple[Window, np.ndarray]]:
    """Cut windows out of a video in one pass, each frame fitted to ``bucket`` once.

    Yields each distinct window (start, length) with its (length, H, W, 3) uint8 clip as soon as its last frame is there.
    Only fitted frames that an unfinished window needs are kept, and decoding stops with the last window.

    Args:
        indices: which frames of the file are the frames that windows count; they never fall, and one may come several times.
            None: every frame.
        see: is called with the first frame of the first window before it is fitted; with HDR perhaps shrunk.

    Raises:
        MediaError: as ``iterate_frames``, or the video ends before a window does.
    """
    queue = deque(sorted(set(windows)))  # from the oldest unfinished window on
    by_end: dict[int, list[Window]] = {}
    for start, length in queue:
        by_end.setdefault(start + length, []).append((start, length))
    if not queue:
        return
    kept: dict[int, np.ndarray] = {}
    finished: set[Window] = set()
    not_started = deque(queue)
    needed_until = 0
    count = 0
    fitted_frame = fitted = None
    with open_video(path) as video:
        for count, frame in enumerate(_chosen(video.frames(), indices), start=1):
            while not_started and not_started[0][0] < count:
                needed_until = max(needed_until, sum(not_started.popleft()))
            if count <= needed_until:
                if frame is not fitted_frame:
                    pixels = video.rgb(frame, bucket)
                    if fitted is None:
                        see(pixels)
                    fitted_frame, fitted = frame, fit_to_bucket(pixels, bucket)
                kept[count - 1] = fitted
            for window in by_end.get(count, ()):
                finished.add(window)
                yield window, np.stack([kept[index] for index in range(count - window[1], count)])
            while queue and queue[0] in finished:
                queue.popleft()
            if not queue:
                return
            for index in [index for index in kept if index < queue[0][0]]:
                del kept[index]
    start, length = queue[0]
    raise MediaError(f"{path} ends after {count} frames, but the clip of frames {start} to {start + length - 1} was to be cut.")


def _chosen(frames: Iterator[Frame], indices: Sequence[int] | None) -> Iterator[Frame]:
    """The frames at ``indices``, which never fall; None: every frame."""
    if indices is None:
        yield from frames
        return
    position = 0
    for index, frame in enumerate(frames):
        while position < len(indices) and indices[position] == index:
            yield frame
            position += 1
        if position == len(indices):
            return
