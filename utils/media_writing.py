"""Pictures and videos as files that appear only when whole."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from PIL import Image, PngImagePlugin

from utils.files import atomic_path

VIDEO_CRF = "16"  # visually close to lossless; x264's scale runs from 0 (lossless) to 51


def unused_stem(folder: Path, stem: str, endings: Sequence[str] = ("", ".mp4")) -> str:
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


def save_pictures(folder: Path, frames: np.ndarray, metadata: dict[str, str] | None = None) -> list[Path]:
    """Write uint8 RGB frames (T, H, W, 3) as ``folder/00000.png`` and on; returns their paths."""
    paths = [folder / f"{index:05d}.png" for index in range(len(frames))]
    for path, frame in zip(paths, frames):
        save_picture(path, frame, metadata)
    return paths


def save_video(path: Path, frames: np.ndarray, fps: int, metadata: dict[str, str] | None = None) -> None:
    """Write uint8 RGB frames (T, H, W, 3) with even sides as H.264 in MP4; ``metadata`` becomes the comment tag."""
    height, width = frames.shape[1:3]
    with atomic_path(path) as temporary, av.open(str(temporary), mode="w", format="mp4") as container:
        if metadata:
            container.metadata["comment"] = "; ".join(f"{key}: {value}" for key, value in metadata.items())
        stream = container.add_stream("libx264", rate=fps, options={"crf": VIDEO_CRF})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


@dataclass(frozen=True)
class OutputSettings:
    """Where pictures and videos go, and in which form; the fields have the names of flags.

    Attributes:
        save_path: folder.
        output_type: video (MP4), images (a folder of PNG), latent, or both (latent and MP4).
        no_metadata: leave prompt and settings out of the files.
    """

    save_path: str
    output_type: str = "video"
    fps: int = 24
    no_metadata: bool = False

    def save_frames(self, stem: str, frames: np.ndarray, metadata: dict[str, str]) -> Path:
        """Write uint8 RGB frames (T, H, W, 3) as a folder of PNG or as MP4; returns its path."""
        path, metadata = Path(self.save_path) / stem, {} if self.no_metadata else metadata
        if self.output_type == "images":
            save_pictures(path, frames, metadata)
            return path
        path = path.with_name(f"{stem}.mp4")
        save_video(path, frames, self.fps, metadata)
        return path
