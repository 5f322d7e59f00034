"""Reading and probing pictures and videos, and cutting clips out of videos. ``rgb.py`` makes RGB of what is decoded.

A frame is an array (height, width, 3) of uint8 in RGB. Every size is (width, height).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import stat
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from PIL import Image

from dataset.media.containers import missing_bytes
from dataset.media.frame_rate import MODEL_FPS
from dataset.media.frames import Window
from dataset.media.resizing import fit_to_bucket
from dataset.media.rgb import MediaError, frame_to_rgb, picture_to_rgb, upright_size
from utils.errors import UserError

# compared with the suffix in lower case
IMAGE_EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".jxl"})
VIDEO_EXTENSIONS = frozenset(
    {".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".flv", ".wmv", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".3gp", ".ogv"}
)
# formats that Pillow reads with a package of their own, by suffix: (module, name for pip)
IMAGE_PLUGINS = {".avif": ("pillow_avif", "pillow-avif-plugin"), ".jxl": ("pillow_jxl", "pillow-jxl-plugin")}

# what files with these endings hold, as Pillow calls it; endings are often wrong, so every file is tried as each of them.
# Nothing else is tried: readers of other formats start programs (Ghostscript for EPS), which no picture may do.
IMAGE_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "TIFF", "GIF", "AVIF", "JXL")

LONGEST_GAP = 10.0  # seconds between two frames, beyond which a timestamp is taken for a fault


@dataclass(frozen=True)
class VideoInfo:
    """What is known of a video without decoding all of it. Width and height are those of the upright picture."""

    width: int
    height: int
    fps: float | None


def read_image(path: Path) -> np.ndarray:
    """The picture as (H, W, 3) uint8 RGB, see ``picture_to_rgb``. Of an animation the first frame is read.

    Raises a MediaError: missing, not a picture, cut short, or with values that have no agreed meaning.
    """
    with _reading(path, "picture"), Image.open(path, formats=readable_formats()) as image:
        return picture_to_rgb(image, path)


def probe_image(path: Path) -> tuple[int, int]:
    """(width, height) of what ``read_image`` gives, from the header alone where the format allows."""
    with _reading(path, "picture"), Image.open(path, formats=readable_formats()) as image:
        if (size := upright_size(image)) is not None:
            return size
    height, width = read_image(path).shape[:2]
    return width, height


@functools.cache
def readable_formats() -> tuple[str, ...]:
    """Those of ``IMAGE_FORMATS`` that Pillow and the installed plugins can read."""
    Image.init()
    for module, _ in IMAGE_PLUGINS.values():
        if importlib.util.find_spec(module) is not None:
            importlib.import_module(module)
    return tuple(name for name in IMAGE_FORMATS if name in Image.OPEN)


def probe_video(path: Path) -> VideoInfo:
    """Size and stated frame rate; decodes the first frame."""
    for frame in _decoded_frames(path):
        height, width = frame_to_rgb(frame).shape[:2]
        break
    with _reading(path, "video"), _open_video(path) as container:
        stream = container.streams.video[0]
        rate = stream.average_rate or stream.guessed_rate
        return VideoInfo(width, height, float(rate) if rate else None)


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
    for frame in _decoded_frames(path):
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


def iterate_frames(path: Path) -> Iterator[np.ndarray]:
    """Each frame of the video in order, upright, as (H, W, 3) uint8 RGB; one in memory at a time.

    Raises a MediaError: missing, not a video, cut short, without frames, or with a frame that cannot be decoded.
    """
    return map(frame_to_rgb, _decoded_frames(path))


def read_clip_windows(
    path: Path, windows: Iterable[Window], bucket: tuple[int, int], indices: Sequence[int] | None = None
) -> Iterator[tuple[Window, np.ndarray]]:
    """Cut windows out of a video in one pass, each frame fitted to ``bucket`` once.

    Yields each distinct window (start, length) with its (length, H, W, 3) uint8 clip as soon as its last frame is there.
    Only fitted frames that an unfinished window needs are kept, and decoding stops with the last window.

    ``indices``: which frames of the file are the frames that windows count; they never fall, and one may come several times. None:
    every frame. Raises a MediaError as ``iterate_frames``, or where the video ends before a window does.
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
    for count, frame in enumerate(_chosen_frames(path, indices), start=1):
        while not_started and not_started[0][0] < count:
            needed_until = max(needed_until, sum(not_started.popleft()))
        if count <= needed_until:
            if frame is not fitted_frame:
                fitted_frame, fitted = frame, fit_to_bucket(frame_to_rgb(frame), bucket)
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


def _chosen_frames(path: Path, indices: Sequence[int] | None) -> Iterator[av.VideoFrame]:
    if indices is None:
        yield from _decoded_frames(path)
        return
    position = 0
    for index, frame in enumerate(_decoded_frames(path)):
        while position < len(indices) and indices[position] == index:
            yield frame
            position += 1
        if position == len(indices):
            return


def _decoded_frames(path: Path) -> Iterator[av.VideoFrame]:
    """The frames of a video as all functions above see them: counting, probing and cutting agree because all come here."""
    empty = True
    with _reading(path, "video"):
        lacking = missing_bytes(path)
        if lacking:
            raise MediaError(f"video {path} is cut short: its last {lacking} bytes are missing. Copy or download it again.")
        with _open_video(path) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            for frame in container.decode(stream):
                empty = False
                yield frame
    if empty:
        raise MediaError(f"video {path} has no frames.")


def _open_video(path: Path) -> av.container.InputContainer:
    # FFmpeg takes "http:x.mp4" or "concat:y.mp4" for a protocol; an absolute path is always a file
    container = av.open(os.path.abspath(path), metadata_errors="ignore")
    if not container.streams.video:
        container.close()
        raise MediaError(f"{path} holds no video stream.")
    return container


@contextmanager
def _reading(path: Path, what: str) -> Iterator[None]:
    """Turn whatever a decoder throws at a damaged file into a MediaError that names the file."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # reading a pipe would wait for ever
            raise MediaError(f"{what} {path} is a folder or a device, not a file.")
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise MediaError(f"{what} {path} does not exist.") from error
    except PermissionError as error:
        raise MediaError(f"{what} {path} cannot be read: {error.strerror}.") from error
    except EOFError as error:
        raise MediaError(f"{what} {path} has no frames or is cut short.") from error
    except Image.DecompressionBombError as error:
        raise MediaError(f"{what} {path} is too large to open safely ({error}); shrink it first.") from error
    except Exception as error:  # Pillow's and FFmpeg's readers raise nearly every type on damaged files
        package = IMAGE_PLUGINS.get(path.suffix.lower())
        hint = "Repair, replace or remove the file."
        if package and what == "picture" and importlib.util.find_spec(package[0]) is None:
            hint = f"Reading {path.suffix.lower()} files may need: pip install {package[1]}"
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise MediaError(f"{what} {path} cannot be decoded ({reason}). {hint}") from error
