"""Reading pictures: whatever a file holds, what leaves is an array (height, width, 3) of uint8 in sRGB, upright, over white.

Every size is (width, height).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps

from dataset.media.colour import Colour, primaries_to_bt709, srgb_of_light, to_srgb
from dataset.media.errors import MediaError, reading

logger = logging.getLogger(__name__)

# compared with the suffix in lower case
IMAGE_EXTENSIONS = frozenset(
    {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif", ".jxl"}
)
# formats that Pillow reads with a package of their own, by how such files begin: (module, name for pip)
IMAGE_PLUGINS = {
    rb"....ftyp(heic|heix|heim|heis|mif1|msf1)": ("pillow_heif", "pillow-heif"),
    rb"....ftypavi[fs]": ("pillow_avif", "pillow-avif-plugin"),  # only before Pillow 11.3
    rb"\xff\x0a|....JXL ": ("pillow_jxl", "pillow-jxl-plugin"),
}

# what files with these endings hold, as Pillow calls it; endings are often wrong, so every file is tried as each of them.
# Nothing else is tried: readers of other formats start programs (Ghostscript for EPS), which no picture may do.
IMAGE_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "TIFF", "GIF", "AVIF", "HEIF", "JXL")

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

SAME_COLOUR = 2  # of 255: a profile that changes no colour by more is taken for sRGB
UNREADABLE_PROFILE = "unreadable colour profile, taken for sRGB"


def read_image(path: Path) -> np.ndarray:
    """The picture as (H, W, 3) uint8 sRGB, upright. Of an animation the first frame is read.

    Transparent parts become white. 16 bit greys are scaled to 8 bits, floating-point greys from 0..1 or 0..255. Colour profiles,
    PNG's gAMA and cHRM, and HDR of AVIF, HEIF and PNG are converted.

    Raises:
        MediaError: missing, not a picture, cut short, or with values that have no agreed meaning.
    """
    with reading(path, "picture", _missing_plugin), Image.open(path, formats=readable_formats()) as image:
        return picture_to_rgb(image, path)


def probe_image(path: Path) -> tuple[tuple[int, int], str]:
    """(width, height) of what ``read_image`` gives, from the header alone where the format allows, and what is done to its colours.

    Raises:
        MediaError: as ``read_image``, as far as was read.
    """
    with reading(path, "picture", _missing_plugin), Image.open(path, formats=readable_formats()) as image:
        done = colour_conversion(image, path)[0]
        if (pixels := image.width * image.height) > Image.MAX_IMAGE_PIXELS:
            logger.warning("%s has %d million pixels: reading it takes much memory.", path, pixels // 10**6)
        if (size := upright_size(image)) is not None:
            return size, done
    height, width = read_image(path).shape[:2]
    return (width, height), done


@functools.cache
def readable_formats() -> tuple[str, ...]:
    """Those of ``IMAGE_FORMATS`` that Pillow and the installed plugins can read."""
    Image.init()
    for module in {module for module, _ in IMAGE_PLUGINS.values()}:
        if importlib.util.find_spec(module) is not None:
            plugin = importlib.import_module(module)
            getattr(plugin, "register_heif_opener", lambda: None)()
    return tuple(name for name in IMAGE_FORMATS if name in Image.OPEN)


def _missing_plugin(path: Path) -> str | None:
    """What to install for a file that cannot be read."""
    with open(path, "rb") as file:
        head = file.read(16)
    for beginning, (module, package) in IMAGE_PLUGINS.items():
        if re.match(beginning, head, re.DOTALL) and importlib.util.find_spec(module) is None:
            return f"Reading it may need: pip install {package}"
    return None


def picture_to_rgb(image: Image.Image, path: Path) -> np.ndarray:
    """An opened picture, see ``read_image``."""
    _, to_srgb_of = colour_conversion(image, path)
    if image.format not in ORIENTATION_IN_HEADER:
        image = ImageOps.exif_transpose(image)
    elif (turn := TURNS.get(_orientation(image))) is not None:
        image = image.transpose(turn)
    if image.mode.startswith("I") or image.mode == "F":
        grey = _grey_to_8_bits(np.asarray(image), is_float=image.mode == "F", path=path)
        image = Image.fromarray(grey)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if to_srgb_of is None:
        return np.array(image.convert("RGB"))
    return to_srgb_of(image)


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
    if is_float:
        scale = 255 if high <= 1 else 1
    else:
        scale = 255 / 65535
    return np.rint(values * scale).astype(np.uint8)


warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # ``probe_image`` says it with the file's name

Conversion = Callable[[Image.Image], np.ndarray]


def colour_conversion(image: Image.Image, path: Path) -> tuple[str, Conversion | None]:
    """What is done to the colours of an opened picture, in words and as a function to (H, W, 3) sRGB; ("", None): nothing.

    PNG's order of precedence: cICP, then a profile, then sRGB, then gAMA and cHRM.
    """
    colour = _coded_colour(image, path)
    if colour is not None and colour.is_converted:
        return str(colour), lambda image: to_srgb(np.asarray(image.convert("RGB"), np.float32) / 255, colour)
    if "icc_profile" in image.info:
        kind = "CMYK" if image.mode == "CMYK" else "L" if Image.getmodebase(image.mode) == "L" else "RGB"
        return _profile_conversion(image.info["icc_profile"], kind)
    gamma = image.info.get("gamma")
    if image.format == "PNG" and gamma and "srgb" not in image.info:
        return _gamma_conversion(gamma, image.info.get("chromaticity"))
    return "", None


@functools.lru_cache(maxsize=64)
def _profile_conversion(profile: bytes | None, kind: str) -> tuple[str, Conversion | None]:
    """``kind``: L, RGB or CMYK, what the picture holds; ``profile``: None where Pillow cannot unpack it."""
    if not profile:
        return UNREADABLE_PROFILE, None
    try:
        source = ImageCms.getOpenProfile(io.BytesIO(profile))
        mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}[source.profile.xcolor_space.strip()]
        if mode != kind and (mode, kind) != ("RGB", "L"):
            raise ValueError("the profile of another kind of picture")
        name = " ".join((source.profile.profile_description or "unnamed").split())
        transform = _transform(source, mode)
        swatches = Image.fromarray(np.arange(256, dtype=np.uint8)[None]).convert("RGB")
        if mode == "RGB":
            steps = np.linspace(0, 255, 9).astype(np.uint8)
            swatches = Image.fromarray(np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(1, -1, 3))
        before, after = np.asarray(swatches, int), np.asarray(ImageCms.applyTransform(swatches.convert(mode), transform), int)
    except (ImageCms.PyCMSError, OSError, KeyError, ValueError):
        return UNREADABLE_PROFILE, None
    if mode != "CMYK" and np.abs(before - after).max() <= SAME_COLOUR:
        return "", None

    def convert(image: Image.Image) -> np.ndarray:
        # a transform for each picture: threads must not share one
        return np.array(ImageCms.applyTransform(image.convert(mode), _transform(source, mode)))

    return f"{name} to sRGB", convert


def _transform(source: ImageCms.ImageCmsProfile, mode: str) -> ImageCms.ImageCmsTransform:
    flags = ImageCms.Flags.BLACKPOINTCOMPENSATION
    intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
    return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB", renderingIntent=intent, flags=flags)


def _gamma_conversion(gamma: float, points: tuple[float, ...] | None) -> tuple[str, Conversion | None]:
    """PNG's gAMA, and cHRM as (white, red, green, blue) x and y."""
    matrix = None
    if points and len(points) == 8 and all(y > 0 for y in points[1::2]):
        white, red, green, blue = zip(points[::2], points[1::2])
        with suppress(np.linalg.LinAlgError):  # no primaries at all
            matrix = primaries_to_bt709(red, green, blue, white)
            if np.abs(matrix - np.eye(3)).max() < 0.02:
                matrix = None
    if matrix is None and abs(gamma - 1 / 2.2) < 0.01:
        return "", None
    light = (np.linspace(0, 1, 256) ** (1 / gamma)).astype(np.float32)
    return f"gamma {gamma:.3g} to sRGB", lambda image: srgb_of_light(light[np.asarray(image.convert("RGB"))], matrix)


