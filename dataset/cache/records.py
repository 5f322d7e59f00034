"""What was done to a file to make its cache, as strings in the metadata of the cache, so that a later run finds what changed.

Latents carry the source (bytes, modification time, hash), the bucket, the window, how frames were chosen, and the VAE; text
encoder outputs carry the caption, the encoders and the tokenizers. A new processing step gets its key here: written by
``latent_record`` and compared by ``freshness.latents_mismatch``. Caches without a record, of other tools or of earlier versions,
stay valid.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from dataset.media.frames import Window

HASH_BYTES = 16
WHOLE_BYTES = 64 * 2**20  # of a larger video only the size, the beginning and the end are hashed
PART_BYTES = 8 * 2**20

SOURCE_BYTES, SOURCE_TIME, SOURCE_HASH = "source_bytes", "source_mtime_ns", "source_hash"
BUCKET, WINDOW, FRAME_RATE, VAE = "bucket", "window", "frame_rate", "vae"
TEXT_ENCODERS = ("text_encoder1", "text_encoder2")
TOKENIZERS = ("tokenizer1", "tokenizer2")


def source_record(path: Path, kind: str) -> dict[str, str]:
    """What a media file of ``kind`` "image" or "video" is now. Take it before decoding: a change in between is then found."""
    found = os.stat(path)
    digest = _cached_hash(path, kind, found.st_size, found.st_mtime_ns)
    return {SOURCE_BYTES: str(found.st_size), SOURCE_TIME: str(found.st_mtime_ns), SOURCE_HASH: digest}


@functools.lru_cache(maxsize=256)
def _cached_hash(path: Path, kind: str, size: int, mtime_ns: int) -> str:
    """``hash_source``, once for all windows of a clip."""
    return hash_source(path, kind)


def hash_source(path: Path, kind: str) -> str:
    """BLAKE2b of the file; of a video beyond 64 MiB, of its size and its first and last 8 MiB."""
    digest = hashlib.blake2b(digest_size=HASH_BYTES)
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if kind == "video" and size > WHOLE_BYTES:
            digest.update(str(size).encode())
            digest.update(file.read(PART_BYTES))
            file.seek(size - PART_BYTES)
        while part := file.read(PART_BYTES):
            digest.update(part)
    return digest.hexdigest()


def is_same_source(record: Mapping[str, str], path: Path, kind: str, read: bool = True) -> bool | None:
    """Whether ``path`` holds what a cache was made from. A file of the same size and time is not read.

    Returns:
        None where only reading the file could tell, and ``read`` is False.
    """
    found = os.stat(path)
    if record.get(SOURCE_BYTES) != str(found.st_size):
        return False
    if record.get(SOURCE_TIME) == str(found.st_mtime_ns):
        return True
    return record[SOURCE_HASH] == _cached_hash(path, kind, found.st_size, found.st_mtime_ns) if read else None


def latent_record(bucket: tuple[int, int], window: Window | None, frame_rate: str | None, vae: str) -> dict[str, str]:
    """How latents were made from their source.

    ``frame_rate``: how the frames of a clip were chosen; None with the window of a picture. ``vae``: the fingerprint of its
    weights.
    """
    record = {BUCKET: f"{bucket[0]}x{bucket[1]}", VAE: vae}
    if window is not None and frame_rate is not None:
        record |= {WINDOW: f"{window[0]}-{window[1]}", FRAME_RATE: frame_rate}
    return record


def has_record(metadata: Mapping[str, str]) -> bool:
    """Whether the metadata of a cache hold a record of what made it."""
    return SOURCE_HASH in metadata or TEXT_ENCODERS[0] in metadata
