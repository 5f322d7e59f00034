"""A line in the log when a run makes no progress for a minute: what it waits for, and where."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

logger = logging.getLogger(__name__)

SECONDS = 60.0
SLOWER = 3  # times as long as the same thing took before is no progress either, where that took minutes
LOOKS = 4  # at what is done, in so many seconds
STEP, OTHERS = "making step", "waiting for the other processes"  # what all processes do while one of them does something else


@dataclass
class Doing:
    """Something that is being done since ``since``, on the monotonic clock."""

    what: str
    where: Callable[[], str]
    since: float


class Watchdog:
    """While it is open, a thread looks whether what was begun last takes too long; it says so once, and at twice the time again.

    ``process``: of several the first one says so of itself; another one where it may be what the first one waits for.
    """

    def __init__(self, seconds: float = SECONDS, process: int = 0) -> None:
        self._seconds, self._process = seconds, process
        self._doing: list[Doing] = []
        self._longest: dict[str, float] = {}
        self._closed = threading.Event()

    def __enter__(self) -> Watchdog:
        self._closed.clear()
        threading.Thread(target=self._look, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()

    @contextmanager
    def during(self, what: str, where: Callable[[], str] = str) -> Iterator[None]:
        """``what`` is done inside, always in the same words; ``where`` says more when it is asked, from another thread."""
        doing = Doing(what, where, time.monotonic())
        self._doing.append(doing)
        try:
            yield
        finally:
            self._doing.remove(doing)
            self._longest[what] = max(self._longest.get(what, 0.0), time.monotonic() - doing.since)
            self.progress()

    def progress(self) -> None:
        """What is being done got on."""
        for doing in self._doing:
            doing.since = time.monotonic()

    def _look(self) -> None:
        said: tuple[Doing | None, float, float] = (None, 0.0, 0.0)  # of what, since when, and after how long
        while not self._closed.wait(min(LOOKS, self._seconds / LOOKS)):
            with suppress(IndexError):  # it was done just now
                doing = self._doing[-1]
                since, seconds = doing.since, time.monotonic() - doing.since
                allowed = max(self._seconds, SLOWER * self._longest.get(doing.what, 0.0))
                if said[:2] == (doing, since):
                    allowed = 2 * said[2]
                if seconds >= allowed:
                    said = (doing, since, seconds)
                    self._say(f"no progress for {seconds:.0f} s: {doing.what} {_asked(doing.where)}", doing.what)

    def _say(self, sentence: str, what: str) -> None:
        if self._process == 0:
            logger.warning("%s", sentence)
        elif what not in (STEP, OTHERS):  # as an error: warnings are those of the first process
            logger.error("process %d: %s", self._process, sentence)


def _asked(where: Callable[[], str]) -> str:
    try:
        return where()
    except Exception as error:  # whatever reads while it is changed
        return f"({type(error).__name__})"
