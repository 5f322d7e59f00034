"""The processes of a training hold the weights that they swap once in the RAM of each machine.

The memory is a memfd: a file of Linux without a path, which no mount limits, and which is freed when the last process that has it
is gone, however that ended. The first process of a machine makes it, and the others find it through that process.
"""

from __future__ import annotations

import logging
import mmap
import os
import secrets
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from hunyuan_model.runtime.offload.host_weights import host_memory
from utils.errors import first_line

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

NAME = "swapped_weights"
TOKEN_BYTES = 32


class Address(NamedTuple):
    """Where processes find the memory of another one: a file of that process, which alone begins with ``token``."""

    process: int
    descriptor: int
    token: bytes


class SharedMemory:
    """Memory in pieces, which each process takes for itself: in the same order and sizes, so that they are the same pieces.

    Each process writes what belongs there. As all of them write the same bytes, none has to wait for another: whoever reads a
    piece that it has written reads what it wrote, whoever else writes there meanwhile. (Weights that are merged on GPUs of
    different kinds may differ in rounding; one of the results stays.)

    Attributes:
        shared_bytes, own_bytes: taken so far by this process: here, and beside it where memory was short.
    """

    def __init__(self, descriptor: int, address: Address) -> None:
        self.address = address
        self.shared_bytes = self.own_bytes = 0
        self._descriptor = descriptor
        self._end = mmap.ALLOCATIONGRANULARITY  # after the token
        weakref.finalize(self, os.close, descriptor)  # what is mapped stays

    @classmethod
    def create(cls) -> SharedMemory:
        """New memory, without pieces yet. Raises OSError where the system has no such thing."""
        if not hasattr(os, "memfd_create"):
            raise OSError("only Linux has memory for that")
        descriptor = os.memfd_create(NAME)
        memory = cls(descriptor, Address(os.getpid(), descriptor, secrets.token_bytes(TOKEN_BYTES)))
        os.pwrite(descriptor, memory.address.token, 0)
        return memory

    @classmethod
    def open(cls, address: Address) -> SharedMemory:
        """The memory of another process. Raises OSError where it is gone, or of another machine, container or user."""
        path = f"/proc/{address.process}/fd/{address.descriptor}"
        if not os.readlink(path).startswith(f"/memfd:{NAME}"):  # before it is opened: a pipe would wait for ever
            raise OSError("it is on another machine or in another container")
        memory = cls(os.open(path, os.O_RDWR | os.O_CLOEXEC), address)
        if os.pread(memory._descriptor, TOKEN_BYTES, 0) != address.token:
            raise OSError("it is on another machine or in another container")
        return memory

    def take(self, size: int) -> Tensor:
        """(size,) uint8 on pages of its own: the next piece, or memory of this process alone where there is no more to share.

        A fork copies no page of a shared file, page-locked or not, so nothing has to be kept from forked processes here.
        """
        start, length = self._end, max(1, size)
        self._end += -(-length // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        try:
            # Without this, memory that is short would end the process, when it first writes there. The file never shrinks.
            os.posix_fallocate(self._descriptor, start, length)
            piece = mmap.mmap(self._descriptor, length, offset=start)
        except OSError:
            self.own_bytes += size
            return host_memory(size)
        self.shared_bytes += size
        return torch.frombuffer(piece, dtype=torch.uint8)[:size]


@contextmanager
def shared_host_memory(accelerator: Accelerator) -> Iterator[Callable[[int], Tensor] | None]:
    """``SharedMemory.take`` for what is loaded inside, the same weights in every process; None where a process holds its own.

    All processes enter, and leave once they have loaded.
    """
    if accelerator.num_processes == 1:
        yield None
        return
    from accelerate.utils import gather_object

    memory, reason = None, ""
    if accelerator.is_local_main_process:
        try:
            memory = SharedMemory.create()
        except OSError as error:
            reason = first_line(error)
    for address, refusal in gather_object([(memory and memory.address, reason)]):
        if memory is None and address is None:
            reason = refusal or reason
        elif memory is None:
            try:
                memory, reason = SharedMemory.open(address), ""
            except OSError as error:
                reason = first_line(error)
    yield memory and memory.take
    if memory and memory.own_bytes:
        reason = "there was no more memory that processes can share"
    _report(gather_object([(memory.address.token if memory else b"", memory.shared_bytes if memory else 0, reason)]))


def _report(processes: list[tuple[bytes, int, str]]) -> None:
    """Log who shares. Args: of each process the token of its memory, the bytes taken there, and why it holds some of its own."""
    token, shared_bytes, _ = processes[0]
    sharing = sum(process[0] == token for process in processes)
    if token and sharing > 1:
        logger.info("swapped weights: %.1f GB, shared by %d processes", shared_bytes / 1e9, sharing)
    if reasons := [reason for *_, reason in processes if reason]:
        logger.warning("%d of %d processes hold swapped weights of their own in RAM: %s.", len(reasons), len(processes), reasons[0])
