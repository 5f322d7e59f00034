"""Frames of the files that generation writes."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageSequence


def read_frames(path: Path) -> np.ndarray:
    """uint8 RGB frames (T, H, W, 3) of an MP4, WebP, GIF, or folder of PNG."""
    if path.is_dir():
        return np.stack([np.asarray(Image.open(picture).convert("RGB")) for picture in sorted(path.glob("*.png"))])
    if path.suffix == ".mp4":
        with av.open(str(path)) as container:
            return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    with Image.open(path) as animation:
        return np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(animation)])
