"""How much memory is free, on a device and in the machine. Imports nothing of ours."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import torch

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")  # inside a container: its own group, if it has a limit


def free_device_memory(device: torch.device) -> int | None:
    """Bytes that a computation on ``device`` may still take: of the card, or of main memory for the CPU.

    What torch holds of a card without using it counts as free. None where the system does not say.
    """
    if device.type == "cpu":
        return free_host_memory()
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def free_host_memory() -> int | None:
    """Bytes of main memory that a process may still take without swapping, within the limit of its container.

    None on a system other than Linux and Windows.
    """
    try:
        free = _free_on_windows() if sys.platform == "win32" else _free_on_linux(MEMINFO)
    except (OSError, ValueError):
        return None
    try:
        return min(free, _left_to_container(CGROUP))
    except (OSError, ValueError):  # no container, or one without a limit
        return free


def _free_on_linux(meminfo: Path) -> int:
    """From /proc/meminfo; its pages of files that can be dropped count as free."""
    for line in meminfo.read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise ValueError("the kernel does not say what is available")


def _left_to_container(group: Path) -> int:
    """The limit of a control group (version 2) less what counts against it and cannot be dropped."""
    limit = int((group / "memory.max").read_text(encoding="ascii"))  # "max" without a limit
    used = int((group / "memory.current").read_text(encoding="ascii"))
    for line in (group / "memory.stat").read_text(encoding="ascii").splitlines():
        if line.startswith("inactive_file "):
            used -= int(line.split()[1])
    return max(limit - used, 0)


class _MemoryStatus(ctypes.Structure):
    """MEMORYSTATUSEX of the Windows API."""

    _fields_ = [
        ("length", ctypes.c_uint32),
        ("load_percent", ctypes.c_uint32),
        *((name, ctypes.c_uint64) for name in ("total", "available", "total_page", "available_page", "total_virtual")),
        *((name, ctypes.c_uint64) for name in ("available_virtual", "available_extended_virtual")),
    ]


def _free_on_windows() -> int:
    status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
    if not ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
        raise OSError("GlobalMemoryStatusEx failed")
    return min(status.available, status.available_page)
