"""The processes that a launcher started together: which of them this one is, and how they talk to each other."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """``count`` processes of which this one is number ``index``, from 0; on its machine it is number ``local_index``."""

    index: int = 0
    count: int = 1
    local_index: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.index == 0

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in their order; all must call this together. A value is anything that pickles."""
        if self.count == 1:
            return [value]
        import torch.distributed

        values: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Until all processes are here."""
        self.gather(None)


def join_ranks(device: str | None = None) -> Ranks:
    """Join the process group of the launcher, if there is one: accelerate launch and torchrun say so in the environment.

    Args:
        device: "cpu" where the processes compute there though there are GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Ranks()
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu")
    return Ranks(state.process_index, state.num_processes, state.local_process_index)


def leave_ranks(ranks: Ranks) -> None:
    """Before Python ends: the threads of a process group would abort it."""
    if ranks.count > 1:
        import torch.distributed

        torch.distributed.destroy_process_group()


def split_by_cost(costs: Sequence[float], parts: int) -> list[list[int]]:
    """The positions of ``costs`` in ``parts`` lists whose costs add up to about the same, each in ascending order.

    The largest first, each to the list that has the least so far: at most 4/3 of the best split (Graham, 1969).
    """
    lists: list[list[int]] = [[] for _ in range(parts)]
    sums = [0.0] * parts
    for position in sorted(range(len(costs)), key=lambda position: -costs[position]):
        least = sums.index(min(sums))
        lists[least].append(position)
        sums[least] += costs[position]
    return [sorted(positions) for positions in lists]
