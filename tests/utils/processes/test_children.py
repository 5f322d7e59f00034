"""Work in a process of its own: its result, its failure and its end."""

from __future__ import annotations

import time

import pytest

from utils.processes.children import call_in_child


def test_the_result_comes_back():
    assert call_in_child("result = [text[::-1] for text in argument]", ["añ\U0001f600\ud800", "b"], 20) == [
        "\ud800\U0001f600ña",
        "b",
    ]


def test_what_does_not_end_is_ended():
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"longer than 0\.5 seconds"):
        call_in_child("import re\nresult = re.fullmatch('(a+)+b', 'a' * 60)", None, 0.5)
    assert time.monotonic() - began < 10


def test_a_failure_is_its_last_line():
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        call_in_child("result = 1 / 0", None, 20)
    with pytest.raises(RuntimeError, match="it was ended"):
        call_in_child("sys.exit(1)", None, 20)
