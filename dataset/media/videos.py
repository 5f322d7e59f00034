"""Open videos: how a file says that its frames are to be read, and the frames.

Whatever a file holds, what leaves are frames (height, width, 3) of uint8 in sRGB (SDR of BT.709): upright, with square pixels,
deinterlaced, over white. Every size is (width, height).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, groupby, islice
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter
from PIL import Image, ImageSequence

from dataset.media.colour import BT601, BT709, BT2020, HD_HEIGHT, MATRICES, UNREAD_MATRICES, Colour, rgb_of_ycbcr, to_srgb
from dataset.media.containers import missing_bytes
from dataset.media.errors import MediaError, reading
from dataset.media.pictures import colour_conversion, picture_to_rgb

FIRST_FRAMES = 5  # that are looked at to know how to read the others
PICTURE_CODECS = frozenset({"png", "apng", "mjpeg", "jpegxl", "tiff", "webp"})
MOST_UNEVEN_PIXELS = 16  # times as wide as high, or as high as wide; more is a fault of the file
MAX_FRAMES = 500_000  # of a file: five hours
MAX_PIXELS = 4 * 10**9  # of a file, beyond those that its bytes account for: more are made only to keep a program busy
PIXELS_PER_BYTE = 10**5  # a picture that never changes has up to 30 thousand in H.264
PIXELS_PER_BYTE_OF_GIF = 5000
MAX_WEBP_PIXELS, PIXELS_PER_BYTE_OF_WEBP = 5 * 10**8, 1000  # Pillow makes 50 million in a second
MOST_FRAME_PIXELS, MOST_FRAME_BYTES = 40_000_000, 160_000_000  # 8192x4320 has 35 million pixels; HDR of 4:2:2 141 MB
LARGE_FRAME_PIXELS = 10_000_000  # of larger frames as few as possible are kept: one is looked at, and threads share it
KEPT_FRAMES, CONVERSION_BYTES = 17, 14  # by a decoder of H.264 or HEVC at most; for each pixel, as RGB and while it is fitted
DOLBY_VISION_TAGS = frozenset({"dvh1", "dvhe", "dva1", "dvav", "dav1"})  # of what is not also HDR10, HLG or SDR
FILMED_FPS_TAG = "com.android.capture.fps"
DECODERS_WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # FFmpeg's own leave alpha out


@contextmanager
def open_video(path: Path) -> Iterator[Video | Animation]:
    """A video as counting, probing and cutting all see it: they agree because all come here.

    Raises:
        MediaError: missing, not a video, cut short or without frames; also from the block, where a frame cannot be decoded.
    """
    with _open(path) as file:
        yield Animation(file, path) if isinstance(file, Image.Image) else Video(path, file, file.streams.best("video"))


def decoding_bytes(path: Path) -> int:
    """What decoding a video of large frames takes at most, by its header; 0 for others, which take little. Errors as above."""
    with _open(path) as file:
        if isinstance(file, Image.Image):
            (width, height), bits = file.size, 32
        else:
            codec = file.streams.best("video").codec_context
            width, height, bits = codec.width, codec.height, av.VideoFormat(codec.pix_fmt or "rgba").padded_bits_per_pixel
    _require_small(path, width, height)
    is_large = width * height > LARGE_FRAME_PIXELS
    return width * height * (KEPT_FRAMES * bits // 8 + CONVERSION_BYTES) if is_large else 0


@contextmanager
def _open(path: Path) -> Iterator[av.container.InputContainer | Image.Image]:
    with reading(path, "video"):
        lacking = missing_bytes(path)
        if lacking:
            raise MediaError(f"video {path} is cut short: its last {lacking} bytes are missing. Copy or download it again.")
        if _is_webp(path):  # FFmpeg does not play animated ones
            with Image.open(path, formats=("WEBP",)) as image:
                yield image
            return
        # FFmpeg takes "http:x.mp4" or "concat:y.mp4" for a protocol; an absolute path is always a file
        with av.open(os.path.abspath(path), metadata_errors="ignore") as container:
            if not container.streams.video:
                raise MediaError(f"{path} holds no video stream.")
            yield container


def _require_small(path: Path, width: int, height: int, format: av.VideoFormat | None = None) -> None:
    """Decoders keep many frames, and so does each thread."""
    bits = 0 if format is None else format.padded_bits_per_pixel
    if width * height > MOST_FRAME_PIXELS or width * height * bits > 8 * MOST_FRAME_BYTES:
        kind = f" of {bits} bits" if bits else ""
        raise MediaError(f"video {path} is too large to open safely ({width}x{height} pixels{kind}); shrink it first.")


def _is_webp(path: Path) -> bool:
    with open(path, "rb") as file:
        head = file.read(12)
    return head[:4] == b"RIFF" and head[8:] == b"WEBP"


class Video:
    """An open video file, and how its first frames say it is to be read.

    Attributes:
        decoded: the frames as they are in the file, each once; ``frames`` reads them too.
        fps, seconds: as stated.
        filmed_fps: the rate of the camera, as phones with Android state it.
        done: what ``frames`` and ``rgb`` do to the pixels, for people.
    """

    def __init__(self, path: Path, container: av.container.InputContainer, stream: av.video.stream.VideoStream) -> None:
        if stream.codec_context.codec_tag in DOLBY_VISION_TAGS:
            raise MediaError(
                f"video {path} holds Dolby Vision alone, whose colours nothing here reads; convert it to HDR10 or SDR."
            )
        _require_small(path, stream.codec_context.width, stream.codec_context.height)
        stream.codec_context.options = {"max_pixels": str(MOST_FRAME_PIXELS)}  # a later frame may be larger than the file says
        self._is_gif = stream.codec_context.name == "gif"
        is_large = stream.codec_context.width * stream.codec_context.height > LARGE_FRAME_PIXELS
        stream.thread_type = "SLICE" if is_large else "AUTO"
        rate = stream.average_rate or stream.guessed_rate
        self.fps = float(rate) if rate else None
        self.seconds = _stated_seconds(container, stream)
        self.filmed_fps = _positive_number(container.metadata.get(FILMED_FPS_TAG))
        decoded = _decode(container, stream, path)
        first = list(islice(decoded, 1 if is_large else FIRST_FRAMES))
        if not first:
            raise MediaError(f"video {path} has no frames.")
        self.decoded: Iterator[av.VideoFrame] = chain(first, decoded)
        self._colour = _colour_of(first[0], stream.codec_context)
        if self._colour is None:
            raise MediaError(f"video {path} has colours of a kind that is not read (matrix {int(first[0].colorspace)} of H.273).")
        self._pixel_aspect = Fraction(stream.sample_aspect_ratio or 1)
        if not 1 / MOST_UNEVEN_PIXELS <= self._pixel_aspect <= MOST_UNEVEN_PIXELS:
            raise MediaError(f"video {path} says that its pixels are {self._pixel_aspect} times as wide as high; save it anew.")
        _require_small(path, *_with_square_pixels(first[0], self._pixel_aspect), first[0].format)
        self._is_interlaced = any(frame.interlaced_frame for frame in first)
        self._has_alpha = any(component.is_alpha for component in first[0].format.components)
        self._is_of_pictures = stream.codec_context.name in PICTURE_CODECS
        self._reformatter = VideoReformatter()
        self.done = ", ".join(self._done())

    def _done(self) -> Iterator[str]:
        if str(self._colour):
            yield str(self._colour)
        elif self._colour.assumed and self._colour.matrix == BT709:
            yield "untagged, read as BT.709"
        if self._pixel_aspect != 1:
            yield f"pixels of {self._pixel_aspect.numerator}:{self._pixel_aspect.denominator} made square"
        if self._is_interlaced:
            yield "deinterlaced"
        if self._has_alpha and not self._is_gif:
            yield "transparency over white"

    def frames(self) -> Iterator[av.VideoFrame]:
        """``decoded``, deinterlaced where needed: as many frames."""
        return _deinterlace(self.decoded) if self._is_interlaced else self.decoded

    def size(self, frame: av.VideoFrame) -> tuple[int, int]:
        """(width, height) of ``rgb``."""
        width, height = _with_square_pixels(frame, self._pixel_aspect)
        height, width, _ = self._upright(frame, np.empty((height, width, 1), bool)).shape
        return width, height

    def rgb(self, frame: av.VideoFrame, at_least: tuple[int, int] | None = None) -> np.ndarray:
        """A frame as (H, W, 3) uint8 sRGB. Where its colours need much arithmetic, it is shrunk first by a whole number, but not
        below the size ``at_least``."""
        width, height = _with_square_pixels(frame, self._pixel_aspect)
        if self._colour.is_converted:
            shrink = min(min(width, height) // max(at_least), 8) if at_least else 1
            pixels = self._converted(frame, width // max(1, shrink), height // max(1, shrink))
        else:
            pixels = self._plain(frame, width, height)
        return self._upright(frame, pixels)

    def _upright(self, frame: av.VideoFrame, pixels: np.ndarray) -> np.ndarray:
        if self._is_of_pictures:  # PyAV frees their colour profiles twice once their side data were read
            return np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90)))
        matrix = frame.side_data.get("DISPLAYMATRIX")
        return pixels if matrix is None else _upright(pixels, np.frombuffer(matrix, dtype=np.int32))

    def _plain(self, frame: av.VideoFrame, width: int, height: int) -> np.ndarray:
        pixels = self._reformat(frame, width, height, "rgba" if self._has_alpha else "rgb24", full_range=True).to_ndarray()
        return _over_white(pixels) if self._has_alpha else pixels

    def _converted(self, frame: av.VideoFrame, width: int, height: int) -> np.ndarray:
        if frame.format.is_rgb:
            green, blue, red = _planes(self._reformat(frame, width, height, "gbrp16le", full_range=True))
            rgb = np.stack([red, green, blue], axis=-1).astype(np.float32) / 65535
        else:  # FFmpeg 8 overflows where RGB of 16 bits leaves the gamut
            ycbcr = _planes(self._reformat(frame, width, height, "yuv444p16le", self._colour.full_range))
            rgb = rgb_of_ycbcr(*ycbcr, self._colour)
        return to_srgb(rgb, self._colour)

    def _reformat(self, frame: av.VideoFrame, width: int, height: int, format: str, full_range: bool) -> av.VideoFrame:
        # what the frame itself says is not asked: PyAV before 17 overlooks it
        same_size = (width, height) == (frame.width, frame.height)
        smaller = width < frame.width or height < frame.height
        interpolation = None if same_size else Interpolation.AREA if smaller else Interpolation.BICUBIC
        ranges = {True: ColorRange.JPEG, False: ColorRange.MPEG}
        return self._reformatter.reformat(
            frame,
            width,
            height,
            format,
            src_colorspace=self._colour.matrix,
            dst_colorspace=self._colour.matrix,
            interpolation=interpolation,
            src_color_range=ranges[self._colour.full_range],
            dst_color_range=ranges[full_range],
        )


class Animation:
    """An open animated picture, with what ``Video`` has."""

    def __init__(self, image: Image.Image, path: Path) -> None:
        _require_small(path, *image.size)
        self.decoded = _animation_frames(image, path)
        self.fps = self.seconds = self.filmed_fps = None
        done = colour_conversion(image, path)[0], "transparency over white" if image.has_transparency_data else ""
        self.done = ", ".join(filter(None, done))

    def frames(self) -> Iterator[AnimationFrame]:
        return self.decoded

    def size(self, frame: AnimationFrame) -> tuple[int, int]:
        return frame.pixels.shape[1], frame.pixels.shape[0]

    def rgb(self, frame: AnimationFrame, at_least: tuple[int, int] | None = None) -> np.ndarray:
        return frame.pixels


@dataclass(frozen=True)
class AnimationFrame:
    """(H, W, 3) uint8, and when it is shown, in seconds."""

    pixels: np.ndarray
    time: float


Frame = av.VideoFrame | AnimationFrame


def _animation_frames(image: Image.Image, path: Path) -> Iterator[AnimationFrame]:
    milliseconds, count = 0, getattr(image, "n_frames", 1)
    pixels, size = count * image.width * image.height, path.stat().st_size
    _require_end(path, count, size, pixels, max(MAX_WEBP_PIXELS, size * PIXELS_PER_BYTE_OF_WEBP))
    for frame in ImageSequence.Iterator(image):
        yield AnimationFrame(picture_to_rgb(frame, path), milliseconds / 1000)
        milliseconds += frame.info.get("duration", 0)


def _decode(container: av.container.InputContainer, stream: av.video.stream.VideoStream, path: Path) -> Iterator[av.VideoFrame]:
    name = DECODERS_WITH_ALPHA.get(stream.codec_context.name)
    decode = stream.decode
    if name is not None and stream.metadata.get("alpha_mode") == "1":
        decode = av.CodecContext.create(name, "r").decode
    per_byte = PIXELS_PER_BYTE_OF_GIF if stream.codec_context.name == "gif" else PIXELS_PER_BYTE
    count = size = pixels = 0
    for packet in container.demux(stream):  # the last one is empty, which gives what is left
        size += packet.size
        for frame in decode(packet):
            count, pixels = count + 1, pixels + frame.width * frame.height
            _require_end(path, count, size, pixels, max(MAX_PIXELS, size * per_byte))
            yield frame


def _require_end(path: Path, count: int, size: int, pixels: int, most: int) -> None:
    """Refuse a file that would be read for ever, or as good as: of ``count`` frames that took ``size`` bytes."""
    if count > MAX_FRAMES:
        raise MediaError(f"video {path} has more than {MAX_FRAMES} frames; cut it into shorter ones.")
    if pixels > most:
        raise MediaError(
            f"video {path} makes {pixels // 10**6} million pixels of {size} bytes, as no video does, and reading it may never end. "
            "Remove it, or save it anew at a smaller size."
        )


def _deinterlace(frames: Iterator[av.VideoFrame]) -> Iterator[av.VideoFrame]:
    """One frame for each; those that are not interlaced stay as they are."""
    for (width, height, format), alike in groupby(frames, lambda frame: (frame.width, frame.height, frame.format.name)):
        first = next(alike)
        graph = av.filter.Graph()
        source = graph.add_buffer(width=width, height=height, format=format, time_base=first.time_base)
        bwdif, sink = graph.add("bwdif", "mode=send_frame:deint=interlaced"), graph.add("buffersink")
        source.link_to(bwdif)
        bwdif.link_to(sink)
        graph.configure()
        for frame in chain([first], alike, [None]):
            graph.push(frame)
            while True:
                try:
                    yield graph.pull()
                except (av.BlockingIOError, EOFError):
                    break


def _stated_seconds(container: av.container.InputContainer, stream: av.video.stream.VideoStream) -> float | None:
    if stream.duration and stream.time_base:
        return _positive_number(stream.duration * stream.time_base)
    return _positive_number(container.duration and container.duration / av.time_base)


def _positive_number(value: object) -> float | None:
    """What a file states, if it is a number that can be meant."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if 0 < number < math.inf else None


