"""A line in the log when nothing happens."""

from __future__ import annotations

import threading
import time

import pytest

from utils.processes.watchdog import STEP, Watchdog


def lines(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def wait_for(condition, seconds: float = 10.0) -> bool:
    ends = time.monotonic() + seconds
    while not condition() and time.monotonic() < ends:
        time.sleep(0.005)
    return condition()


def test_it_says_what_is_waited_for_and_where(caplog) -> None:
    with Watchdog(0.02) as watchdog, watchdog.during("reading", lambda: "a_hv.safetensors"):
        assert wait_for(lambda: len(lines(caplog)) > 1)
    assert all(line.startswith("no progress for 0 s: reading a_hv.safetensors") for line in lines(caplog))


def test_progress_is_silent_and_so_is_what_always_takes_long(caplog) -> None:
    with Watchdog(0.2) as watchdog:
        with watchdog.during("making step"):
            for _ in range(40):
                time.sleep(0.01)
                watchdog.progress()
        with watchdog.during("making step"):
            time.sleep(0.3)
        with watchdog.during("making step"):
            assert not wait_for(lambda: len(lines(caplog)) > 1, 0.45)
    assert len(lines(caplog)) == 1


def test_its_thread_ends_and_a_place_that_cannot_be_named_is_no_error(caplog) -> None:
    def fails() -> str:
        raise KeyError

    with pytest.raises(ValueError, match="of the training"), Watchdog(0.02) as watchdog, watchdog.during("saving", fails):
        assert wait_for(lambda: bool(lines(caplog)))
        raise ValueError("of the training")
    assert lines(caplog)[0].endswith("saving (KeyError)")
    assert wait_for(lambda: all(thread.name != "watchdog" for thread in threading.enumerate()))


def test_another_process_speaks_of_what_only_it_does(caplog) -> None:
    with Watchdog(0.02, process=3) as watchdog:
        with watchdog.during(STEP), pytest.raises(AssertionError):
            assert wait_for(lambda: bool(lines(caplog)), 0.2)
        with watchdog.during("reading", lambda: "a_hv.safetensors"):
            assert wait_for(lambda: bool(lines(caplog)))
    assert caplog.records[0].levelname == "ERROR", "warnings are those of the first process"
    assert lines(caplog)[0] == "process 3: no progress for 0 s: reading a_hv.safetensors"
