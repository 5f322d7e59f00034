"""What is free: of RAM, of a container, of a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from utils import free_memory
from utils.free_memory import free_device_memory, free_host_memory

GIB = 2**30


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with 8 GiB available, and no container."""
    monkeypatch.setattr(free_memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=8 * GIB))
    monkeypatch.setattr(free_memory, "CGROUP", tmp_path)
    return tmp_path


def test_the_machine_is_asked(machine):
    assert free_host_memory() == free_device_memory(torch.device("cpu")) == 8 * GIB
    assert free_device_memory(torch.device("meta")) is None


@pytest.mark.parametrize(
    "limit, free", [(str(4 * GIB), 2 * GIB), (str(GIB), 0), (str(64 * GIB), 8 * GIB), ("max", 8 * GIB)], ids=str
)
def test_a_container_may_leave_less(machine, limit, free):
    (machine / "memory.max").write_text(f"{limit}\n")
    (machine / "memory.current").write_text(f"{3 * GIB}\n")
    (machine / "memory.stat").write_text(f"anon 5\nactive_file 7\ninactive_file {GIB}\n")
    assert free_host_memory() == free


def test_what_torch_holds_of_a_gpu_counts_as_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * GIB, 24 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 10 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 6 * GIB)
    assert free_device_memory(torch.device("cuda", 0)) == 7 * GIB
