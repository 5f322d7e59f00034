"""How much memory is free, on a device and in the machine, and what happens where a GPU has no more."""

from __future__ import annotations

import ctypes
import gc
import platform
import statistics
import sys
from collections import defaultdict, deque
from collections.abc import Hashable
from contextlib import suppress
from pathlib import Path

import torch

CGROUP = Path("/sys/fs/cgroup")  # inside a container: its own group, if it has a limit
FULL = 0.02  # of a GPU's memory: with less than that free it is full
SLOW = 3.0  # times the usual seconds of a step
USUAL_STEPS = (5, 100)  # how many are known at least, and at most

_limits: dict[int, int] = {}  # of what this process may take of a GPU, by its index


def free_device_memory(device: torch.device) -> int | None:
    """Bytes that a computation on ``device`` may still take: of the GPU, or of RAM for the CPU.

    What torch holds of a GPU without using it counts as free. None for other devices.
    """
    if device.type == "cpu":
        return free_host_memory()
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    used, limit = torch.cuda.memory_allocated(device), _limits.get(_index(device), total)
    return min(free + torch.cuda.memory_reserved(device) - used, max(limit - used, 0))


def limit_device_memory(device: torch.device, fraction: float | None) -> None:
    """Have torch run out of memory at ``fraction`` of the GPU's; for None, on Windows, at what is free now.

    Windows moves the memory of a full GPU to RAM, with which computations go on, many times slower, and nobody is told.
    """
    if fraction is None and sys.platform != "win32":
        return
    free, total = torch.cuda.mem_get_info(device)
    if fraction is None:
        fraction = min((free + torch.cuda.memory_reserved(device)) / total, 1.0)
    _limits[_index(device)] = int(fraction * total)
    torch.cuda.set_per_process_memory_fraction(fraction, _index(device))


class SpillWatch:
    """Finds out that the driver moves memory of a full GPU to RAM, which it does on Windows, also for Linux inside it."""

    def __init__(self, device: torch.device) -> None:
        spills = sys.platform == "win32" or "microsoft" in platform.release().lower()
        self._device = device if device.type == "cuda" and spills else None
        self._seconds: defaultdict[Hashable, deque[float]] = defaultdict(lambda: deque(maxlen=USUAL_STEPS[1]))

    def after_step(self, seconds: float, kind: Hashable) -> str | None:
        """What is found out, once: where a step takes far longer than others of its kind (sizes) while the GPU is full."""
        if self._device is None:
            return None
        earlier = self._seconds[kind]
        usual = statistics.median(earlier) if len(earlier) >= USUAL_STEPS[0] else None
        earlier.append(seconds)
        if usual is None or seconds < SLOW * usual:
            return None
        free, total = torch.cuda.mem_get_info(self._device)
        if free > FULL * total:
            return None
        self._device = None
        return (
            f"it took {seconds:.1f} s in place of {usual:.1f} s while the GPU's memory is full ({free / 1e9:.1f} of "
            f"{total / 1e9:.1f} GB are free): the driver probably moves it to RAM"
        )


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def free_host_memory() -> int:
    """Bytes of RAM that a process may still take without swapping, within the limit of its container."""
    import psutil  # which rented GPUs come without

    free = psutil.virtual_memory().available
    try:
        return min(free, _left_to_container(CGROUP))
    except (OSError, ValueError):  # no container, or one without a limit
        return free


def _left_to_container(group: Path) -> int:
    """The limit of a control group (version 2) less what counts against it and cannot be dropped."""
    limit = int((group / "memory.max").read_text(encoding="ascii"))  # "max" without a limit
    used = int((group / "memory.current").read_text(encoding="ascii"))
    for line in (group / "memory.stat").read_text(encoding="ascii").splitlines():
        if line.startswith("inactive_file "):
            used -= int(line.split()[1])
    return max(limit - used, 0)


def return_freed_memory() -> None:
    """Give the system what is not used any more: objects that refer to each other, and what glibc keeps for each thread."""
    gc.collect()
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another libc
            ctypes.CDLL(None).malloc_trim(0)
