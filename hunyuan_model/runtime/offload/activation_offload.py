"""Activation offload: the inputs of blocks that checkpointing keeps are in host memory until the backward pass.

They are copied there while the block computes, and back while the block after theirs computes in the backward pass. The last
blocks of a forward pass are the first ones of the backward pass, so their inputs stay. What all blocks share (conditioning, RoPE
tables) is not copied.

Device memory is freed only after the computation was made to wait for the copies that read or write it: whoever gets that
memory next is ordered after them, however far Python runs ahead of the device. Copies are made in the order in which they were
asked for, so host memory can be reused while the last copy from it or to it is under way.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hunyuan_model.runtime.kept_attention import AttentionResults, KeptAttention
from hunyuan_model.runtime.offload.host_weights import host_memory, page_lock
from hunyuan_model.runtime.offload.transfers import Transfers, make_transfers

logger = logging.getLogger(__name__)

ON_DEVICE = 2  # blocks whose inputs the device holds: of one that computes, and of one that is being copied
MOST_TIMES = 16  # as large as what it is taken for host memory may be: log-sum-exps are not to use up that of tokens


class HostPool:
    """Host memory that is taken and given back: each step uses the memory of the one before it.

    Page-locked for the CUDA device ``pinned_for``, or pageable. Where the system does not page-lock so much, what comes after is
    pageable, and ``becomes_pageable`` is called once, before any of it is given out.
    """

    def __init__(self, pinned_for: torch.device | None = None, becomes_pageable: Callable[[], None] = lambda: None) -> None:
        self._pinned_for = pinned_for
        self._becomes_pageable = becomes_pageable
        self._free: list[Tensor] = []
        # Two threads use it, and garbage collection may give memory back inside ``take``: it only appends, so indices stay.
        self._lock = threading.RLock()

    def take(self, size: int) -> Tensor:
        """(at least ``size``,) uint8 of unknown content."""
        with self._lock:
            sizes = [memory.nbytes for memory in self._free]
            if fitting := [nbytes for nbytes in sizes if size <= nbytes <= MOST_TIMES * size]:
                return self._free.pop(sizes.index(min(fitting)))
            if smaller := [nbytes for nbytes in sizes if nbytes < size]:  # the largest of them makes room
                self._free.pop(sizes.index(max(smaller)))
        return self._allocate(size)

    def _allocate(self, size: int) -> Tensor:
        memory = host_memory(size)
        if self._pinned_for is not None and not page_lock(memory, self._pinned_for, owner=memory):
            logger.warning("the system does not allow to pin more memory for activations; copying them takes longer.")
            self._pinned_for = None
            self._becomes_pageable()
        return memory

    def give_back(self, memory: Tensor) -> None:
        """Have ``memory`` for whoever asks next."""
        with self._lock:
            self._free.append(memory)


class _KeptTensor:
    """One input of a block: on the device, in host memory, or both."""

    def __init__(self, tensor: Tensor) -> None:
        self.on_device: Tensor | None = tensor.detach()
        self.device = tensor.device
        self.requires_grad = tensor.requires_grad
        self.memory: Tensor | None = None  # of the pool
        self.on_host: Tensor | None = None  # a view of it
        self.arrival: Any = None  # of the copy back to the device, until it was waited for


class KeptInputs:
    """The inputs of one pass through a block, for as long as a backward pass may ask for them; ``previous``: of the pass before."""

    def __init__(
        self, offloader: ActivationOffloader, tensors: Sequence[Tensor], previous: KeptInputs | None, *, offloaded: bool
    ) -> None:
        self.tensors = [_KeptTensor(tensor) for tensor in tensors]
        self.results: list[_KeptTensor] = []  # of attention in the block
        self.previous = weakref.ref(previous) if previous is not None else lambda: None
        self.offloaded = offloaded
        self._offloader = offloader

    def __del__(self) -> None:
        self._offloader.release(self)

    def keep_result(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Keep a result of attention in the block, which computes now; what is returned gives it back after ``restore``."""
        kept = _KeptTensor(tensor)
        if tensor.is_floating_point() and tensor.numel():  # not the seeds of attention
            self.results.append(kept)
            self._offloader.offload_result(self, kept)
        return partial(self._offloader.take, kept)


