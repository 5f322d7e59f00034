"""Thousands of damaged files of every kind that is read: what each means or one sentence, in time, in bounded memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
FILES, PROCESSES = 10_000, 2


@pytest.mark.slow
def test_damaged_files(tmp_path: Path) -> None:
    """In processes of their own: a library that ends its process must not end the tests."""
    environment, running = os.environ | {"PYTHONPATH": str(TESTS.parent)}, {}
    for seed in range(PROCESSES):
        log = tmp_path / f"{seed}.log"
        command = [sys.executable, TESTS / "fuzzing.py", str(seed), str(FILES // PROCESSES), tmp_path / str(seed)]
        with open(log, "wb") as output:
            running[log] = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    for log, process in running.items():
        status = process.wait(timeout=900)
        answer = log.read_text(encoding="utf-8", errors="replace")
        assert status == 0 and " 0 faults" in answer, answer[-8000:]
