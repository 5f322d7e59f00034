"""The processes of a training agree on memory for the weights that they swap: one copy on each machine."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import Accelerator
from accelerate.utils import gather_object

from hunyuan_model.runtime.shared_memory import Address, SharedMemory
from utils.errors import first_line

logger = logging.getLogger(__name__)


@contextmanager
def shared_host_memory(accelerator: Accelerator, layout: str) -> Iterator[SharedMemory | None]:
    """Memory for what is loaded inside that is in main memory once on each machine; None where a process holds its own.

    All processes enter, and leave once they have loaded. The first process of each machine makes the memory.

    Args:
        layout: describes the pieces that will be taken; processes with different layouts share nothing.
    """
    if accelerator.num_processes == 1:
        yield None
        return
    memory, reason = _make() if accelerator.is_local_main_process else (None, "")
    offers: list[tuple[Address | None, str, str]] = gather_object([(memory and memory.address, layout, reason)])
    if not accelerator.is_local_main_process:
        memory, reason = _find(offers, layout)
    yield memory
    taken = (memory.address.token, memory.shared_bytes, memory.own_bytes) if memory else (b"", 0, 0)
    _log_sharing(gather_object([(*taken, reason)]))


def _make() -> tuple[SharedMemory | None, str]:
    try:
        return SharedMemory.create(), ""
    except OSError as error:
        return None, first_line(error)


def _find(offers: list[tuple[Address | None, str, str]], layout: str) -> tuple[SharedMemory | None, str]:
    """That of this process's machine, or why there is none."""
    reason = "the processes swap different weights"
    for address, other, refusal in offers:
        if address is None:
            reason = refusal or reason
        elif other == layout:
            try:
                return SharedMemory.open(address), ""
            except OSError as error:
                reason = first_line(error)
    return None, reason


def _log_sharing(processes: list[tuple[bytes, int, int, str]]) -> None:
    """Args: token of the memory, bytes taken there, bytes taken beside it, and why it has none; of each process."""
    token, shared_bytes, *_ = processes[0]
    sharing = sum(process[0] == token for process in processes)
    if token and sharing > 1:
        logger.info("swapped weights: %.1f GB, shared by %d processes", shared_bytes / 1e9, sharing)
    if reasons := [reason for *_, reason in processes if reason]:
        logger.warning(
            "%d of %d processes hold a copy of their own of the swapped weights in main memory: %s.",
            len(reasons),
            len(processes),
            reasons[0],
        )
    if short := [own for _, _, own, _ in processes if own]:
        logger.warning("%d processes hold %.1f GB of the swapped weights alone: memory was short.", len(short), max(short) / 1e9)
