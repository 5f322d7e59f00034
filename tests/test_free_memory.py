"""utils.free_memory: reading what the system says is free."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import pytest
import torch

from utils import free_memory
from utils.free_memory import free_main_memory, free_on_device

GIB = 1 << 30


@pytest.fixture
def system(tmp_path: Path, monkeypatch):
    """``system(meminfo, **files)`` puts these in the place of what Linux tells."""

    def put(meminfo: str, **files: str) -> None:
        (tmp_path / "meminfo").write_text(meminfo, encoding="ascii")
        for name, text in files.items():
            (tmp_path / name.replace("_", ".")).write_text(text, encoding="ascii")
        monkeypatch.setattr(sys, "platform", "linux")
        monkeypatch.setattr(free_memory, "MEMINFO", tmp_path / "meminfo")
        monkeypatch.setattr(free_memory, "CGROUP", tmp_path)

    return put


MEMINFO = f"MemTotal:       {16 << 20} kB\nMemFree:         {1 << 20} kB\nMemAvailable:   {12 << 20} kB\n"
STAT = f"anon {3 * GIB}\ninactive_file {GIB}\nactive_file {GIB}\n"


def test_main_memory_that_is_available(system) -> None:
    system(MEMINFO)
    assert free_main_memory() == 12 * GIB
    assert free_on_device(torch.device("cpu")) == 12 * GIB


def test_the_limit_of_a_container(system) -> None:
    system(MEMINFO, memory_max=f"{8 * GIB}\n", memory_current=f"{5 * GIB}\n", memory_stat=STAT)
    assert free_main_memory() == 5 * GIB  # of the five in use two are of files
    system(MEMINFO, memory_max="max\n", memory_current=f"{5 * GIB}\n", memory_stat=STAT)
    assert free_main_memory() == 12 * GIB


def test_a_system_that_says_nothing(system) -> None:
    system("MemTotal: 5 kB\n")
    assert free_main_memory() is None


def test_the_structure_of_windows_has_its_size() -> None:
    assert ctypes.sizeof(free_memory._MemoryStatus) == 64


def test_on_a_card_what_torch_holds_unused_is_free_too(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * GIB, 8 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1 * GIB)
    assert free_on_device(torch.device("cuda", 0)) == 7 * GIB


def test_this_machine_says_something_plausible() -> None:
    free = free_main_memory()
    assert free is None or 1 << 20 < free < 1 << 50
