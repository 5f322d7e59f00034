"""Files mapped into memory to be read only.

safetensors and torch map files so that what is written to them stays in memory. A system reserves memory for that: Linux refuses
the mapping of a file that is larger than its memory, Windows counts it against the paging file. What is only read costs nothing.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch


class MappedFile:
    """The bytes of a file, which must not change and not be written to: that ends the process.

    Raises:
        OSError: it cannot be opened or mapped.
        ValueError: it is empty.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        with open(path, "rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def tensor(self, dtype: torch.dtype, shape: tuple[int, ...], offset: int) -> torch.Tensor:
        """The contiguous tensor that begins at byte ``offset``; it keeps the mapping alive."""
        count = math.prod(shape)
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            return torch.frombuffer(self._bytes, dtype=dtype, count=count, offset=offset).reshape(shape)

    def storage(self) -> torch.UntypedStorage:
        """All bytes."""
        return self.tensor(torch.uint8, (len(self._bytes),), 0).untyped_storage()


def safetensors_offsets(path: Path) -> dict[str, int]:
    """Where the data of each tensor begins, in bytes from the start of a file that ``safetensors`` found to be valid."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    return {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}


@contextmanager
def torch_maps_read_only() -> Iterator[None]:
    """Inside, ``torch.load(..., mmap=True)`` maps as above; there is no option for it."""

    def from_file(path: str, *_how: object, **_named: object) -> torch.UntypedStorage:
        return MappedFile(path).storage()

    with patch.object(torch.UntypedStorage, "from_file", from_file):
        yield