class ActivationOffloader:
    """Copies the inputs of ``depth`` blocks to host memory, and back to the device before they are needed."""

    def __init__(self, depth: int, transfers: Transfers, pool: HostPool) -> None:
        self.depth = depth
        self._transfers = transfers
        self._pool = pool
        # By block: its inputs, the tensors that are copied to the host, and the marks of these copies.
        self._offloading: deque[list[tuple[_KeptTensor, Tensor, Any]]] = deque()
        self._latest: Callable[[], KeptInputs | None] = lambda: None

    def keep(self, block: int, tensors: Sequence[Tensor]) -> KeptInputs:
        """Start to offload the inputs of ``block``, which begins a forward pass; those of the last blocks stay."""
        while self._offloading and (block == 0 or len(self._offloading) >= ON_DEVICE):
            self._free_on_device(self._offloading.popleft())
        inputs = KeptInputs(self, tensors, self._latest(), offloaded=block < self.depth - ON_DEVICE)
        self._latest = weakref.ref(inputs)
        self._offloading.append([self._copy_to_host(kept) for kept in inputs.tensors if inputs.offloaded])
        return inputs

    def offload_result(self, inputs: KeptInputs, result: _KeptTensor) -> None:
        """Start to offload a result of the block of ``inputs``, the latest one."""
        if inputs.offloaded:
            self._offloading[-1].append(self._copy_to_host(result))

    def restore(self, inputs: KeptInputs) -> list[Tensor]:
        """The inputs on the device, for a backward pass through their block that begins; those of the previous block follow."""
        self._copy_to_device(inputs)
        tensors = [self.take(kept).requires_grad_(kept.requires_grad) for kept in inputs.tensors]
        if (previous := inputs.previous()) is not None:
            self._copy_to_device(previous)
        return tensors

    def take(self, kept: _KeptTensor) -> Tensor:
        """``kept``, which is on the device or on its way there."""
        self._wait_for(kept)
        tensor = kept.on_device.detach()
        if kept.on_host is not None:
            kept.on_device = None  # whoever computes with it holds it from here on
        return tensor

    def release(self, inputs: KeptInputs) -> None:
        """Give back the host memory of ``inputs``, for which nobody asks any more."""
        for kept in (*inputs.tensors, *inputs.results):
            self._wait_for(kept)
            if kept.memory is not None:
                self._pool.give_back(kept.memory)

    def _copy_to_host(self, kept: _KeptTensor) -> tuple[_KeptTensor, Tensor, Any]:
        tensor = kept.on_device
        kept.memory = self._pool.take(tensor.nbytes)
        # With the strides of the tensor where it has no gaps: others computed with it, and would copy another one.
        strides = torch.empty_like(tensor, device="meta").stride()
        kept.on_host = kept.memory[: tensor.nbytes].view(tensor.dtype).as_strided(tensor.shape, strides)
        return kept, tensor, self._transfers.copy(kept.on_host, tensor, self._transfers.mark())

    def _free_on_device(self, copies: Sequence[tuple[_KeptTensor, Tensor, Any]]) -> None:
        for kept, tensor, arrival in copies:
            self._transfers.wait(arrival)
            if kept.on_device is tensor:
                kept.on_device = None

    def _copy_to_device(self, inputs: KeptInputs) -> None:
        for kept in (*inputs.tensors, *inputs.results):
            if kept.on_device is None:
                kept.on_device = torch.empty_like(kept.on_host, device=kept.device)
                kept.arrival = self._transfers.copy(kept.on_device, kept.on_host, self._transfers.mark())

    def _wait_for(self, kept: _KeptTensor) -> None:
        arrival, kept.arrival = kept.arrival, None
        if arrival is not None:
            self._transfers.wait(arrival)


def checkpoint_offloaded(
    offloader: ActivationOffloader,
    index: int,
    count: int,
    attention: KeptAttention | None,
    forward: Callable[..., Any],
    *inputs: Any,
) -> Any:
    """``forward(*inputs)`` of block ``index``, checkpointed; the first ``count`` inputs are the block's own and are offloaded.

    With ``attention``, that of the block, its results are offloaded as well, and not computed again.
    """
    if not torch.is_grad_enabled():
        return forward(*inputs)
    given = list(inputs[:count])
    kept = offloader.keep(index, given)
    results = AttentionResults(kept.keep_result)

    def compute(*shared: Any) -> Any:
        tensors = list(given) or offloader.restore(kept)
        given.clear()  # or this function, which lives until the backward pass, would hold them on the device
        with attention.using(results) if attention is not None else nullcontext():
            return forward(*tensors, *shared)

    return checkpoint(compute, *inputs[count:], use_reentrant=False)


def make_offloader(depth: int, device: torch.device, *, pinned: bool) -> ActivationOffloader:
    """The offloader of a transformer of ``depth`` blocks on ``device``; ``pinned`` asks for page-locked host memory."""
    if device.type != "cuda":
        logger.warning("offloaded activations save no memory where the CPU itself computes.")
    pinned = pinned and device.type == "cuda"
    transfers = make_transfers(device, pinned)
    return ActivationOffloader(depth, transfers, HostPool(device if pinned else None, transfers.expect_pageable))
