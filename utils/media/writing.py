"""Pictures and videos as files that appear only when whole."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Collection, Iterable
from pathlib import Path

import av
import numpy as np
from PIL import Image

from utils.files import atomic_path
from utils.media.metadata import as_exif, as_json, as_mp4_tags, as_png_text

logger = logging.getLogger(__name__)

VIDEO_CRF = "16"  # visually close to lossless; x264's scale runs from 0 (lossless) to 51
X264_PARAMS = "mbtree=0"  # the macroblock tree reads memory that nobody wrote, and results vary
WEBP_QUALITY = 90
GIF_UNIT = 10  # milliseconds, in which a GIF counts
GIF_SHORTEST = 20  # milliseconds; what is shorter players show for 100


def unused_stem(folder: Path, stem: str, endings: Collection[str]) -> str:
    """``stem``, or with a number behind it where something with one of ``endings`` has that name: nothing is overwritten."""
    numbered = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    return next(name for name in numbered if not any((folder / f"{name}{ending}").exists() for ending in endings))


def save_picture(path: Path, picture: np.ndarray, metadata: dict[str, str] | None = None) -> None:
    """Write one uint8 RGB picture (H, W, 3) as PNG; ``metadata`` becomes its text chunks."""
    with atomic_path(path) as temporary:
        Image.fromarray(np.ascontiguousarray(picture)).save(temporary, format="PNG", pnginfo=as_png_text(metadata or {}))


def save_video(path: Path, frames: Iterable[np.ndarray], fps: int, metadata: dict[str, str] | None = None) -> None:
    """Write uint8 RGB frames (T, H, W, 3) with even sides as H.264 in MP4, the same bits for the same frames; ``metadata``
    becomes tags."""
    frames = iter(frames)
    first = next(frames)
    with atomic_path(path) as temporary, av.open(str(temporary), mode="w", format="mp4") as container:
        container.metadata.update(as_mp4_tags(metadata or {}))
        stream = container.add_stream("libx264", rate=fps, options={"crf": VIDEO_CRF, "x264-params": X264_PARAMS})
        stream.height, stream.width = first.shape[:2]
        stream.pix_fmt = "yuv420p"
        for frame in itertools.chain([first], frames):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            for packet in stream.encode(picture):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def save_animation(path: Path, frames: np.ndarray, fps: int, metadata: dict[str, str] | None = None) -> None:
    """Write uint8 RGB frames (T, H, W, 3) as an animated WebP or GIF, by the ending of ``path``; it repeats without end.

    WebP counts in milliseconds, GIF in 1/100 s: single frames stay longer so that the whole takes its time. ``metadata`` becomes
    EXIF or the comment.
    """
    gif = path.suffix == ".gif"
    unit = GIF_UNIT if gif else 1
    if gif and 1000 / fps < GIF_SHORTEST:
        logger.warning("%s plays more slowly than %d frames per second: a GIF holds at most %d.", path, fps, 1000 // GIF_SHORTEST)
        fps = 1000 // GIF_SHORTEST
    ends = [round(1000 / unit * (index + 1) / fps) * unit for index in range(len(frames))]
    durations = [end - begin for begin, end in zip([0, *ends], ends)]
    pictures = [Image.fromarray(np.ascontiguousarray(frame)) for frame in frames]
    if gif:  # one palette for all, or colours that do not move flicker
        palette = Image.fromarray(
            np.ascontiguousarray(frames[:: max(1, len(frames) // 8)]).reshape(-1, *frames.shape[2:])
        ).quantize()
        options = {"format": "GIF", "comment": as_json(metadata).encode("utf-8") if metadata else b""}
        pictures = [picture.quantize(palette=palette) for picture in pictures]
    else:
        options = {"format": "WEBP", "quality": WEBP_QUALITY, "exif": as_exif(metadata or {})}
    with atomic_path(path) as temporary:
        pictures[0].save(temporary, save_all=True, append_images=pictures[1:], duration=durations, loop=0, **options)
