"""Threads in place of the processes of a launcher: what only asks for ``Ranks`` runs in one process, in a moment."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from utils.processes.ranks import Ranks

T = TypeVar("T")

SECONDS = 60


@dataclass
class Table:
    """Where the threads lay down what they say."""

    count: int
    values: dict[int, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.meeting = threading.Barrier(self.count, timeout=SECONDS)


class ThreadRanks(Ranks):
    """One of the threads, whose ``group`` is a table."""

    def gather(self, value: T) -> list[T]:
        self.group.values[self.index] = pickle.dumps(value)
        self.group.meeting.wait()
        values: list[Any] = [pickle.loads(self.group.values[index]) for index in range(self.count)]
        self.group.meeting.wait()
        return values


def in_threads(function: Callable[[Ranks], T], local_indices: Sequence[int]) -> list[T]:
    """``function`` of each thread, of which there is one for each of ``local_indices``. One that fails ends all."""
    table = Table(len(local_indices))

    def run(index: int) -> T:
        try:
            return function(ThreadRanks(index, table.count, local_indices[index], table))
        except BaseException:
            table.meeting.abort()
            raise

    with ThreadPoolExecutor(table.count) as pool:
        return [future.result() for future in [pool.submit(run, index) for index in range(table.count)]]
