"""Files mapped into memory to be read only, and reading the next tensors from disk while the one before is converted.

safetensors and torch map files so that what is written to them stays in memory. A system reserves memory for that: Linux refuses
the mapping of a file that is larger than its memory, Windows counts it against the paging file. What is only read costs nothing.

A mapped tensor is read when its memory is first accessed. ``read_ahead`` lets a thread read and map the pages of the tensors
that come next: what then converts them waits neither for the disk nor for the page to be mapped.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import queue
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from functools import cache

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]

AHEAD_BYTES = 256 << 20  # file pages, which the system can drop; no memory of the process
PAGE_BYTES = 4096
POPULATE_READ = 22  # MADV_POPULATE_READ of Linux 5.14, which Python has no name for
PIECE_BYTES = 16 << 20  # between two looks at whether anyone still waits


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

    def pieces(self, dtype: torch.dtype, shape: tuple[int, ...], offset: int) -> tuple[torch.Tensor]:
        """``tensor`` alone in a tuple."""
        return (self.tensor(dtype, shape, offset),)

    def storage(self) -> torch.UntypedStorage:
        """All bytes."""
        return self.tensor(torch.uint8, (len(self._bytes),), 0).untyped_storage()


@contextmanager
def torch_maps_read_only() -> Iterator[None]:
    """Inside, ``torch.load(..., mmap=True)`` maps as above; there is no option for it."""

    def from_file(path: str, *_how: object, **_named: object) -> torch.UntypedStorage:
        return MappedFile(path).storage()

    before = torch.UntypedStorage.from_file
    torch.UntypedStorage.from_file = from_file
    try:
        yield
    finally:
        torch.UntypedStorage.from_file = before


@contextmanager
def read_ahead(
    names: Iterable[str], get: Callable[[str], Tensors], ahead_bytes: int = AHEAD_BYTES
) -> Iterator[Iterator[tuple[str, Tensors]]]:
    """Context whose value yields (name, tensors) in order; meanwhile a thread reads about ``ahead_bytes`` of those that follow.

    Args:
        get: the tensors of a name, which may lie in a mapped file. Called in order and in this thread only.
    """
    waiting: queue.SimpleQueue[Tensors | None] = queue.SimpleQueue()
    over = threading.Event()
    thread = threading.Thread(target=_read_all, args=(waiting, over), daemon=True)
    thread.start()
    try:
        with closing(_in_order(names, get, ahead_bytes, waiting)) as tensors:
            yield tensors
    finally:
        over.set()
        waiting.put(None)
        thread.join()


def _in_order(
    names: Iterable[str], get: Callable[[str], Tensors], ahead_bytes: int, waiting: queue.SimpleQueue[Tensors | None]
) -> Iterator[tuple[str, Tensors]]:
    coming: deque[tuple[str, Tensors]] = deque()
    held = 0
    for name in names:
        tensors = get(name)
        coming.append((name, tensors))
        waiting.put(tensors)
        held += _bytes(tensors)
        del tensors
        while held > ahead_bytes and len(coming) > 1:
            held -= _bytes(coming[0][1])
            yield coming.popleft()
    while coming:
        yield coming.popleft()


def _bytes(tensors: Tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _read_all(waiting: queue.SimpleQueue[Tensors | None], over: threading.Event) -> None:
    while (tensors := waiting.get()) is not None:
        for tensor in tensors:
            if tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.numel():
                for piece in tensor.view(-1).view(torch.uint8).split(PIECE_BYTES):
                    if over.is_set():
                        return
                    _read(piece)
                    del piece
            del tensor
        del tensors


def _read(piece: Tensor) -> None:
    """Have the pages of ``piece``, contiguous bytes, read and mapped."""
    start = piece.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    madvise = _madvise()
    if madvise is None or madvise(start, piece.data_ptr() + len(piece) - start, POPULATE_READ) != 0:  # an older system
        piece[::PAGE_BYTES].sum()  # takes ten times the processor's time, for which the conversion waits


@cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if sys.platform != "linux":
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function
