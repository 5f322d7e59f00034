"""Metadata of pictures, videos and latents that generation wrote: how each kind of file holds it, and reading it back."""

from __future__ import annotations

import io
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path

import av
from PIL import Image, PngImagePlugin

from utils.errors import UserError, name_some
from utils.files import require_file
from utils.safetensors_io import read_header

SETTINGS = "settings"  # the key whose value is JSON, for programs; the others are for people
PICTURE = "00000.png"  # the first of a folder of frames

_START = 4 << 20  # bytes; in a GIF the comment stands before the frames
_MAX_TEXT = 16 << 20  # bytes of one text; what generation writes takes a few KB
_EXIF_IFD, _USER_COMMENT, _MAKE, _MODEL = 0x8769, 0x9286, 0x010F, 0x0110
_UNICODE = b"UNICODE\0"
# Keys by which texts of other programs are known.
_TOOLS = {
    "parameters": "AUTOMATIC1111's web UI or one like it",
    "workflow": "ComfyUI",
    "invokeai_metadata": "InvokeAI",
    "sd-metadata": "InvokeAI",
    "fooocus_scheme": "Fooocus",
}


def as_png_text(metadata: Mapping[str, str]) -> PngImagePlugin.PngInfo:
    """A text chunk (iTXt, UTF-8) for each key."""
    text = PngImagePlugin.PngInfo()
    for key, value in metadata.items():
        text.add_itxt(key, value)
    return text


def as_mp4_tags(metadata: Mapping[str, str]) -> dict[str, str]:
    """``comment`` for people, and ``description``, which is JSON of everything."""
    if not metadata:
        return {}
    readable = "; ".join(f"{key}: {value}" for key, value in metadata.items() if key != SETTINGS)
    return {"comment": readable, "description": as_json(metadata)}


def as_exif(metadata: Mapping[str, str]) -> Image.Exif:
    """The user comment of EXIF (CIPA DC-008), in UTF-16: JSON of everything."""
    exif = Image.Exif()
    if metadata:
        exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = _UNICODE + as_json(metadata).encode("utf-16-be")
    return exif


def as_json(metadata: Mapping[str, str]) -> str:
    """One line of JSON in which every letter is itself; the comment of a GIF."""
    return json.dumps(dict(metadata), ensure_ascii=False)


def read_media_metadata(path: str | os.PathLike[str], flag: str) -> dict[str, str]:
    """What generation wrote into a PNG (or the first of a folder of PNG), MP4, WebP, GIF or safetensors file.

    Only texts are read; no frame is decoded.

    Raises:
        UserError: not such a file, damaged, without metadata, or with that of another tool; names ``flag``.
    """
    path = Path(path)
    path = require_file(path / PICTURE if path.is_dir() else path, flag)
    try:
        with open(path, "rb") as file:
            start = file.read(16)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged EXIF
            found = _read(path, start)
    except UserError:
        raise
    except Exception as error:  # readers of pictures and videos fail in many ways on damaged files
        raise UserError(f"{flag} {path} cannot be read ({error}). It may be damaged: copy it again.") from error
    if SETTINGS not in found and not {"prompt", "seed", "infer_steps"} <= found.keys():
        raise UserError(f"{flag} {path} {_whose(found)}. Give a file that this script wrote.")
    return found


def _read(path: Path, start: bytes) -> dict[str, str]:
    if start.startswith(b"\x89PNG"):
        with Image.open(path, formats=["PNG"]) as picture:
            return {key: str(value) for key, value in picture.info.items() if isinstance(value, str)}
    if start.startswith(b"GIF8"):
        with open(path, "rb") as file, Image.open(io.BytesIO(file.read(_START)), formats=["GIF"]) as picture:
            return _entries("comment", picture.info.get("comment", b"").decode("utf-8", "replace"))
    if start.startswith(b"RIFF") and start[8:12] == b"WEBP":
        return _of_exif(_riff_chunk(path, b"EXIF"))
    if start[4:8] == b"ftyp":
        with av.open(str(path), metadata_errors="replace") as container:
            tags = dict(container.metadata)
        whole = _entries("description", tags.get("description", ""))
        return whole if SETTINGS in whole else _entries("comment", tags.get("comment", "")) | whole
    return read_header(path).metadata


def _riff_chunk(path: Path, name: bytes) -> bytes:
    """The content of a chunk; empty where there is none (https://developers.google.com/speed/webp/docs/riff_container)."""
    with open(path, "rb") as file:
        file.seek(12)
        while len(header := file.read(8)) == 8:
            size = int.from_bytes(header[4:], "little")
            if header[:4] == name:
                if size > _MAX_TEXT:
                    raise ValueError(f"its metadata takes {size >> 20} MB")
                return file.read(size)
            file.seek(size + size % 2, os.SEEK_CUR)
    return b""


def _of_exif(data: bytes) -> dict[str, str]:
    exif = Image.Exif()
    exif.load(data)
    comment = exif.get_ifd(_EXIF_IFD).get(_USER_COMMENT, b"")
    if isinstance(comment, bytes):
        comment = comment[8:].decode("utf-16-be" if comment.startswith(_UNICODE) else "utf-8", "replace")
    others = (str(exif.get(tag, "")).partition(":") for tag in (_MAKE, _MODEL))  # where ComfyUI writes
    return {key: value for key, colon, value in others if colon} | _entries("comment", comment)


def _entries(key: str, text: str) -> dict[str, str]:
    """Those of a text that is JSON of several; else the text itself under ``key``."""
    if not text:
        return {}
    try:
        values = json.loads(text) if len(text) <= _MAX_TEXT else None
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        return {"parameters" if "Steps: " in text and "Sampler: " in text else key: text}
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}


def _whose(found: Mapping[str, str]) -> str:
    """What a file holds in place of our metadata, to complete "the file ..."."""
    if not found:
        return "holds no metadata: it was written with --no_metadata, or another program removed it"
    if found.get("comment", "").startswith("prompt: "):
        return f"was written by an older version, which stored nothing but this: {found['comment']}"
    tool = next((tool for key, tool in _TOOLS.items() if key in found), None)
    if tool is None and '"class_type"' in found.get("prompt", ""):
        tool = "ComfyUI"
    if tool is None and any(key.startswith(("ss_", "modelspec.")) for key in found):
        return "is a trained model; convert_lora.py --check shows a LoRA"
    if tool is None and found.get("Software") == "NovelAI":
        tool = "NovelAI"
    return f"holds metadata of another tool ({tool or 'with ' + name_some(found)})"
