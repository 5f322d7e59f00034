"""--blocks_to_swap auto is one number for all processes."""

from __future__ import annotations

import logging

import pytest


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
