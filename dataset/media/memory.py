"""Memory that threads share while they decode, so that many large files at once do not take all there is."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class SharedMemory:
    """So many bytes for all threads."""

    def __init__(self, total: int) -> None:
        self._total = self._free = total
        self._changed = threading.Condition()

    def take(self, size: int, anyway: bool = False) -> bool:
        """Take ``size`` bytes if they are free, or ``anyway``; returns whether they were taken."""
        with self._changed:
            if anyway or size <= max(self._free, 0):
                self._free -= size
                return True
        return False

    def give_back(self, size: int) -> None:
        """What was taken."""
        with self._changed:
            self._free += size
            self._changed.notify_all()

    @contextmanager
    def of(self, size: int) -> Iterator[None]:
        """Wait until ``size`` bytes are free, and have them inside. What needs more than there is has it alone."""
        size = min(size, self._total)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= size)
            self._free -= size
        try:
            yield
        finally:
            self.give_back(size)
