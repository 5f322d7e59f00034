"""Copying between host memory and a device beside the computation, and never over what it still reads.

``mark`` names a point of the computation, ``copy`` starts a copy once such a point has been passed, and ``wait`` keeps what
is computed next from starting before a copy has arrived. On the CPU there is nothing to wait for; on CUDA these are events
between two streams, for which the host never stops.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor


class Transfers(Protocol):
    """What copies weights and activations, in the order in which it is asked to. Marks and arrivals mean nothing to anyone else."""

    def allocate(self, size: int) -> Tensor:
        """Room for ``size`` bytes on the device, uint8 (size,)."""

    def mark(self) -> Any:
        """The end of everything that has been given to the device to compute so far."""

    def copy(self, target: Tensor, source: Tensor, after: Any) -> Any:
        """Start to copy ``source`` over ``target`` when the mark ``after`` is passed; returns its arrival. One is on the host."""

    def wait(self, arrival: Any) -> None:
        """Have what is computed from now on wait for a copy."""

    def expect_pageable(self) -> None:
        """Be ready for host memory that is not page-locked, from the next copy on."""


class DirectTransfers:
    """Copies at once: for devices that compute in the order of the calls, such as the CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def allocate(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def mark(self) -> None:
        return None

    def copy(self, target: Tensor, source: Tensor, after: None) -> None:
        target.copy_(source)

    def wait(self, arrival: None) -> None:
        return None

    def expect_pageable(self) -> None:
        return None


class StreamTransfers:
    """Copies from and to pinned host memory on a CUDA stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def allocate(self, size: int) -> Tensor:
        memory = torch.empty(size, dtype=torch.uint8, device=self.device)
        memory.record_stream(self.stream)  # once it is dropped nobody else gets it before the last copy into it is over
        return memory

    def mark(self) -> torch.cuda.Event:
        return torch.cuda.current_stream(self.device).record_event()

    def copy(self, target: Tensor, source: Tensor, after: torch.cuda.Event) -> torch.cuda.Event:
        self.stream.wait_event(after)
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
        return self.stream.record_event()

    def wait(self, arrival: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self.device).wait_event(arrival)


class ThreadTransfers:
    """As ``StreamTransfers``, for pageable host memory: the driver blocks whoever asks for such a copy, here a thread.

    ``pinned``: no thread is needed until ``expect_pageable``. From then on all copies go through it, so that their order stays.
    """

    def __init__(self, transfers: StreamTransfers | DirectTransfers, pinned: bool = False) -> None:
        self._transfers = transfers
        self._pinned = pinned
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="transfers")
        self.allocate = transfers.allocate
        self.mark = transfers.mark

    def copy(self, target: Tensor, source: Tensor, after: Any) -> Any:
        if self._pinned:
            return self._transfers.copy(target, source, after)
        return self._thread.submit(self._transfers.copy, target, source, after)

    def wait(self, arrival: Any) -> None:
        self._transfers.wait(arrival.result() if isinstance(arrival, Future) else arrival)

    def expect_pageable(self) -> None:
        self._pinned = False


def make_transfers(device: torch.device, pinned: bool) -> Transfers:
    """Transfers between the host and ``device``; ``pinned``: host memory that they are given is page-locked."""
    if device.type != "cuda":
        return DirectTransfers(device)
    return ThreadTransfers(StreamTransfers(device), pinned)
