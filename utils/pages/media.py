"""Small pictures and clips as data URIs, to stand inside a page. Every function may be called in threads."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import av
import numpy as np
from PIL import Image

PICTURE_QUALITY = 80  # of WebP, from 0 to 100
CLIP_CRF = 28  # of x264, from 0 (lossless) to 51


def picture_uri(pixels: np.ndarray, side: int, quality: int = PICTURE_QUALITY) -> str:
    """A picture (H, W, 3) uint8 as WebP, its longer side at most ``side`` pixels."""
    buffer = io.BytesIO()
    smaller(pixels, side).save(buffer, format="WEBP", quality=quality)
    return data_uri("image/webp", buffer.getvalue())


def clip_uri(frames: Sequence[np.ndarray], fps: int, side: int, crf: int = CLIP_CRF) -> str:
    """Frames (T, H, W, 3) uint8 as H.264 in MP4, their longer side at most ``side`` pixels, all sides even."""
    buffer = io.BytesIO()
    width, height = (max(2, length - length % 2) for length in smaller(frames[0], side).size)
    with av.open(buffer, mode="w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": str(crf), "preset": "veryfast", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in frames:
            small = Image.fromarray(np.ascontiguousarray(frame)).resize((width, height), Image.Resampling.BOX, reducing_gap=2)
            container.mux(stream.encode(av.VideoFrame.from_image(small)))
        container.mux(stream.encode())
    return data_uri("video/mp4", buffer.getvalue())


def smaller(pixels: np.ndarray, side: int) -> Image.Image:
    """A picture (H, W, 3) uint8, reduced so that its longer side is at most ``side`` pixels."""
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    scale = side / max(picture.size)
    if scale >= 1:
        return picture
    size = tuple(max(1, round(length * scale)) for length in picture.size)
    return picture.resize(size, Image.Resampling.BOX, reducing_gap=2)


def data_uri(kind: str, content: bytes) -> str:
    """``content`` of the media type ``kind`` as a data URI."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