def _colour_of(frame: av.VideoFrame, codec: av.CodecContext) -> Colour | None:
    """What a file says about its colours, and for what it does not say what players take. None: with ``UNREAD_MATRICES``."""
    matrix, assumed = int(frame.colorspace), False
    if matrix == 10:  # BT.2020 with constant luminance, which nobody uses
        matrix = BT2020
    if matrix in UNREAD_MATRICES:
        return None
    if matrix not in MATRICES:
        assumed = True
        matrix = {BT709: BT709, BT2020: BT2020, 5: BT601, 6: BT601}.get(
            codec.color_primaries, BT709 if frame.height >= HD_HEIGHT else BT601
        )
    is_rgb = frame.format.is_rgb or frame.format.name == "pal8"
    full_range = is_rgb or frame.format.name.startswith("yuvj") or frame.color_range == ColorRange.JPEG
    return Colour(codec.color_primaries, codec.color_trc, matrix, full_range, assumed and not is_rgb)


def _over_white(pixels: np.ndarray) -> np.ndarray:
    """(H, W, 4) to (H, W, 3) uint8, rounded; row by row, which takes little memory and stays in the processor's cache."""
    over = np.empty((*pixels.shape[:2], 3), np.uint8)
    for row, target in zip(pixels, over):
        alpha = row[:, 3:].astype(np.uint16)
        sums = row[:, :3] * alpha + 255 * (255 - alpha) + 127
        target[:] = (sums + 1 + (sums >> 8)) >> 8  # sums // 255 for all that occur
    return over


def _planes(frame: av.VideoFrame) -> Iterator[np.ndarray]:
    """Each plane of 16 bits as (H, W) uint16; PyAV before 15 does not give them as one array."""
    for plane in frame.planes:
        yield np.frombuffer(plane, np.uint16).reshape(plane.height, -1)[:, : plane.width]


def _with_square_pixels(frame: av.VideoFrame, aspect: Fraction) -> tuple[int, int]:
    """The size with square pixels, of which no side is smaller than in the file."""
    if aspect >= 1:
        return round(frame.width * aspect), frame.height
    return frame.width, round(frame.height / aspect)


def _upright(pixels: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Turned and mirrored as the display matrix of a file wants (phones write one)."""
    # x' = a x + c y, y' = b x + d y, with x to the right and y downwards, in 16.16 fixed point
    a, b, _, c, d = matrix[:5].tolist()
    if abs(b) + abs(c) > abs(a) + abs(d):
        pixels, flip_x, flip_y = pixels.transpose(1, 0, 2), c < 0, b < 0
    else:
        flip_x, flip_y = a < 0, d < 0
    return np.ascontiguousarray(pixels[:: -1 if flip_y else 1, :: -1 if flip_x else 1])
