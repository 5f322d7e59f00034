"""One process among several: without a launcher it is alone; work is split so that nobody has much more than the others."""

from __future__ import annotations

import random

import pytest

from utils.processes.ranks import Ranks, join_ranks, split_by_cost


def test_without_a_launcher_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    ranks = join_ranks()
    assert ranks == Ranks() and ranks.is_main
    assert ranks.gather("value") == ["value"]
    ranks.wait()


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_every_position_is_in_one_list_and_sums_are_close(parts: int) -> None:
    random.seed(parts)
    costs = [random.choice((1, 1, 2, 30)) for _ in range(40)]
    lists = split_by_cost(costs, parts)
    assert sorted(position for positions in lists for position in positions) == list(range(40))
    sums = [sum(costs[position] for position in positions) for positions in lists]
    assert max(sums) - min(sums) <= max(costs)


def test_equal_costs_are_dealt_out_in_order() -> None:
    assert split_by_cost([1.0] * 5, 2) == [[0, 2, 4], [1, 3]]
    assert split_by_cost([1.0], 3) == [[0], [], []]
