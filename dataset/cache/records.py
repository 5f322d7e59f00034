"""What made a cache file, as strings in its metadata, and the comparison with what would make it today.

A record holds the source (bytes, modification time, hash), and under a key of ``REASONS`` each thing that was done to it. A new
step of processing gets a line there and one in ``Target.record``. What either side lacks is not compared, so that caches of other
tools and of earlier versions stay valid.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Collection, Mapping
from pathlib import Path

from dataset.cache.files import CAPTION, bucket_of, read_latent_header
from dataset.media.frame_rate import EVERY_FRAME
from dataset.media.frames import Window

HASH_BYTES = 16
WHOLE_BYTES = 64 * 2**20  # of a larger video only the size, the beginning and the end are hashed
PART_BYTES = 8 * 2**20

SOURCE_BYTES, SOURCE_TIME, SOURCE_HASH = "source_bytes", "source_mtime_ns", "source_hash"
BUCKET, WINDOW, FRAME_RATE, PIXELS, VAE = "bucket", "window", "frame_rate", "pixels", "vae"
TEXT_ENCODERS = ("text_encoder1", "text_encoder2")
TOKENIZERS = ("tokenizer1", "tokenizer2")

SOURCE_REPLACED = "source replaced"
SOURCE_TOUCHED = "source perhaps changed, its time has"
# why a cache does not match, by the key that differs
REASONS = {
    BUCKET: "another size",
    WINDOW: "another window",
    FRAME_RATE: "another frame rate",
    PIXELS: "pixels read in another way",
    VAE: "another VAE",
    CAPTION: "another caption",
    **dict.fromkeys(TEXT_ENCODERS, "another text encoder"),
    **dict.fromkeys(TOKENIZERS, "another tokenizer"),
}


def target_record(bucket: tuple[int, int], window: Window | None = None, frame_rate: str = EVERY_FRAME) -> dict[str, str]:
    """What is done to a source: fitted to ``bucket`` (W, H); of a clip the frames are chosen and a window is cut."""
    record = {BUCKET: f"{bucket[0]}x{bucket[1]}"}
    if window is not None:
        record[WINDOW] = f"{window[0]}-{window[1]}"
    if window not in (None, (0, 1)):  # the first frame is the same at every rate
        record[FRAME_RATE] = frame_rate
    return record


def latents_made(path: Path) -> dict[str, str]:
    """What made the latents in ``path``: the metadata, with the bucket that the tensor has. Errors as in ``read_latent_header``."""
    shape, metadata = read_latent_header(path)
    if SOURCE_HASH in metadata:  # by an earlier version, which read every file in the one way it knew
        metadata = {PIXELS: ""} | metadata
    return metadata | target_record(bucket_of(shape)[:2])


def has_record(made: Mapping[str, str]) -> bool:
    """Whether the metadata of a cache hold a record."""
    return SOURCE_HASH in made or TEXT_ENCODERS[0] in made


def mismatch(made: Mapping[str, str], wanted: Mapping[str, Collection[str]]) -> str | None:
    """The first of ``REASONS`` why a cache is not one of those wanted, None if it is. ``wanted``: the right values by key."""
    return next((why for key, why in REASONS.items() if key in made and key in wanted and made[key] not in wanted[key]), None)


def latents_mismatch(
    made: Mapping[str, str], wanted: Mapping[str, Collection[str]], source: Path | None, kind: str, read_source: bool
) -> str | None:
    """``mismatch`` of latents with a record, and whether their source is the one they were made from.

    ``source``: the media file of ``kind`` "image" or "video", None where it cannot be reached. ``read_source``: whether it may be
    read, to distinguish a copied file from a changed one.
    """
    same = True if source is None else is_same_source(made, source, kind, read_source)
    if same is False:
        return SOURCE_REPLACED
    return mismatch(made, wanted) or (None if same else SOURCE_TOUCHED)


def source_record(path: Path, kind: str) -> dict[str, str]:
    """What a media file is now. Take it before decoding: a change in between is then found."""
    found = os.stat(path)
    digest = _cached_hash(path, kind, found.st_size, found.st_mtime_ns)
    return {SOURCE_BYTES: str(found.st_size), SOURCE_TIME: str(found.st_mtime_ns), SOURCE_HASH: digest}


def is_same_source(made: Mapping[str, str], path: Path, kind: str, read: bool = True) -> bool | None:
    """Whether ``path`` holds what a cache was made from, None where only reading could tell and ``read`` is False.

    A file of the same size and time is not read.
    """
    found = os.stat(path)
    if made.get(SOURCE_BYTES) != str(found.st_size):
        return False
    if made.get(SOURCE_TIME) == str(found.st_mtime_ns):
        return True
    return made[SOURCE_HASH] == _cached_hash(path, kind, found.st_size, found.st_mtime_ns) if read else None


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
