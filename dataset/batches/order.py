"""The order of an epoch: which batches make an optimizer step, and which process computes them."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from dataset.batches.cached_items import CachedGroup
from utils.processes.ranks import split_by_cost


@dataclass(frozen=True)
class PlannedStep:
    """An optimizer step: positions in the items of all groups.

    Attributes:
        batches: of all processes, in the order of the epoch.
        shapes: of the latents of each, (B, C, F, H, W).
        own: the places in ``batches`` of those that this process computes, in their order; none where it only waits.
        most: how many batches the process has that has the most.
    """

    batches: Sequence[list[int]]
    shapes: Sequence[tuple[int, ...]]
    own: Sequence[int]
    most: int


class BatchOrder:
    """An epoch is one list of batches, whatever processes there are; a batch has one dataset and shape, and each item is used once.

    The list depends on the seed, the number of the epoch and, where sizes differ, on the number of batches in a step, which have
    about the same size. The batches of a step go to the ``world_size`` processes so that each gets about the same number of tokens.
    A last batch that is not full is kept, and the last step may have fewer batches than the others, fewer than processes too.

    Args:
        accumulation: batches of a process in one step.
    """

    def __init__(self, groups: Sequence[CachedGroup], seed: int, accumulation: int = 1, rank: int = 0, world_size: int = 1) -> None:
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.batches_per_step = accumulation * world_size
        offsets = accumulate((len(group.items) for group in groups), initial=0)
        shaped = [
            (shape, [offset + position for position in positions], group.dataset.batch_size)
            for offset, group in zip(offsets, groups)
            for shape, positions in group.by_shape().items()
        ]
        self.pools = [(positions, size) for _, positions, size in shaped]
        self._shapes = {position: shape for shape, positions, _ in shaped for position in positions}
        self._full_costs = {  # of batches that are full: the last one of a dataset counts as the others do
            position: size * math.prod(shape[1:]) for shape, positions, size in shaped for position in positions
        }

    def __len__(self) -> int:
        """Batches of an epoch, of all processes."""
        return sum(-(-len(pool) // size) for pool, size in self.pools)

    def batches(self, epoch: int, per_step: int | None = None) -> list[list[int]]:
        """All batches of an epoch, in the order for steps of ``per_step`` batches; by default those of this order."""
        # A generator seeded with text is the same on every platform and Python version.
        order = random.Random(f"{self.seed}:{epoch}")
        batches = []
        for pool, size in self.pools:
            shuffled = order.sample(pool, len(pool))
            batches += [shuffled[start : start + size] for start in range(0, len(shuffled), size)]
        order.shuffle(batches)
        per_step = per_step or self.batches_per_step
        if per_step > 1 and len(set(self._full_costs.values())) > 1:
            return _alike_together(batches, [self._full_costs[batch[0]] for batch in batches], per_step, order)
        return batches

    def steps(self, epoch: int, start: int = 0, per_step: int | None = None) -> Iterator[PlannedStep]:
        """The steps of an epoch from its batch ``start`` on; ``per_step`` as in ``batches``, for the order alone."""
        batches = self.batches(epoch, per_step)
        for place in range(start, len(batches), self.batches_per_step):
            step = batches[place : place + self.batches_per_step]
            shares = split_by_cost([self._cost(batch) for batch in step], self.world_size)
            shapes = [(len(batch), *self._shapes[batch[0]]) for batch in step]
            yield PlannedStep(step, shapes, shares[self.rank], max(map(len, shares)))

    def imbalance(self) -> float:
        """The share of the first epoch in which a process waits for others, on average: 0.1 is 10 %."""
        longest = even = 0.0
        for step in self.steps(0):
            costs = [self._cost(batch) for batch in step.batches]
            longest += max(sum(costs[place] for place in places) for places in split_by_cost(costs, self.world_size))
            even += sum(costs) / self.world_size
        return 1 - even / longest

    def _cost(self, batch: Sequence[int]) -> int:
        """In proportion to the tokens of a batch."""
        return len(batch) * math.prod(self._shapes[batch[0]][1:])


def _alike_together(batches: list[list[int]], costs: list[int], per_step: int, order: random.Random) -> list[list[int]]:
    """Steps of ``per_step`` batches of about the same cost, in random order; the one that is not full comes last."""
    ranked = [
        batches[place] for place in sorted(range(len(batches)), key=costs.__getitem__)
    ]  # stable: random where costs are the same
    whole, rest = divmod(len(ranked), per_step)
    short = order.randrange(whole + 1)  # the step that is not full can be of any size, or it would always be the longest clips
    sizes = [per_step] * whole
    sizes.insert(short, rest)
    ends = list(accumulate(sizes, initial=0))
    steps = [ranked[begin:end] for begin, end in pairwise(ends)]
    last = steps.pop(short)
    order.shuffle(steps)
    return [batch for step in (*steps, last) for batch in step]
