"""Reading the next tensors of a mapped file from disk while the one before them is converted.

A mapped tensor is read when its memory is first looked at. A thread looks at one byte of each page of the tensors that come
next: what then converts them waits neither for the disk nor for the page to be mapped.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager

import torch
from torch import Tensor

AHEAD_BYTES = 256 << 20  # file pages, which the system can drop; no memory of the process
PAGE_BYTES = 4096
PIECE_BYTES = 16 << 20  # between two looks at whether anyone still waits


@contextmanager
def read_ahead(
    names: Iterable[str], get: Callable[[str], Tensor], ahead_bytes: int = AHEAD_BYTES
) -> Iterator[Iterator[tuple[str, Tensor]]]:
    """Context whose value yields (name, tensor) in order; meanwhile a thread reads about ``ahead_bytes`` of those that follow.

    Args:
        get: the tensor of a name, which may lie in a mapped file. Called in order and in this thread only.
    """
    waiting: queue.SimpleQueue[Tensor | None] = queue.SimpleQueue()
    over = threading.Event()
    thread = threading.Thread(target=_touch_all, args=(waiting, over), daemon=True)
    thread.start()
    try:
        with closing(_in_order(names, get, ahead_bytes, waiting)) as tensors:
            yield tensors
    finally:
        over.set()
        waiting.put(None)
        thread.join()


def _in_order(
    names: Iterable[str], get: Callable[[str], Tensor], ahead_bytes: int, waiting: queue.SimpleQueue[Tensor | None]
) -> Iterator[tuple[str, Tensor]]:
    coming: deque[tuple[str, Tensor]] = deque()
    held = 0
    for name in names:
        tensor = get(name)
        coming.append((name, tensor))
        waiting.put(tensor)
        held += tensor.nbytes
        del tensor
        while held > ahead_bytes and len(coming) > 1:
            held -= coming[0][1].nbytes
            yield coming.popleft()
    while coming:
        yield coming.popleft()


def _touch_all(waiting: queue.SimpleQueue[Tensor | None], over: threading.Event) -> None:
    while (tensor := waiting.get()) is not None:
        if tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.numel():
            for piece in tensor.view(-1).view(torch.uint8).split(PIECE_BYTES):
                if over.is_set():
                    return
                piece[::PAGE_BYTES].sum()
        del tensor
