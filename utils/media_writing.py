"""Pictures and videos as files that appear only when whole."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable
from pathlib import Path

import av
import numpy as np
from PIL import Image, PngImagePlugin

from utils.files import atomic_path

VIDEO_CRF = "16"  # visually close to lossless; x264's scale runs from 0 (lossless) to 51


def unused_stem(folder: Path, stem: str, endings: Collection[str]) -> str:
    """``stem``, or with a number behind it where something with one of ``endings`` has that name: nothing is overwritten."""
    numbered = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    return next(name for name in numbered if not any((folder / f"{name}{ending}").exists() for ending in endings))


def save_picture(path: Path, picture: np.ndarray, metadata: dict[str, str] | None = None) -> None:
    """Write one uint8 RGB picture (H, W, 3) as PNG; ``metadata`` becomes its text chunks."""
    text = PngImagePlugin.PngInfo()
    for key, value in (metadata or {}).items():
        text.add_itxt(key, value)
    with atomic_path(path) as temporary:
        Image.fromarray(np.ascontiguousarray(picture)).save(temporary, format="PNG", pnginfo=text)


def save_video(path: Path, frames: Iterable[np.ndarray], fps: int, metadata: dict[str, str] | None = None) -> None:
    """Write uint8 RGB frames (T, H, W, 3) with even sides as H.264 in MP4; ``metadata`` becomes the comment tag."""
    frames = iter(frames)
    first = next(frames)
    with atomic_path(path) as temporary, av.open(str(temporary), mode="w", format="mp4") as container:
        if metadata:
            container.metadata["comment"] = "; ".join(f"{key}: {value}" for key, value in metadata.items())
        stream = container.add_stream("libx264", rate=fps, options={"crf": VIDEO_CRF})
        stream.height, stream.width = first.shape[:2]
        stream.pix_fmt = "yuv420p"
        for frame in itertools.chain([first], frames):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            for packet in stream.encode(picture):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
