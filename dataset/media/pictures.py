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
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageCms

from dataset.media.colour import Colour, primaries_to_bt709, srgb_of_light, to_srgb
from dataset.media.errors import MediaError, reading
from dataset.media.memory import SharedMemory
from dataset.media.resizing import fit_to_bucket

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
# what turns an upright picture into that of the file, by the EXIF orientation
STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.transpose(1, 0, 2),
    6: lambda upright: np.rot90(upright),
    7: lambda upright: upright[::-1, ::-1].transpose(1, 0, 2),
    8: lambda upright: np.rot90(upright, 3),
}
SWAPS_SIDES = frozenset({5, 6, 7, 8})

# Bytes that decoding takes for each pixel at most, and what pictures that are decoded at the same time may take together.
DECODING_BYTES = {"WEBP": 20, "AVIF": 16, "HEIF": 16, "JXL": 16}
USUAL_DECODING_BYTES = 11
MOST_DECODING_BYTES = 2 << 30
BAND_PIXELS = 1 << 21  # that are converted at once

SAME_COLOUR = 2  # of 255: a profile that changes no colour by more is taken for sRGB
UNREADABLE_PROFILE = "unreadable colour profile, taken for sRGB"


_memory = SharedMemory(MOST_DECODING_BYTES)


def read_image(
    path: Path, bucket: tuple[int, int] | None = None, see: Callable[[np.ndarray], object] = lambda pixels: None
) -> np.ndarray:
    """The picture as (H, W, 3) uint8 sRGB, upright. Of an animation the first frame is read.

    Transparent parts become white. 16 bit greys are scaled to 8 bits, floating-point greys from 0..1 or 0..255. Colour profiles,
    PNG's gAMA and cHRM, and HDR of AVIF, HEIF and PNG are converted. All threads together take a bounded amount of memory.

    Args:
        bucket: fit it to this size.
        see: is called with the whole picture before.

    Raises:
        MediaError: missing, not a picture, cut short, too large, or with values that have no agreed meaning.
    """
    with reading(path, "picture", _missing_plugin):
        with Image.open(path, formats=readable_formats()) as image:
            size = image.width * image.height * DECODING_BYTES.get(image.format, USUAL_DECODING_BYTES)
            if size > MOST_DECODING_BYTES:
                raise MediaError(
                    f"picture {path} is too large to open safely ({image.width}x{image.height} pixels); shrink it first."
                )
        del image
        with _memory.of(size):  # until all but the result is freed
            return _read(path, bucket, see)


def _read(path: Path, bucket: tuple[int, int] | None, see: Callable[[np.ndarray], object]) -> np.ndarray:
    with Image.open(path, formats=readable_formats()) as image:
        pixels = picture_to_rgb(image, path)
    del image
    see(pixels)
    return pixels if bucket is None else fit_to_bucket(pixels, bucket)


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
    """An opened picture, see ``read_image``. It is converted in bands, which take little memory beside it."""
    _, to_srgb_of = colour_conversion(image, path)
    orientation = _orientation(image) if image.format in ORIENTATION_IN_HEADER else None
    image.load()
    if image.format not in ORIENTATION_IN_HEADER:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    width, height = image.size
    pixels = np.empty((width, height, 3) if orientation in SWAPS_SIDES else (height, width, 3), np.uint8)
    stored = STORED.get(orientation, lambda upright: upright)(pixels)
    rows = max(1, BAND_PIXELS // width)
    bands = [(0, top, width, min(top + rows, height)) for top in range(0, height, rows)]
    is_grey = image.mode.startswith("I") or image.mode == "F"
    scale = _scale_of_greys(image, bands, path) if is_grey else 1
    for box in bands:
        band = image.crop(box)
        if is_grey:
            band = Image.fromarray(np.rint(np.asarray(band).astype(np.float64) * scale).astype(np.uint8))
        if band.has_transparency_data:
            band = band.convert("RGBA")
            band = Image.alpha_composite(Image.new("RGBA", band.size, "white"), band)
        stored[box[1] : box[3]] = np.asarray(band.convert("RGB")) if to_srgb_of is None else to_srgb_of(band)
    return pixels


def upright_size(image: Image.Image) -> tuple[int, int] | None:
    """(width, height) of ``picture_to_rgb``, from the header of an opened picture; None where that needs decoding."""
    if image.format not in ORIENTATION_IN_HEADER:
        return None
    width, height = image.size
    return (height, width) if _orientation(image) in SWAPS_SIDES else (width, height)


def _orientation(image: Image.Image) -> int | None:
    # the method of the base class: that of PNG decodes the whole picture to look for a tag behind it
    return Image.Image.getexif(image).get(ExifTags.Base.Orientation)


def _scale_of_greys(image: Image.Image, bands: Sequence[tuple[int, int, int, int]], path: Path) -> float:
    """By what to multiply greys of 16 bits (which Pillow may hold as 32 bit integers) or of floating point to get 8 bits."""
    is_float = image.mode == "F"
    extremes = [(values.min(), values.max()) for values in (np.asarray(image.crop(box)).astype(np.float64) for box in bands)]
    low, high = np.min(extremes), np.max(extremes)
    if not (low >= 0 and high <= (255 if is_float else 65535)):  # false for NaN as well
        raise MediaError(f"{path} holds values from {low:g} to {high:g}, which no rule maps to grey; save it with 8 or 16 bits.")
    if is_float:
        return 255 if high <= 1 else 1
    return 255 / 65535


# Pillow keeps pictures in blocks, of 16 MB else; those of such a size go back to the system when they are freed.
Image.core.set_block_size(64 << 20)
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
