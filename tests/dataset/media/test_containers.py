"""Missing bytes of video files, from the sizes that the formats write down."""

from __future__ import annotations

import pytest

from dataset.media.containers import missing_bytes


def box(kind: bytes, content: bytes, wide: bool = False) -> bytes:
    """An MP4 box, with a 64 bit size if ``wide``."""
    if wide:
        return (1).to_bytes(4, "big") + kind + (16 + len(content)).to_bytes(8, "big") + content
    return (8 + len(content)).to_bytes(4, "big") + kind + content


EBML = b"\x1a\x45\xdf\xa3\x84abcd"
SEGMENT = b"\x18\x53\x80\x67"

WHOLE = {
    "mp4": box(b"ftyp", bytes(12)) + box(b"moov", bytes(30)) + box(b"mdat", bytes(100)),
    "mp4 with a 64 bit size": box(b"ftyp", bytes(12)) + box(b"mdat", bytes(100), wide=True),
    "matroska": EBML + SEGMENT + b"\x40\x64" + bytes(100),
    "matroska with a long size": EBML + SEGMENT + b"\x01" + (100).to_bytes(7, "big") + bytes(100),
}


@pytest.mark.parametrize("name", WHOLE)
def test_lacking_bytes_are_counted(tmp_path, name):
    path = tmp_path / "video"
    path.write_bytes(WHOLE[name])
    assert missing_bytes(path) == 0
    path.write_bytes(WHOLE[name][:-60])
    assert missing_bytes(path) == 60
    path.write_bytes(WHOLE[name] + bytes(5))  # padding after the end harms nobody
    assert missing_bytes(path) == 0


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"RIFF1234AVI ",
        box(b"ftyp", bytes(12)) + b"\0\0\0\0mdat" + bytes(9),  # to the end of the file
        box(b"ftyp", bytes(12)) + b"\0\0\0\3mdat" + bytes(9),  # damage, which the demuxer reports
        EBML + SEGMENT + b"\x01" + b"\xff" * 7 + bytes(9),  # a live stream
        EBML + SEGMENT + b"\xff" + bytes(9),
        EBML + b"\x12\x34\x56\x78\x81a",
        EBML[:4],
    ],
)
def test_files_that_state_no_size_lack_nothing(tmp_path, content):
    (tmp_path / "video").write_bytes(content)
    assert missing_bytes(tmp_path / "video") == 0
