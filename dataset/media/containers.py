"""Whether a video file was cut short, from the sizes written in it and without decoding.

Decoders play the part that is there, some of them without a word, so that half a download would pass for a short clip.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

_EBML_HEADER = b"\x1a\x45\xdf\xa3"
_MATROSKA_SEGMENT = b"\x18\x53\x80\x67"


def missing_bytes(path: Path) -> int:
    """How many bytes an MP4, MOV, MKV or WebM file lacks at its end; 0 if whole or of another kind."""
    with open(path, "rb") as file:
        end = os.fstat(file.fileno()).st_size
        head = file.read(12)
        file.seek(0)
        if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
            return max(0, _mp4_end(file, end) - end)
        if head[:4] == _EBML_HEADER:
            return max(0, _matroska_end(file, end) - end)
    return 0


def _mp4_end(file: BinaryIO, end: int) -> int:
    """Where the last top-level box (ISO/IEC 14496-12: 32 bit size, type, optional 64 bit size) should end."""
    position = 0
    while position + 8 <= end:
        file.seek(position)
        box = file.read(16)
        size = int.from_bytes(box[:4], "big")
        if size == 1:
            size = int.from_bytes(box[8:16], "big")
        if size < 8:  # 0: the box reaches to the end of the file; other values are damage that the demuxer reports
            return end
        position += size
    return position


def _matroska_end(file: BinaryIO, end: int) -> int:
    """Where the segment (RFC 8794: identifier, size as a variable-length number, content) should end."""
    file.seek(4)
    header_size = _read_matroska_size(file)
    if header_size is None:
        return end
    file.seek(header_size, os.SEEK_CUR)
    if file.read(4) != _MATROSKA_SEGMENT:
        return end
    segment_size = _read_matroska_size(file)
    return end if segment_size is None else file.tell() + segment_size


def _read_matroska_size(file: BinaryIO) -> int | None:
    """A variable-length number: the leading zero bits of the first byte count the bytes that follow. None if unknown."""
    first = file.read(1)
    if not first or first == b"\0":
        return None
    following = 8 - first[0].bit_length()
    bits = 7 * (following + 1)
    value = int.from_bytes(first + file.read(following), "big") & ((1 << bits) - 1)
    return None if value == (1 << bits) - 1 else value  # all ones: a live stream that never learned its size
