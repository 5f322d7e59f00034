"""The benchmark of the pages, at a size that takes a moment."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "pages.py"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("preview", "--pictures", "6", "--clips", "1", "--size", "160", "120"), ("6 pictures and 1 clips", ", ratio ")),
        (("report", "--steps", "200", "--samples", "16"), ("200 steps and 16 samples", "writing ")),
    ],
)
def test_what_a_page_takes_is_printed(real_media, flags, said):
    command = [sys.executable, str(SCRIPT), *flags, "--rounds", "1"]
    ended = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
    assert ended.returncode == 0, ended.stderr
    assert all(words in ended.stdout for words in (*said, " MB; opening: ")), ended.stdout
