"""Progress bars: quiet in log files, and redrawn only when due."""

from __future__ import annotations

import io
import sys

import pytest

from utils.progress import ProgressBar


def stderr(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> io.StringIO:
    """What is written to stderr from now on."""
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def steps(count: int, **options: object) -> None:
    with ProgressBar(total=count, desc="training", **options) as bar:
        for step in range(count):
            bar.set_postfix(loss=step)
            bar.update()


def test_a_log_file_gets_a_line_at_the_start_and_at_the_end(monkeypatch) -> None:
    written = stderr(monkeypatch, terminal=False)
    steps(5000)
    first, last = written.getvalue().splitlines()
    assert "0/5000" in first and "5000/5000" in last and "loss=4999" in last
    steps(3, disable=True)
    assert len(written.getvalue().splitlines()) == 2 and "\r" not in written.getvalue()


def test_a_log_file_gets_a_line_when_a_minute_is_over(monkeypatch) -> None:
    written = stderr(monkeypatch, terminal=False)
    with ProgressBar(total=100) as bar:
        clock = bar.start_t
        monkeypatch.setattr(bar, "_time", lambda: clock)
        for _ in range(100):
            clock += 7
            bar.update()
    assert 10 <= len(written.getvalue().splitlines()) <= 14  # 700 seconds


def test_a_terminal_is_redrawn_when_due_and_not_at_every_step(monkeypatch) -> None:
    written = stderr(monkeypatch, terminal=True)
    steps(5000, mininterval=30)
    assert 2 <= written.getvalue().count("\r") <= 5
