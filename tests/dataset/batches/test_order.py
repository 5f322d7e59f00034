"""The order of an epoch: the same for any number of processes, each item once, and steps that keep no process waiting."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from dataset.batches.cached_items import CachedGroup, CachedItem
from dataset.batches.order import BatchOrder, PlannedStep
from dataset.config import DatasetConfig

PICTURE, CLIP, LONG = (16, 1, 4, 4), (16, 5, 4, 4), (16, 9, 8, 8)


def groups_of(*shapes: tuple[int, ...], batch_size: int = 1, repeats: int = 1) -> list[CachedGroup]:
    """Two groups without files: the items of even places, and the others, which are used ``repeats`` times."""
    groups = []
    for index, part in enumerate((shapes[::2], shapes[1::2])):
        items = [CachedItem(str(n), None, Path(str(n)), Path(str(n)), shape) for n, shape in enumerate(part)]
        times = repeats if index else 1
        dataset = DatasetConfig(index, "video", Path("x"), None, Path("x"), batch_size=batch_size, num_repeats=times)
        groups.append(CachedGroup(dataset, tuple(items)))
    return groups


def epoch_of_all(groups: list[CachedGroup], processes: int, accumulation: int = 1, epoch: int = 0) -> list[list[PlannedStep]]:
    """The steps of every process."""
    return [[*BatchOrder(groups, 3, accumulation, rank, processes).steps(epoch)] for rank in range(processes)]


MIXED = (PICTURE, CLIP, PICTURE, LONG, CLIP, CLIP, PICTURE, LONG, LONG, PICTURE, PICTURE)


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
@pytest.mark.parametrize("shapes", [MIXED, MIXED[:4], (PICTURE,) * 7, (PICTURE, CLIP)], ids=["mixed", "few", "alike", "two"])
def test_all_processes_together_use_each_item_once(shapes, processes):
    groups = groups_of(*shapes, batch_size=2, repeats=3)
    ranks = epoch_of_all(groups, processes)
    assert len({len(steps) for steps in ranks}) == 1, "each takes part in every step"
    used = Counter(index for steps in ranks for step in steps for place in step.own for index in step.batches[place])
    first = len(groups[0].items)
    assert used == {index: 1 if index < first else 3 for index in range(len(shapes))}
    for steps in zip(*ranks):
        assert sorted(place for step in steps for place in step.own) == list(range(len(steps[0].batches)))
        assert all(step.batches == steps[0].batches and step.shapes == steps[0].shapes for step in steps)


def test_a_global_batch_is_the_same_for_any_number_of_processes():
    groups = groups_of(*MIXED)
    for epoch in range(3):
        orders = [epoch_of_all(groups, processes, 12 // processes, epoch)[0] for processes in (1, 2, 3, 4, 6, 12)]
        assert all([step.batches for step in steps] == [step.batches for step in orders[0]] for steps in orders)


def test_where_sizes_are_alike_the_order_depends_on_nothing_but_seed_and_epoch():
    groups = groups_of(*(PICTURE,) * 9, batch_size=2)
    assert BatchOrder(groups, 3, 4).batches(2) == BatchOrder(groups, 3).batches(2)
    assert BatchOrder(groups, 3, 4).batches(2) != BatchOrder(groups, 3, 4).batches(1)


def test_an_epoch_goes_on_where_it_was_left_also_with_other_steps():
    groups = groups_of(*MIXED)
    order = BatchOrder(groups, 3, accumulation=2)
    whole = order.batches(4)
    assert [batch for step in order.steps(4, start=6) for batch in step.batches] == whole[6:]
    other = BatchOrder(groups, 3, accumulation=3)
    assert other.batches(4) != whole
    assert [batch for step in other.steps(4, start=6, per_step=2) for batch in step.batches] == whole[6:]


def test_no_process_waits_for_the_long_clip_of_another():
    groups = groups_of(*(PICTURE, CLIP, LONG) * 8)
    for processes in (2, 4, 8):
        assert BatchOrder(groups, 3, 1, 0, processes).imbalance() == pytest.approx(0)
    # 24 batches in steps of 5: the steps at the borders between sizes are mixed
    assert 0 < BatchOrder(groups, 3, 1, 0, 5).imbalance() < 0.4
    assert BatchOrder(groups_of(PICTURE), 3, 3, 0, 4).imbalance() == pytest.approx(3 / 4), "one batch for four processes"
    steps = [step.shapes for step in BatchOrder(groups, 3, 4).steps(0)]
    sizes = [{frames * height * width // 16 for _, _, frames, height, width in shapes} for shapes in steps]
    assert all(len(each) == 1 for each in sizes) and set().union(*sizes) == {1, 5, 36}
    assert [*map(min, sizes)] != sorted(map(min, sizes)), "sizes come in random order"


def test_the_step_that_is_not_full_is_not_always_of_the_longest_clips():
    groups = groups_of(*(PICTURE, CLIP, LONG) * 3)
    last = {[*BatchOrder(groups, 3, 2).steps(epoch)][-1].shapes[0] for epoch in range(20)}
    assert {len([*BatchOrder(groups, 3, 2).steps(epoch)][-1].batches) for epoch in range(20)} == {1}
    assert len(last) == 3
