"""What generation starts from: pictures and clips, read as caching reads them, at the size and length that is wanted.

``kind`` is image or video throughout, ``size`` is (height, width), ``length`` is in frames at the model's rate.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

import numpy as np

from dataset.media.decoding import VIDEO_EXTENSIONS, frames_at_rate, probe_video, read_clip_windows
from dataset.media.errors import MediaError
from dataset.media.frame_rate import MODEL_FPS
from dataset.media.frames import longest_clip
from dataset.media.pictures import IMAGE_EXTENSIONS, probe_image, read_image

logger = logging.getLogger(__name__)

STILLS = IMAGE_EXTENSIONS - VIDEO_EXTENSIONS


def find_starts(kind: str, path: Path, size: tuple[int, int], length: int) -> list[Path]:
    """The starts that ``path`` stands for, checked: itself, or each picture or clip of a folder. A folder of pictures alone is one
    clip for the kind video, whose frames they are. What will be done to each is logged.

    Raises:
        MediaError: missing, unreadable, of the other kind, or shorter than ``length``.
    """
    paths = [path]
    if path.is_dir():
        files = _files_in(path)
        clips = [file for file in files if file.suffix.lower() in VIDEO_EXTENSIONS]
        pictures = [file for file in files if file.suffix.lower() in (STILLS if kind == "video" else IMAGE_EXTENSIONS)]
        if kind == "image":
            paths = pictures
        elif clips:
            paths = clips
            if pictures:
                logger.info("%s: its %d pictures are left out, as it holds clips.", path, len(pictures))
        elif not pictures:
            paths = []
        if not paths:
            raise MediaError(f"the folder {path} holds no {'picture' if kind == 'image' else 'clip and no picture'}.")
    for file in paths:
        what = _check_picture(file, length) if kind == "image" else _check_video(file, length)
        logger.info("start %s: %s, fitted to %dx%d", file, what, size[1], size[0])
    return paths


def read_start(kind: str, path: Path, size: tuple[int, int], length: int) -> np.ndarray:
    """A start of ``find_starts`` as frames (length, height, width, 3) uint8 sRGB.

    Raises:
        MediaError: it cannot be read any more.
    """
    bucket = size[1], size[0]
    if kind == "image":
        return np.repeat(read_image(path, bucket)[None], length, axis=0)
    if path.is_dir():
        return np.stack([read_image(file, bucket) for file in _frames_in(path)[:length]])
    _, resampling, _ = frames_at_rate(path, probe_video(path).fps, MODEL_FPS, length)
    ((_, frames),) = read_clip_windows(path, [(0, length)], bucket, resampling and resampling.indices)
    return frames


def _files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))


def _frames_in(folder: Path) -> list[Path]:
    """The pictures of a folder by name, 9.png before 10.png."""
    pictures = [path for path in _files_in(folder) if path.suffix.lower() in STILLS]
    return sorted(pictures, key=lambda path: _number_aware(path.name))


def _number_aware(name: str) -> list[str | int]:
    return [int(part) if index % 2 else part for index, part in enumerate(re.split(r"(\d+)", name))]


def _check_picture(path: Path, length: int) -> str:
    if path.suffix.lower() in VIDEO_EXTENSIONS - IMAGE_EXTENSIONS:
        raise MediaError(f"{path} is a video, not a picture: give it as --video_path.")
    height, width = read_image(path).shape[:2]  # all of it: a file that is cut short has a header
    done = probe_image(path)[1]
    still = f"standing still for all {length} frames of --video_length" if length > 1 else ""
    return ", ".join(filter(None, (f"{width}x{height}", done, still)))


def _check_video(path: Path, length: int) -> str:
    if path.is_dir():
        pictures = _frames_in(path)
        sizes = {read_image(picture).shape[1::-1] for picture in pictures[:length]}
        size, changes, count = " and ".join(f"{width}x{height}" for width, height in sorted(sizes)), [], len(pictures)
    else:
        if path.suffix.lower() in STILLS:
            raise MediaError(f"{path} is a picture, not a video: give it as --image_path.")
        info = probe_video(path)
        count, resampling, _ = frames_at_rate(path, info.fps, MODEL_FPS, length)
        size, changes = f"{info.width}x{info.height}", [str(change) for change in (resampling, info.done) if change]
    if count < length:
        at_rate = "" if path.is_dir() else f" at {MODEL_FPS} frames per second"
        raise MediaError(
            f"{path} has {count} frame{'s' if count > 1 else ''}{at_rate}, and --video_length is {length}; "
            f"--video_length {longest_clip(count)} is the longest that fits."
        )
    return ", ".join((size, *changes, f"its first {length} frame{'s' if length > 1 else ''}"))
