"""Counting the bytes that a computation on the CPU allocates, and those that autograd keeps of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


def peak_bytes(compute: Callable[[], object]) -> int:
    """The most that is allocated at once inside, beyond what was there before, as the allocator tells torch's profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        compute()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        highest = max(highest, live)
    assert events
    return highest


def saved_bytes(compute: Callable[[], Tensor], except_for: Iterable[Tensor]) -> int:
    """Of the memory that autograd keeps for a backward pass through what ``compute`` gives; views of one piece count it once."""
    pieces: dict[int, int] = {}
    alive = []  # so that no address is used twice

    def keep(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        pieces[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = compute()
    assert output.requires_grad
    others = {tensor.untyped_storage().data_ptr() for tensor in except_for}
    return sum(size for address, size in pieces.items() if address not in others)
