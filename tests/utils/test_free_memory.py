"""What is free: of RAM, of a container, of a GPU."""

from __future__ import annotations

import platform
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from utils import free_memory
from utils.free_memory import (
    USUAL_STEPS,
    SpillWatch,
    free_device_memory,
    free_host_memory,
    limit_device_memory,
    return_freed_memory,
)

GIB = 2**30


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with 8 GiB available, and no container."""
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=8 * GIB))
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


@pytest.fixture
def gpu(monkeypatch):
    """One of 24 GiB, of which 3 are free and torch holds 10, 6 of them in use; ``limit`` is what torch is told."""
    gpu = SimpleNamespace(free=3 * GIB, limit=[], device=torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (gpu.free, 24 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 10 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 6 * GIB)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *limit: gpu.limit.append(limit))
    monkeypatch.setattr(free_memory, "_limits", {})
    return gpu


def test_what_torch_holds_of_a_gpu_counts_as_free(gpu):
    assert free_device_memory(torch.device("cuda", 0)) == free_device_memory(gpu.device) == 7 * GIB


@pytest.mark.parametrize("fraction, free", [(0.5, 6 * GIB), (1.0, 7 * GIB), (0.125, 0)])
def test_a_limit_is_torchs_and_leaves_less_free(gpu, fraction, free):
    limit_device_memory(gpu.device, fraction)
    assert gpu.limit == [(fraction, 0)] and free_device_memory(torch.device("cuda", 0)) == free


@pytest.mark.parametrize("system, limit", [("linux", []), ("win32", [(13 / 24, 0)])])
def test_without_a_fraction_only_windows_has_a_limit(gpu, monkeypatch, system, limit):
    monkeypatch.setattr(sys, "platform", system)
    limit_device_memory(gpu.device, None)
    assert gpu.limit == limit and free_device_memory(gpu.device) == 7 * GIB


# A GPU whose memory the driver moves to RAM


def said(gpu, seconds: list[float], kind: str = "a size") -> list[str]:
    watch = SpillWatch(gpu.device)
    return [sentence for one in seconds if (sentence := watch.after_step(one, kind))]


@pytest.fixture
def windows(gpu, monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    gpu.free = GIB // 10
    return gpu


def test_a_slow_step_on_a_full_gpu_is_named_once(windows):
    usual = [20.0, *[2.0] * (USUAL_STEPS[0] - 1)]  # the first step is always a slow one
    (sentence,) = said(windows, [*usual, 5.9, 6.1, 30.0])
    assert sentence.startswith("it took 6.1 s in place of 2.0 s while the GPU's memory is full (0.1 of 25.8 GB are free)")


def test_no_step_is_named_that_may_be_slow_for_another_reason(windows, monkeypatch):
    few, usual = [2.0] * (USUAL_STEPS[0] - 1), [2.0] * USUAL_STEPS[0]
    assert not said(windows, [*few, 30.0])
    watch = SpillWatch(windows.device)
    assert not any(watch.after_step(one, "pictures") for one in usual) and not watch.after_step(30.0, "clips")
    windows.free = GIB
    assert not watch.after_step(30.0, "pictures")
    windows.free = 0
    assert not any(SpillWatch(torch.device("cpu")).after_step(one, "") for one in [*usual, 30.0])
    monkeypatch.setattr(sys, "platform", "linux")
    assert not said(windows, [*usual, 30.0])
    monkeypatch.setattr(platform, "release", lambda: "5.15.167.4-microsoft-standard-WSL2")
    assert said(windows, [*usual, 30.0])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc keeps what was freed")
def test_freed_memory_goes_back_to_the_system() -> None:
    def resident_megabytes() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

    blocks = [bytes([1]) * 100_000 for _ in range(2000)]
    last = blocks.pop()  # above all others, so that they cannot be cut off
    del blocks
    before = resident_megabytes()
    return_freed_memory()
    assert before - resident_megabytes() > 100 and last
