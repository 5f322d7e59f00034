"""What scripts set up before they import torch. That Ctrl-C ends in a word is shown in tests/scripts/test_interrupts.py."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from utils.cli.flag_tables import SCRIPTS
from utils.startup import ALLOCATOR_VARIABLES, set_up_allocator

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def nothing_set(monkeypatch):
    for name in ALLOCATOR_VARIABLES:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "platform", "linux")


def allocator() -> dict[str, str]:
    return {name: os.environ[name] for name in ALLOCATOR_VARIABLES if name in os.environ}


@pytest.mark.skipif(sys.platform != "linux", reason="torch has it on Linux")
@pytest.mark.parametrize("script", SCRIPTS)
def test_the_allocator_is_set_up_before_torch_is_imported(script: str, tmp_path: Path):
    # Stands for torch, and shows what it finds when it is imported.
    (tmp_path / "torch.py").write_text(f"import os; print(os.environ.get('{ALLOCATOR_VARIABLES[0]}')); os._exit(0)\n")
    environment = {name: value for name, value in os.environ.items() if name not in ALLOCATOR_VARIABLES}
    command = [sys.executable, "-u", "-c", f"import sys; sys.path[:0] = {[str(tmp_path), str(ROOT)]}; import {script}"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env=environment)
    assert ended.stdout == "expandable_segments:True\n"


@pytest.mark.parametrize("name", ALLOCATOR_VARIABLES)
def test_what_the_user_has_set_stays(nothing_set, monkeypatch, name):
    monkeypatch.setenv(name, "max_split_size_mb:512")
    set_up_allocator()
    assert allocator() == {name: "max_split_size_mb:512"}


@pytest.mark.parametrize(
    ("platform", "version", "expected"),
    [("linux", "2.13.0+cu130", True), ("linux", "2.13.0", True), ("linux", "2.13.0+rocm7.1", False), ("win32", "2.13.0", False)],
)
def test_only_where_torch_can(nothing_set, monkeypatch, platform, version, expected):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(metadata, "version", lambda name: version)
    set_up_allocator()
    assert bool(allocator()) == expected
