"""The processes of a machine hold the weights that they swap once in its RAM: each loads a share, and maps those of the others.

The memory of each is a memfd: a file of Linux without a path, which no mount limits, and which is freed when the last process that
has it is gone, however that ended. The others find it through the process that made it.
"""

from __future__ import annotations

import logging
import mmap
import os
import secrets
import weakref
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hunyuan_model.runtime.offload.host_weights import Place, host_memory
from utils.errors import UserError, first_line
from utils.processes.ranks import Ranks, split_by_cost

logger = logging.getLogger(__name__)

NAME = "swapped_weights"
TOKEN_BYTES = 32
UNREACHABLE = "they are in different containers, or run as different users"


class Address(NamedTuple):
    """Where processes find the memory of another one: a file of that process, which alone begins with ``token``."""

    process: int
    descriptor: int
    token: bytes


class SharedMemory:
    """Memory that one process takes piece by piece, and that others map."""

    def __init__(self, descriptor: int, address: Address) -> None:
        self.address = address
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
            raise OSError(UNREACHABLE)
        memory = cls(os.open(path, os.O_RDWR | os.O_CLOEXEC), address)
        if os.pread(memory._descriptor, TOKEN_BYTES, 0) != address.token:
            raise OSError(UNREACHABLE)
        return memory

    def take(self, size: int) -> tuple[int, Tensor]:
        """Where the next piece begins, and the piece: (size,) uint8 on pages of its own. Only its creator takes memory.

        Raises:
            UserError: there is not that much.
        """
        start = self._end
        self._end += -(-max(1, size) // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        try:
            # Without this, memory that is short would end the process, when it first writes there. The file never shrinks.
            os.posix_fallocate(self._descriptor, start, max(1, size))
            return start, self.piece(start, size)
        except OSError as error:
            raise UserError(
                f"this machine has no memory left for the swapped weights ({error.strerror}). Give less for --blocks_to_swap, "
                "or --int8_base, with which they take half as much."
            ) from error

    def piece(self, start: int, size: int) -> Tensor:
        """The piece that begins at ``start``.

        A fork copies no page of a shared file, page-locked or not, so nothing has to be kept from forked processes here.
        """
        pages = mmap.mmap(self._descriptor, max(1, size), offset=start)
        return torch.frombuffer(pages, dtype=torch.uint8)[:size]


class SharedWeights:
    """Which parts of the swapped weights this process loads, memory for them, and the parts of the others.

    All processes make one together, and load the same weights: ``share``, ``take`` for each part in it, then ``exchange``.

    Attributes:
        members: the processes that hold one copy together, this one among them. One alone has memory of its own.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._pieces: dict[str, tuple[int, int]] = {}  # of each part taken here, where it begins, and its size
        try:
            own, reason = SharedMemory.create(), ""
        except OSError as error:
            own, reason = None, first_line(error)
        self._memories = {ranks.index: own}  # those that this process reaches
        told = ranks.gather((own and own.address, ranks.local_index))
        for rank, (address, _) in enumerate(told):
            if own is not None and address is not None and rank != ranks.index:
                try:
                    self._memories[rank] = SharedMemory.open(address)
                except OSError:
                    reason = UNREACHABLE
        reached = ranks.gather((frozenset(self._memories), reason))
        self.members = [rank for rank, (others, _) in enumerate(reached) if others == self._memories.keys()]
        copies, machines = len({others for others, _ in reached}), sum(local_index == 0 for _, local_index in told)
        if copies > machines:
            reason = next(reason for _, reason in reached if reason)
            logger.warning("%d processes hold %d copies of the swapped weights in RAM: %s.", ranks.count, copies, reason)

    def share(self, costs: Sequence[float]) -> list[int]:
        """Which of the parts that cost this much are for this process to load; the others of ``members`` load the rest."""
        return split_by_cost(costs, len(self.members))[self.members.index(self._ranks.index)]

    def take(self, part: str, size: int) -> Tensor:
        """(size,) uint8, host memory for the weights of ``part``. Raises UserError where memory is short."""
        if len(self.members) == 1:
            return host_memory(size)
        start, memory = self._memories[self._ranks.index].take(size)
        self._pieces[part] = (start, size)
        return memory

    def exchange(self, loaded: Mapping[str, Sequence[Place]]) -> dict[str, tuple[Tensor, Sequence[Place]]]:
        """The parts of the other members: their memory, and how it is laid out. Waits until all processes have loaded.

        Args:
            loaded: how the parts of this process are laid out.
        """
        told = self._ranks.gather({part: (*piece, loaded[part]) for part, piece in self._pieces.items()})
        if len(self.members) > 1:
            size = sum(size for member in self.members for _, size, _ in told[member].values())
            logger.info("swapped weights: %.1f GB, shared by %d processes", size / 1e9, len(self.members))
        return {
            part: (self._memories[member].piece(start, size), places)
            for member in self.members
            if member != self._ranks.index
            for part, (start, size, places) in told[member].items()
        }
