"""Host memory that the processes of one machine have in common, for weights that all of them hold and nobody changes.

It is a file of Linux without a name: kernel memory, which goes back when the last process that has it is gone, however that
ended, and which no mount limits. The others find it through the process that made it.
"""

from __future__ import annotations

import logging
import mmap
import os
import secrets
import weakref
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hunyuan_model.runtime.host_weights import host_memory

logger = logging.getLogger(__name__)

NAME = "swapped_weights"
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
TOKEN_BYTES = 32


@dataclass(frozen=True)
class Address:
    """Where a process finds the memory of another one.

    Attributes:
        machine: which one, and since which start of it.
        process: id of the one that made the memory.
        descriptor: of the file, in that process.
        token: what the file begins with, so that no other file is taken for it.
    """

    machine: str
    process: int
    descriptor: int
    token: bytes


class SharedMemory:
    """Memory in pieces, which each process takes for itself: in the same order and sizes, so that they are the same pieces.

    Each process writes what belongs there. As all of them write the same bytes, none has to wait for another: whoever reads a
    piece that it has written reads what it wrote, whoever else writes there meanwhile. (Weights that are merged on GPUs of
    different kinds may differ in rounding; one of the results stays.)

    Attributes:
        address: for the other processes.
        shared_bytes, own_bytes: taken so far by this process: here, and beside it where memory was short.
    """

    def __init__(self, descriptor: int, address: Address) -> None:
        self.address = address
        self.shared_bytes = self.own_bytes = 0
        self._descriptor = descriptor
        self._end = mmap.ALLOCATIONGRANULARITY  # after the token
        self._short = False
        weakref.finalize(self, os.close, descriptor)  # what is mapped stays

    @classmethod
    def create(cls) -> SharedMemory:
        """New memory, without pieces yet.

        Raises:
            OSError: the system has no such thing.
        """
        if not hasattr(os, "memfd_create"):
            raise OSError("only Linux has memory for that")
        machine = BOOT_ID.read_text(encoding="ascii").strip()
        descriptor = os.memfd_create(NAME)
        memory = cls(descriptor, Address(machine, os.getpid(), descriptor, secrets.token_bytes(TOKEN_BYTES)))
        os.pwrite(descriptor, memory.address.token, 0)
        return memory

    @classmethod
    def open(cls, address: Address) -> SharedMemory:
        """The memory of another process, which has it still.

        Raises:
            OSError: it is out of reach: on another machine, in another container, of another user, or gone.
        """
        if not BOOT_ID.is_file() or BOOT_ID.read_text(encoding="ascii").strip() != address.machine:
            raise OSError("it is on another machine")
        path = f"/proc/{address.process}/fd/{address.descriptor}"
        if not os.readlink(path).startswith(f"/memfd:{NAME}"):  # before it is opened: a pipe would wait for ever
            raise OSError("it is in another container")
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        memory = cls(descriptor, address)
        if os.pread(descriptor, TOKEN_BYTES, 0) != address.token:
            raise OSError("it is in another container")
        return memory

    def take(self, size: int) -> Tensor:
        """(size,) uint8 on pages of its own: the next piece; memory of this process alone once memory was short for one."""
        start, length = self._end, max(1, size)
        self._end += -(-length // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        piece = None if self._short else self._map(start, length)
        if piece is None:
            self.own_bytes += size
            return host_memory(size)
        self.shared_bytes += size
        return torch.frombuffer(piece, dtype=torch.uint8)[:size]

    def _map(self, start: int, length: int) -> mmap.mmap | None:
        try:
            # Without this, memory that is short would end the process, when it first writes there. The file never shrinks.
            os.posix_fallocate(self._descriptor, start, length)
            return mmap.mmap(self._descriptor, length, offset=start)
        except OSError as error:
            logger.warning(
                "no more memory that processes can share (%s): each takes its own for the rest.", error.strerror or error
            )
            self._short = True
            return None
