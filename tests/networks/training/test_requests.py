"""Signals to a training: one stops it after the step, a second one at once, and what a launcher passes on is not a second one."""

from __future__ import annotations

import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

from networks.training import requests
from networks.training.requests import Request, TrainingRequests


@pytest.fixture
def of_processes(tmp_path: Path):
    return lambda count: TrainingRequests(tmp_path, SimpleNamespace(is_main_process=True, num_processes=count))


def test_a_signal_that_arrives_directly_and_from_the_launcher_is_one(of_processes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "TOGETHER", 600.0)
    with of_processes(2) as asked:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert asked.received is Request.TERMINATE
        monkeypatch.setattr(requests, "TOGETHER", 0.0)
        with pytest.raises(SystemExit):
            signal.raise_signal(signal.SIGTERM)


def test_a_second_signal_to_a_training_of_one_process_ends_it(of_processes) -> None:
    with of_processes(1):
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
