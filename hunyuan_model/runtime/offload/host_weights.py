"""Frozen weights of a module in one piece of host memory, from which a device is served with one copy."""

from __future__ import annotations

import logging
import mmap
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

ALIGNMENT = 256  # of each weight within the piece: what CUDA gives any tensor, and kernels count on


class Place(NamedTuple):
    """Where a parameter of a module lies in a piece of memory: from byte ``start`` on."""

    name: str
    dtype: torch.dtype
    shape: torch.Size
    start: int

    def view(self, memory: Tensor) -> Tensor:
        """Its value in ``memory``, uint8."""
        end = self.start + self.shape.numel() * self.dtype.itemsize
        return memory[self.start : end].view(self.dtype).view(self.shape)


class HostWeights:
    """The frozen parameters of ``module``: the one lasting copy of their values is ``memory`` (uint8), which nothing writes to.

    The parameters stay the same objects and point there, or, while the module computes, to a copy on the device. Trainable
    parameters and buffers of the module are moved to the device and stay there.

    Attributes:
        places: of the parameters in ``memory``.
    """

    def __init__(self, module: nn.Module, device: torch.device, memory: Tensor, places: Sequence[Place]) -> None:
        self.memory = memory
        self.places = places
        self.parameters = tuple(module.get_parameter(place.name) for place in places)
        self._host_views = self.views(memory)
        _move_the_rest(module, device)

    @classmethod
    def moved(cls, module: nn.Module, device: torch.device, allocate: Callable[[int], Tensor] | None = None) -> HostWeights:
        """The values of ``module``, which move to memory from ``allocate``; by default memory of this process alone."""
        frozen = {name: parameter for name, parameter in module.named_parameters() if not parameter.requires_grad}
        places: list[Place] = []
        end = 0
        for name, parameter in frozen.items():
            start = -(-end // ALIGNMENT) * ALIGNMENT
            end = start + parameter.nbytes
            places.append(Place(name, parameter.dtype, parameter.shape, start))
        memory = (allocate or host_memory)(end)
        for place, parameter in zip(places, frozen.values()):
            view = place.view(memory).copy_(parameter.detach())
            parameter.data = view  # frees the memory where it was before the next one is copied
        return cls(module, device, memory, places)

    @classmethod
    def found(cls, module: nn.Module, device: torch.device, memory: Tensor, places: Sequence[Place]) -> HostWeights:
        """Values in ``memory`` already, such as another process put them there: ``module``, not loaded yet, gets them."""
        for place in places:
            owner, _, leaf = place.name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, nn.Parameter(place.view(memory), requires_grad=False))
        return cls(module, device, memory, places)

    def views(self, memory: Tensor) -> list[Tensor]:
        """The parameters' values as they lie in ``memory``, a copy of this piece or more, uint8."""
        return [place.view(memory) for place in self.places]

    def point_at(self, views: Sequence[Tensor]) -> None:
        """Have the parameters show the values of ``views``, in their order."""
        for parameter, view in zip(self.parameters, views):
            if parameter.requires_grad:
                raise RuntimeError("swapped weights cannot be trained; make them trainable before block swap is enabled")
            parameter.data = view

    def point_at_host(self) -> None:
        """Have the parameters show the host memory.

        What autograd has saved of them for a backward pass is not valid any more: it refuses to use it.
        """
        self.point_at(self._host_views)
        for parameter in self.parameters:
            torch.autograd.graph.increment_version(parameter)

    def pin(self, device: torch.device) -> bool:
        """Page-lock the memory, so that a CUDA device reads it at full speed by itself. False where the system refuses."""
        return page_lock(self.memory, device, owner=self)


def host_memory(size: int) -> Tensor:
    """(size,) uint8 on pages of its own, as page-locking works on whole pages; freed as soon as nobody holds it.

    On Linux this process alone has it: forked processes, such as those that read caches, die where they touch it.
    """
    options = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    pages = mmap.mmap(-1, max(1, size), **options)
    # A fork copies page-locked private pages, all of them at once. Huge pages: fewer faults, and locking is faster.
    for advice in ("MADV_DONTFORK", "MADV_HUGEPAGE"):
        if hasattr(mmap, advice):
            with suppress(OSError):  # kernels may be built without them
                pages.madvise(getattr(mmap, advice))
    return torch.frombuffer(pages, dtype=torch.uint8)[:size]


def host_copy(tensor: Tensor) -> Tensor:
    """A copy of ``tensor`` in ``host_memory``."""
    return host_memory(tensor.nbytes).view(tensor.dtype).view(tensor.shape).copy_(tensor)


def page_lock(memory: Tensor, device: torch.device, owner: object) -> bool:
    """Page-lock ``memory``, of ``host_memory``, for as long as ``owner`` lives. False where the system refuses."""
    # torch's own pinned memory comes in powers of two, which would take up to twice as much.
    address = memory.data_ptr()
    if int(torch.cuda.cudart().cudaHostRegister(address, memory.nbytes, 0)) != 0:
        _forget_cuda_error(device)
        return False
    weakref.finalize(owner, _unpin, address, device).atexit = False
    return True


def _move_the_rest(module: nn.Module, device: torch.device) -> None:
    for parameter in module.parameters():
        if parameter.requires_grad and parameter.device != device:
            parameter.data = parameter.data.to(device)
    for owner in module.modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None and buffer.device != device:
                owner._buffers[name] = buffer.to(device)


def _unpin(address: int, device: torch.device) -> None:
    torch.cuda.synchronize(device)  # a copy that was started ahead may still read it
    torch.cuda.cudart().cudaHostUnregister(address)


def _forget_cuda_error(device: torch.device) -> None:
    """CUDA reports an error again at the next kernel, whoever starts it; so start one that may fail."""
    try:
        torch.zeros(1, device=device).add_(1)
    except RuntimeError as error:
        logger.debug("forgotten: %s", error)
