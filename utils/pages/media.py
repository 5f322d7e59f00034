"""Small pictures and clips as data URIs, to stand inside a page. Every function may be called in threads."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import av
import numpy as np
from av.bitstream import BitStreamFilterContext
from av.video.reformatter import Interpolation, VideoReformatter
from PIL import Image

PICTURE_QUALITY = 80  # of WebP, from 0 to 100
CLIP_CRF = 28  # of x264, from 0 (lossless) to 51
CONTAINER_BYTES, FRAME_BYTES = 800, 16  # of an MP4 file beside its frames, and for each of them


def picture_uri(pixels: np.ndarray, side: int, quality: int = PICTURE_QUALITY) -> str:
    """A picture (H, W, 3) uint8 as WebP, its longer side at most ``side`` pixels."""
    buffer = io.BytesIO()
    smaller(pixels, side).save(buffer, format="WEBP", quality=quality, method=2)
    return data_uri("image/webp", buffer.getvalue())


def clip_uri(frames: Sequence[np.ndarray], fps: int, side: int, crf: int = CLIP_CRF, most_bytes: int | None = None) -> str:
    """Frames (T, H, W, 3) uint8 as H.264 in MP4, their longer side at most ``side`` pixels, all sides even.

    ``most_bytes``: about what the URI may take; the quality falls as far as that needs.
    """
    buffer = io.BytesIO()
    width, height = (max(2, length - length % 2) for length in smaller(frames[0], side).size)
    options = {"crf": str(crf), "preset": "veryfast", "threads": "1"}
    if most_bytes is not None:
        bits = 9.5 * max(most_bytes * 3 / 4 - CONTAINER_BYTES - FRAME_BYTES * len(frames), 100 * len(frames) ** 0.5)
        rate = bits / (len(frames) / fps + 1)
        options |= {"maxrate": str(int(rate)), "bufsize": str(int(rate))}
    reformatter = VideoReformatter()
    with av.open(buffer, mode="w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        # without the message in which x264 names its settings
        plain = BitStreamFilterContext("filter_units=remove_types=6", stream)
        for frame in frames:
            whole = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            small = reformatter.reformat(whole, width, height, "yuv420p", interpolation=Interpolation.AREA)
            for packet in stream.encode(small):
                container.mux(plain.filter(packet))
        for packet in stream.encode():
            container.mux(plain.filter(packet))
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
