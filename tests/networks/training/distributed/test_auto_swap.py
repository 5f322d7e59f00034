"""The memory plan of several processes: one number of swapped blocks, and the RAM of each machine for those on it."""

from __future__ import annotations

import logging

import pytest

from networks.training import preflight


def test_auto_goes_by_the_fullest_gpu_of_all_processes(train, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    def gather(said: list[object]) -> list[object]:
        return [*said, 2] if isinstance(said[0], int) else said  # another process chose 2

    monkeypatch.setattr("networks.training.preflight.gather_object", gather)
    with caplog.at_level(logging.INFO):
        ended = train("--blocks_to_swap", "auto", "--max_train_steps", 1)
    assert ended.status == 0
    messages = [record.message for record in caplog.records]
    assert "--blocks_to_swap auto: 2, for the GPU with the least free memory" in messages
    assert any(message.startswith("4 of 6 blocks") for message in messages)


def test_processes_of_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "gather_object", lambda said: [*said, "another", *said, "another"])
    assert preflight.processes_here() == 2
