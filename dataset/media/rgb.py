"""Where the pixels of one file become RGB: orientation, transparency, grey values and colour formats are decided here.

Whatever a file holds, what leaves is an array (height, width, 3) of uint8 in RGB, upright.
"""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
from PIL import ExifTags, Image, ImageOps

from utils.errors import UserError

# formats whose EXIF data are known once a file is open; the readers of others turn the picture while decoding
ORIENTATION_IN_HEADER = frozenset({"JPEG", "MPO", "PNG", "WEBP", "BMP"})
# what makes a picture upright, by the EXIF orientation
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SWAPS_SIDES = frozenset({5, 6, 7, 8})


class MediaError(UserError):
    """A picture or video that cannot be used; the message names the file."""


def picture_to_rgb(image: Image.Image, path: Path) -> np.ndarray:
    """An opened picture as (H, W, 3) uint8 RGB, upright.

    Transparent parts become white. 16 bit greys are scaled to 8 bits, floating-point greys from 0..1 or 0..255; a MediaError says
    where values have no agreed meaning.
    """
    if image.format not in ORIENTATION_IN_HEADER:
        image = ImageOps.exif_transpose(image)
    elif (turn := TURNS.get(_orientation(image))) is not None:
        image = image.transpose(turn)
    if image.mode.startswith("I") or image.mode == "F":
        grey = _grey_to_8_bits(np.asarray(image), is_float=image.mode == "F", path=path)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def upright_size(image: Image.Image) -> tuple[int, int] | None:
    """(width, height) of ``picture_to_rgb``, from the header of an opened picture; None where that needs decoding."""
    if image.format not in ORIENTATION_IN_HEADER:
        return None
    width, height = image.size
    return (height, width) if _orientation(image) in SWAPS_SIDES else (width, height)


def _orientation(image: Image.Image) -> int | None:
    # the method of the base class: that of PNG decodes the whole picture to look for a tag behind it
    return Image.Image.getexif(image).get(ExifTags.Base.Orientation)


def _grey_to_8_bits(values: np.ndarray, is_float: bool, path: Path) -> np.ndarray:
    """Greys of 16 bits (which Pillow may hold as 32 bit integers) or of floating point -> uint8."""
    values = values.astype(np.float64)
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= (255 if is_float else 65535)):  # false for NaN as well
        raise MediaError(f"{path} holds values from {low:g} to {high:g}, which no rule maps to grey; save it with 8 or 16 bits.")
    full = (1 if high <= 1 else 255) if is_float else 65535
    return np.rint(values * 255 / full).astype(np.uint8)


def frame_to_rgb(frame: av.VideoFrame) -> np.ndarray:
    """A decoded frame as (H, W, 3) uint8 RGB, turned and mirrored as the display matrix in the file wants (phones write one)."""
    pixels = frame.to_ndarray(format="rgb24")
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return pixels
    # x' = a x + c y, y' = b x + d y, with x to the right and y downwards, in 16.16 fixed point
    a, b, _, c, d = np.frombuffer(matrix, dtype=np.int32)[:5].tolist()
    if abs(b) + abs(c) > abs(a) + abs(d):
        pixels, flip_x, flip_y = pixels.transpose(1, 0, 2), c < 0, b < 0
    else:
        flip_x, flip_y = a < 0, d < 0
    return np.ascontiguousarray(pixels[:: -1 if flip_y else 1, :: -1 if flip_x else 1])
