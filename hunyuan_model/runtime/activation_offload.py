"""Activation offload: what checkpointing keeps of each block, its inputs, waits in host memory for the backward pass.

The inputs of a block are copied to host memory while it computes, and leave the device once the copy is done. In the backward
pass they come back while the block behind theirs computes. The last blocks of a forward pass are the first ones of the backward
pass, so their inputs stay. What all blocks share (conditioning, rotation tables) is not copied.

Memory of the device is given up only after the computation has been told to wait for the copies that read or write it:
whatever gets that memory next then comes after them, however far Python runs ahead of the device. Copies are made in the order
in which they were asked for, so a piece of host memory can be used anew while the last copy from it or to it is under way.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hunyuan_model.runtime.host_weights import host_memory, page_lock
from hunyuan_model.runtime.recomputation import LastLayer, checkpoint_block
from hunyuan_model.runtime.transfers import Transfers, make_transfers

logger = logging.getLogger(__name__)

ON_DEVICE = 2  # blocks whose inputs the device holds: those of one are computed on while those of another go or come


@dataclass(eq=False)
class HostPiece:
    """A piece of host memory, uint8."""

    memory: Tensor

    def view(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Its beginning as a tensor."""
        return self.memory[: shape.numel() * dtype.itemsize].view(dtype).view(shape)


class HostPool:
    """Pieces of host memory that are taken and given back: a step uses again what the one before it needed.

    Args:
        pinned_for: the CUDA device for which they are page-locked; None leaves them pageable.
    """

    def __init__(self, pinned_for: torch.device | None = None) -> None:
        self._pinned_for = pinned_for
        self._free: list[HostPiece] = []
        self._lock = threading.RLock()  # for two threads; in one of them a garbage collection may give back at any moment

    @property
    def free_bytes(self) -> int:
        """Of the pieces that nobody holds."""
        return sum(piece.memory.nbytes for piece in self._free)

    def take(self, size: int) -> HostPiece:
        """At least ``size`` bytes, which hold anything."""
        with self._lock:
            free = sorted(self._free, key=lambda piece: piece.memory.nbytes)
            fitting = next((piece for piece in free if piece.memory.nbytes >= size), None)
            if chosen := fitting or (free[-1] if free else None):  # one that is too small makes room for a larger one
                self._free.remove(chosen)
        del free, chosen
        return fitting or self._make(size)

    def give_back(self, piece: HostPiece) -> None:
        """Have ``piece`` for whoever asks next."""
        with self._lock:
            self._free.append(piece)

    def _make(self, size: int) -> HostPiece:
        piece = HostPiece(host_memory(size))
        if self._pinned_for is not None and not page_lock(piece.memory, self._pinned_for, owner=piece):
            logger.warning("the system does not allow to pin more memory for activations; copying them takes longer.")
            self._pinned_for = None
        return piece


@dataclass(eq=False)
class _Kept:
    """One tensor.

    Attributes:
        on_device: while it is there, or comes.
        arrival: of the copy that brings it, until it was waited for.
        host: where it is in host memory; None if it stays on the device.
    """

    on_device: Tensor | None
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool
    arrival: Any = None
    host: HostPiece | None = None


class KeptInputs:
    """The inputs of one pass through a block, which live for as long as a backward pass may ask for them."""

    def __init__(self, offloader: ActivationOffloader, tensors: Sequence[Tensor], before: KeptInputs | None) -> None:
        self.tensors = [_Kept(x.detach(), x.shape, x.dtype, x.device, x.requires_grad) for x in tensors]
        self._offloader = offloader
        self._before = weakref.ref(before) if before is not None else None

    @property
    def before(self) -> KeptInputs | None:
        """Those of the pass that began before this one, if they live."""
        return self._before() if self._before is not None else None

    @property
    def on_device(self) -> bool:
        """Whether they are there, or come."""
        return all(kept.on_device is not None for kept in self.tensors)

    def __del__(self) -> None:
        self._offloader.drop(self)


