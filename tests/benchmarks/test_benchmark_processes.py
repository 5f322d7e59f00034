"""The benchmark of several processes: its data sets are what it says, and starts are taken off."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import processes
from benchmarks.processes import Time, Work, draw_dataset, measure
from dataset import load_dataset_config
from dataset.cache.preparation import plan_targets
from dataset.items import list_items


@pytest.mark.parametrize("clips", [False, True])
def test_the_items_are_whole_and_have_captions(tmp_path: Path, clips: bool) -> None:
    (dataset,) = load_dataset_config(draw_dataset(tmp_path / "drawn", 3, clips)).datasets
    items = list_items(dataset)
    assert len(items) == 3 and all(item.caption for item in items)
    assert [target.frames for item in items for target in plan_targets(item)] == [9 if clips else 1] * 3


def test_the_start_is_taken_off(tmp_path: Path, monkeypatch) -> None:
    calls = []

    def run(script: str, flags: list[object], count: int) -> Time:
        calls.append((flags[0], count))
        return Time(10 + flags[0] / count, 20 + flags[0])

    monkeypatch.setattr(processes, "run", run)
    work = Work("x.py", 100, 20, lambda folder, items: [items], lambda folder: None)
    assert measure(work, 2, 3, tmp_path) == {1: Time(80, 80), 2: Time(40, 80)}
    assert calls == [(20, 1), (100, 1), (20, 2), (100, 2)] * 3
