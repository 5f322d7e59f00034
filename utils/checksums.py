"""Checksums that cost next to nothing beside reading or writing: they find flipped, lost and exchanged bytes, not forgeries."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

from utils.errors import UserError

BLOCK_BYTES = 1 << 20
_FACTOR, _MASK = 0x9E3779B97F4A7C15, (1 << 64) - 1


def checksum(parts: Iterable[np.ndarray]) -> str:
    """Of the bytes of uint8 arrays one after the other, 16 hexadecimal digits; where they are divided makes a difference.

    Each block of 1 MiB is summed as 64-bit words, and the sums are combined in a way that knows their order.
    """
    value = 0
    for part in parts:
        words = part[: len(part) // 8 * 8].view(np.uint64)  # x86 and ARM read them at any address
        for start in range(0, len(words), BLOCK_BYTES // 8):
            value = (value * _FACTOR + int(np.add.reduce(words[start : start + BLOCK_BYTES // 8])) + 1) & _MASK
        rest = int.from_bytes(part[len(words) * 8 :].tobytes(), "little")
        value = (value * _FACTOR + rest + len(part) + 1) & _MASK
    return f"{value:016x}"


def tensors_checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    """Of the values of CPU tensors, in the order of their names."""
    flat = (tensors[name].detach().contiguous().reshape(-1).view(torch.uint8).numpy() for name in sorted(tensors))
    return checksum(flat)


def file_checksum(path: str | os.PathLike[str]) -> str:
    """Of all bytes of a file, read in pieces."""
    buffer = np.empty(16 * BLOCK_BYTES, np.uint8)

    def pieces() -> Iterable[np.ndarray]:
        with open(path, "rb", buffering=0) as file:
            while size := file.readinto(buffer):
                yield buffer[:size]

    return checksum(pieces())


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
        while chunk := file.read(BLOCK_BYTES):
            yield chunk