def _coded_colour(image: Image.Image, path: Path) -> Colour | None:
    """Primaries and transfer as H.273 codes: the chunk cICP of PNG, or the box colr of AVIF and HEIF."""
    if image.format not in ("PNG", "AVIF", "HEIF"):
        return None
    with open(path, "rb") as file:
        head = file.read(2**16)
    if image.format == "PNG":
        found = head.find(b"cICP", 0, head.find(b"IDAT"))
        codes = head[found + 4 : found + 6] if found > 0 else b""
    else:
        codes = next((box[5:9:2] for box in _properties_of_primary(head) if box.startswith(b"nclx")), b"")
    return Colour(primaries=codes[0], transfer=codes[1]) if len(codes) == 2 else None


def _properties_of_primary(head: bytes) -> Iterator[bytes]:
    """The contents of the boxes colr of the picture that is shown (ISO/IEC 23008-12). That of a gain map may come before them."""
    meta = next((content for kind, content in _boxes(head) if kind == b"meta"), b"")
    boxes = dict(_boxes(meta[4:]))
    primary = boxes.get(b"pitm", b"")
    shared = dict(_boxes(boxes.get(b"iprp", b"")))
    properties, links = list(_boxes(shared.get(b"ipco", b""))), io.BytesIO(shared.get(b"ipma", b""))

    def number(size: int) -> int:
        return int.from_bytes(links.read(size), "big")

    id_size, link_size = 4 if number(1) else 2, 2 if number(3) & 1 else 1
    for _ in range(min(number(4), len(head)) if primary else 0):
        item, count = number(id_size), number(1)
        for index in [number(link_size) % (1 << (8 * link_size - 1)) for _ in range(count)]:
            if item == int.from_bytes(primary[4:], "big") and 0 < index <= len(properties) and properties[index - 1][0] == b"colr":
                yield properties[index - 1][1]


def _boxes(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Kind and content of each box, as far as it is there."""
    position = 0
    while position + 8 <= len(content):
        size = int.from_bytes(content[position : position + 4], "big")
        yield content[position + 4 : position + 8], content[position + 8 : position + size]
        position += max(size, 8)
