"""What is free on a graphics card and in main memory, as far as the system says."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import torch

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


def free_on_device(device: torch.device) -> int | None:
    """Bytes that may still be taken on ``device``; on the CPU, of main memory. None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + unused_cache(device)
    return free_main_memory()


def unused_cache(device: torch.device) -> int:
    """Bytes that this process has taken on a card and that no tensor uses."""
    return torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def free_main_memory() -> int | None:
    """Bytes of main memory that programs may still take without swapping; None where the system does not say."""
    try:
        if sys.platform == "win32":
            return _free_on_windows()
        if MEMINFO.exists():
            return min(filter(lambda free: free is not None, (_free_in_meminfo(), _free_in_cgroup())), default=None)
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, KeyError):
        return None


def _free_in_meminfo() -> int:
    lines = dict(line.split(":", 1) for line in MEMINFO.read_text(encoding="ascii").splitlines() if ":" in line)
    return int(lines["MemAvailable"].split()[0]) * 1024


def _free_in_cgroup() -> int | None:
    """Under the limit of a container, if there is one; pages that only cache files do not count as used."""
    try:
        limit = (CGROUP / "memory.max").read_text(encoding="ascii").strip()
        if limit == "max":
            return None
        used = int((CGROUP / "memory.current").read_text(encoding="ascii"))
        statistics = dict(line.split() for line in (CGROUP / "memory.stat").read_text(encoding="ascii").splitlines())
        return max(0, int(limit) - used + int(statistics["inactive_file"]) + int(statistics["active_file"]))
    except (OSError, ValueError, KeyError):
        return None


class _MemoryStatus(ctypes.Structure):
    """MEMORYSTATUSEX of the Windows API."""

    _fields_ = [
        ("dwLength", ctypes.c_uint32),
        ("dwMemoryLoad", ctypes.c_uint32),
        ("ullTotalPhys", ctypes.c_uint64),
        ("ullAvailPhys", ctypes.c_uint64),
        ("ullTotalPageFile", ctypes.c_uint64),
        ("ullAvailPageFile", ctypes.c_uint64),
        ("ullTotalVirtual", ctypes.c_uint64),
        ("ullAvailVirtual", ctypes.c_uint64),
        ("ullAvailExtendedVirtual", ctypes.c_uint64),
    ]


def _free_on_windows() -> int | None:
    status = _MemoryStatus(dwLength=ctypes.sizeof(_MemoryStatus))
    if not ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
        return None
    return status.ullAvailPhys
