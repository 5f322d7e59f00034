"""One process among several: without a launcher it is alone; work is split so that nobody has much more than the others."""

from __future__ import annotations

import logging
import random

import pytest
import torch
from several_processes import in_each

from utils.devices import pick_device
from utils.errors import UserError
from utils.processes.ranks import VARIABLES, Ranks, join_ranks, joined_ranks, split_by_cost

WHOLE = {"LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29777"}


def test_without_a_launcher_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    ranks = join_ranks()
    assert ranks == Ranks() and ranks.is_main
    assert ranks.gather("value") == ["value"]
    ranks.wait()
    assert ranks.from_main(lambda: "made") == "made"
    assert ranks.map(sorted, [3, 1, 2]) == [1, 2, 3]
    with joined_ranks() as ranks:
        assert ranks == Ranks() and not any(handler.filters for handler in logging.getLogger().handlers)


@pytest.mark.parametrize(
    ("values", "refusal"),
    [
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE is '4', but RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT are missing"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is '', but RANK, WORLD_SIZE, LOCAL_RANK"),
        ({"WORLD_SIZE": "2", "RANK": "x"} | WHOLE, "RANK is 'x'"),
        ({"WORLD_SIZE": "2", "RANK": "2"} | WHOLE, "RANK 2 is not below WORLD_SIZE 2"),
    ],
)
def test_an_environment_that_is_not_of_a_launcher_is_refused(monkeypatch, values: dict[str, str], refusal: str) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=refusal):
        join_ranks()


def test_all_get_what_the_main_process_makes() -> None:
    assert in_each(3, lambda ranks: ranks.from_main(lambda: [ranks.index])) == [[0]] * 3


def test_a_refusal_of_the_main_process_is_one_of_all() -> None:
    def refuse() -> None:
        raise UserError("the lock is held.")

    ended = in_each(3, lambda ranks: ranks.from_main(refuse))
    assert [(type(error), str(error)) for error in ended] == [(UserError, "the lock is held.")] * 3


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7])
def test_a_list_is_mapped_in_parts_and_stays_in_order(count: int) -> None:
    calls: list[int] = []

    def double(values: list[int]) -> list[int]:
        calls.extend(values)
        return [2 * value for value in values]

    values = list(range(count))
    assert in_each(3, lambda ranks: ranks.map(double, values)) == [[2 * value for value in values]] * 3
    assert sorted(calls) == values


def test_each_process_has_the_gpu_of_its_number(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    class Properties:
        def __init__(self, device: torch.device) -> None:
            self.uuid = device.index

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", Properties)
    assert in_each(2, lambda ranks: pick_device(None, ranks).index) == [0, 1]
    assert not caplog.records
    assert in_each(3, lambda ranks: pick_device("cuda", ranks).index) == [0, 1, 0]
    assert "1 of 3 processes share a GPU with another" in caplog.text
    assert in_each(2, lambda ranks: pick_device("cpu", ranks).type) == ["cpu", "cpu"]
    with pytest.raises(UserError, match="--device cuda:1 is one GPU for 2 processes"):
        pick_device("cuda:1", Ranks(0, 2))


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