class ActivationOffloader:
    """Sends the inputs of blocks to host memory, and has them on the device again before they are needed.

    Args:
        depth: number of blocks.
        transfers: makes the copies in both directions, and no others.
    """

    def __init__(self, depth: int, transfers: Transfers, pool: HostPool) -> None:
        self.depth = depth
        self._transfers = transfers
        self._pool = pool
        self._leaving: deque[list[tuple[_Kept, Tensor, Any]]] = deque()  # what is copied to the host, by block
        self._latest: weakref.ref[KeptInputs] | None = None

    def keep(self, block: int, tensors: Sequence[Tensor]) -> KeptInputs:
        """Start to send away the inputs of ``block``, which begins a forward pass; the last ones stay."""
        while self._leaving and (block == 0 or len(self._leaving) >= ON_DEVICE):
            self._part_with(self._leaving.popleft())
        inputs = KeptInputs(self, tensors, self._latest() if self._latest is not None else None)
        self._latest = weakref.ref(inputs)
        self._leaving.append([self._send(kept) for kept in inputs.tensors] if block < self.depth - ON_DEVICE else [])
        return inputs

    def bring(self, inputs: KeptInputs) -> list[Tensor]:
        """The inputs on the device, for a backward pass through their block that begins; those before them come next."""
        self._fetch(inputs)
        tensors = []
        for kept in inputs.tensors:
            self._wait_for(kept)
            tensors.append(kept.on_device.detach().requires_grad_(kept.requires_grad))
            if kept.host is not None:
                kept.on_device = None  # from here on whoever computes with it keeps it
        if inputs.before is not None:
            self._fetch(inputs.before)
        return tensors

    def drop(self, inputs: KeptInputs) -> None:
        """Nobody asks for ``inputs`` any more."""
        for kept in inputs.tensors:
            self._wait_for(kept)
            if kept.host is not None:
                self._pool.give_back(kept.host)

    def _send(self, kept: _Kept) -> tuple[_Kept, Tensor, Any]:
        kept.host = self._pool.take(kept.on_device.nbytes)
        at_host = kept.host.view(kept.shape, kept.dtype)
        return kept, kept.on_device, self._transfers.copy(at_host, kept.on_device, self._transfers.mark())

    def _part_with(self, leaving: Sequence[tuple[_Kept, Tensor, Any]]) -> None:
        for kept, tensor, departure in leaving:
            self._transfers.wait(departure)
            if kept.on_device is tensor:
                kept.on_device = None

    def _fetch(self, inputs: KeptInputs) -> None:
        for kept in inputs.tensors:
            if kept.on_device is None:
                kept.on_device = torch.empty(kept.shape, dtype=kept.dtype, device=kept.device)
                at_host = kept.host.view(kept.shape, kept.dtype)
                kept.arrival = self._transfers.copy(kept.on_device, at_host, self._transfers.mark())

    def _wait_for(self, kept: _Kept) -> None:
        arrival, kept.arrival = kept.arrival, None
        if arrival is not None:
            self._transfers.wait(arrival)


class OffloadedForward:
    """In place of a block's ``forward``: checkpoints it, and keeps its inputs with an offloader.

    Args:
        index: the block's place in the order of a forward pass.
        count: how many of the first arguments are the block's own; the others are those of all blocks.
        forward: what computes the block, which something else may wrap or replace.
        last_layers: of the block, as ``checkpoint_block`` takes them.
    """

    def __init__(
        self,
        offloader: ActivationOffloader,
        index: int,
        count: int,
        forward: Callable[..., Any],
        last_layers: Sequence[LastLayer] = (),
    ) -> None:
        self.offloader = offloader
        self.index = index
        self.count = count
        self.forward = forward
        self.last_layers = last_layers

    def __call__(self, *inputs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(*inputs)
        given = list(inputs[: self.count])
        kept = self.offloader.keep(self.index, given)

        def compute(*shared: Any) -> Any:
            tensors = list(given) or self.offloader.bring(kept)
            given.clear()  # or this function, which lives until the backward pass, would hold them on the device
            return self.forward(*tensors, *shared)

        return checkpoint_block(self.last_layers, compute, *inputs[self.count :])


def make_offloader(depth: int, device: torch.device, *, pinned: bool) -> ActivationOffloader:
    """The offloader of a transformer of ``depth`` blocks on ``device``; ``pinned`` asks for page-locked host memory."""
    if device.type != "cuda":
        logger.warning("offloaded activations save no memory where the processor itself computes.")
    pinned = pinned and device.type == "cuda"
    return ActivationOffloader(depth, make_transfers(device, pinned), HostPool(device if pinned else None))
