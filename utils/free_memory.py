"""How much memory is free, on a device and in the machine."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

CGROUP = Path("/sys/fs/cgroup")  # inside a container: its own group, if it has a limit


def free_device_memory(device: torch.device) -> int | None:
    """Bytes that a computation on ``device`` may still take: of the GPU, or of RAM for the CPU.

    What torch holds of a GPU without using it counts as free. None for other devices.
    """
    if device.type == "cpu":
        return free_host_memory()
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def free_host_memory() -> int:
    """Bytes of RAM that a process may still take without swapping, within the limit of its container."""
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
