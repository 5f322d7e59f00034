"""What is said to be free: of main memory, of a container, of a card."""

from __future__ import annotations

import ctypes
import os
import sys

import pytest
import torch

import utils.free_memory as free_memory
from utils.free_memory import free_device_memory, free_host_memory

GIB = 2**30


def write_group(folder, limit: str, current: int, inactive_file: int) -> None:
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{current}\n")
    (folder / "memory.stat").write_text(f"anon 5\nactive_file 7\ninactive_file {inactive_file}\n")


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A Linux machine with 8 GiB available, and no container."""
    (tmp_path / "meminfo").write_text(f"MemTotal: 99 kB\nMemFree: 3 kB\nMemAvailable: {8 * 2**20} kB\n")
    monkeypatch.setattr(free_memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(free_memory, "CGROUP", tmp_path)
    monkeypatch.setattr(sys, "platform", "linux")
    return tmp_path


def test_the_machine_is_asked(machine):
    assert free_host_memory() == free_device_memory(torch.device("cpu")) == 8 * GIB


@pytest.mark.parametrize(
    "limit, free", [(str(4 * GIB), 2 * GIB), (str(GIB), 0), (str(64 * GIB), 8 * GIB), ("max", 8 * GIB)], ids=str
)
def test_a_container_may_leave_less(machine, limit, free):
    write_group(machine, limit, current=3 * GIB, inactive_file=GIB)
    assert free_host_memory() == free


def test_a_system_that_does_not_say(machine):
    (machine / "meminfo").write_text("MemTotal: 99 kB\n")
    assert free_host_memory() is None
    (machine / "meminfo").unlink()
    assert free_device_memory(torch.device("cpu")) is None
    assert free_device_memory(torch.device("meta")) is None


@pytest.mark.skipif(sys.platform not in ("linux", "win32"), reason="no other system is asked")
def test_this_machine_has_some_memory_free_and_less_than_it_has():
    free = free_host_memory()
    assert 2**24 < free < 2**50
    if sys.platform == "linux":
        assert free < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_what_torch_holds_of_a_card_counts_as_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * GIB, 24 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 10 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 6 * GIB)
    assert free_device_memory(torch.device("cuda", 0)) == 7 * GIB


def test_the_structure_that_windows_fills_has_its_size():
    assert ctypes.sizeof(free_memory._MemoryStatus) == 64
    assert free_memory._MemoryStatus.available.offset == 16
    assert free_memory._MemoryStatus.available_page.offset == 32
