"""Threads that take each other for the processes of a launcher: what the product does in several, in a moment."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest

from utils.processes.ranks import ALONE, Ranks

T = TypeVar("T")
SECONDS = 120
_here = threading.local()


class Meeting:
    """Where values are exchanged: the first ones of all, the second ones, and so on, until somebody ends.

    One thread runs at a time, the one that holds ``change``: networks are built under settings of the whole process.
    """

    def __init__(self, count: int) -> None:
        self.count, self.change, self.broken = count, threading.Condition(), False
        self.values: list[list[bytes]] = [[] for _ in range(count)]

    def exchange(self, index: int, value: Any) -> list[Any]:
        self.values[index].append(pickle.dumps(value))
        turn = len(self.values[index])
        self.change.notify_all()

        def complete() -> bool:
            return all(len(values) >= turn for values in self.values)

        self.change.wait_for(lambda: complete() or self.broken, SECONDS)
        if not complete():
            raise SystemExit("another one has ended")
        return [pickle.loads(values[turn - 1]) for values in self.values]


@dataclass(frozen=True)
class ThreadRanks(Ranks):
    """What others get was pickled, as between processes."""

    meeting: Meeting = field(default_factory=lambda: Meeting(1))

    def gather(self, value: Any) -> list[Any]:
        return self.meeting.exchange(self.index, value)


def in_each(count: int, work: Callable[[Ranks], T]) -> list[T | BaseException]:
    """What ``work`` gives, or raises, in each of ``count`` threads."""
    meeting = Meeting(count)

    def run(index: int) -> T | BaseException:
        _here.ranks = ThreadRanks(index, count, index, None, meeting)
        with meeting.change:
            try:
                return work(_here.ranks)
            except BaseException as error:
                meeting.broken = True
                meeting.change.notify_all()
                return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def join_threads(monkeypatch: pytest.MonkeyPatch, script: Any) -> None:
    """Have a script's main take the thread of ``in_each`` that runs it for its process."""

    @contextmanager
    def joined_ranks(device: str | None = None) -> Iterator[Ranks]:
        yield getattr(_here, "ranks", ALONE)

    monkeypatch.setattr(script, "joined_ranks", joined_ranks)
