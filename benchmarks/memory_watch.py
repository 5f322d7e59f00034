"""Memory of a process that no file backs, and functions in processes of their own. Linux only, as it reads /proc."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")


def anonymous_memory() -> int:
    """Bytes of this process that no file backs, in memory or swapped out."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return sum(int(status.partition(f"{line}:")[2].split()[0]) for line in ("RssAnon", "VmSwap")) * 1024


class MemoryWatch:
    """Context that samples anonymous memory in a thread, every ``seconds``.

    Attributes:
        highest: the most it saw, in bytes.
        above_start: the same above the start.
    """

    def __init__(self, seconds: float = 0.001) -> None:
        self._seconds = seconds

    def __enter__(self) -> MemoryWatch:
        self._start = self.highest = anonymous_memory()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._done.wait(self._seconds):
            self.highest = max(self.highest, anonymous_memory())

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()
        self.highest = max(self.highest, anonymous_memory())
        self.above_start = self.highest - self._start


def in_new_process(function: Callable[..., T], *arguments: object) -> T:
    """``function(*arguments)`` of a process that does nothing else, with as many threads of torch as this one."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),)) as pool:
        return pool.submit(function, *arguments).result()
