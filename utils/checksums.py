"""Checksums that cost next to nothing beside reading or writing: they find flipped, lost and exchanged bytes, not forgeries."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

from utils.errors import UserError

PAGE_BYTES, PAGES = 4096, 256  # what disks and systems lose or exchange as a whole, and how many are summed at once
PIECE_BYTES = 16 << 20
_FACTOR, _MASK = 0x9E3779B97F4A7C15, (1 << 64) - 1
_WEIGHTS = np.arange(1, 2 * PAGES, 2, dtype=np.uint64) * np.uint64(_FACTOR)  # odd: each loses no bit of a sum
_KIND = "pages-"  # sums of an earlier kind did not notice pages that were exchanged


def checksum(parts: Iterable[np.ndarray]) -> str:
    """Of the bytes of uint8 arrays one after the other; where they are divided makes a difference.

    Each page of 4 KiB is summed as 64-bit words, and the sums are combined in a way that knows their order.
    """
    value = 0
    for part in parts:
        whole, last = part[: len(part) // PAGE_BYTES * PAGE_BYTES], np.zeros(PAGE_BYTES, np.uint8)
        last[: len(part) - len(whole)] = part[len(whole) :]
        for pages in (whole, last):
            words = pages.view(np.uint64).reshape(-1, PAGE_BYTES // 8)  # x86 and ARM read them at any address
            for start in range(0, len(words), PAGES):
                sums = np.add.reduce(words[start : start + PAGES], axis=1)
                value = (value * _FACTOR + int(np.add.reduce(sums * _WEIGHTS[: len(sums)])) + 1) & _MASK
        value = (value * _FACTOR + len(part)) & _MASK
    return f"{_KIND}{value:016x}"


def is_changed(saved: str | None, found: str) -> bool:
    """Whether a checksum that was saved, if it was, is not the one that was found. Those of an earlier kind say nothing."""
    return saved is not None and saved.startswith(_KIND) and saved != found


def tensors_checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    """Of the values of CPU tensors, in the order of their names."""
    flat = (tensors[name].detach().contiguous().reshape(-1).view(torch.uint8).numpy() for name in sorted(tensors))
    return checksum(flat)


def file_checksum(path: str | os.PathLike[str]) -> str:
    """Of all bytes of a file, read in pieces."""
    buffer = np.empty(PIECE_BYTES, np.uint8)

    def pieces() -> Iterable[np.ndarray]:
        with open(path, "rb", buffering=0) as file:
            while size := file.readinto(buffer):
                yield buffer[:size]

    return checksum(pieces())


def content_checksum(content: bytes | memoryview) -> str:
    """``file_checksum`` of a file with this content."""
    whole = np.frombuffer(content, np.uint8)
    return checksum(whole[start : start + PIECE_BYTES] for start in range(0, len(whole), PIECE_BYTES))


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Of the bytes of a file; of a folder, of those of the files in it, one after the other by name.

    Raises:
        UserError: it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        for file in sorted(each for each in Path(path).iterdir() if each.is_file()) if os.path.isdir(path) else [path]:
            for chunk in _chunks(file):
                digest.update(chunk)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}.") from error
    return digest.hexdigest()


def _chunks(path: str | os.PathLike[str]) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while chunk := file.read(PIECE_BYTES):
            yield chunk
