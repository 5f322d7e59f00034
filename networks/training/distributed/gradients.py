"""The gradients of all processes, summed by one all-reduce for each optimizer step.

The network is hooked into the transformer's layers, so that no wrapper of torch's sees its forward pass. Nor would one help: the
gradients of a LoRA take milliseconds to sum, after a step of seconds, and while a step accumulates nothing has to be sent.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed
from torch import Tensor, nn


class SharedGradients:
    """The gradients of ``parameters``, one after the other in one tensor of each dtype, usually float32 alone.

    Behind those in float32 is room for ``values`` numbers that are summed with them.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], values: int) -> None:
        by_dtype: dict[torch.dtype, list[nn.Parameter]] = {torch.float32: []}
        for parameter in parameters:
            by_dtype.setdefault(parameter.dtype, []).append(parameter)
        self._gradients: list[tuple[nn.Parameter, Tensor]] = []
        self._memory: list[Tensor] = []
        for dtype, group in by_dtype.items():
            sizes = [parameter.numel() for parameter in group]
            more = values if dtype == torch.float32 else 0
            device = next((parameter.device for each in by_dtype.values() for parameter in each), None)
            memory = torch.zeros(sum(sizes) + more, dtype=dtype, device=device)
            views = memory[: sum(sizes)].split(sizes) if sizes else ()
            self._gradients += [(parameter, view.view_as(parameter)) for parameter, view in zip(group, views)]
            self._memory.append(memory)
        self._values = self._memory[0][len(self._memory[0]) - values :]

    def begin(self) -> None:
        """Zero gradients, to which backward passes add from now on: all processes have all of them, whatever they compute."""
        for memory in self._memory:
            memory.zero_()
        for parameter, view in self._gradients:
            parameter.grad = view

    def sum(self, values: Tensor) -> Tensor:
        """Sum the gradients and ``values``, (n,), over all processes, which call this together. Returns the sums of values."""
        self._values.copy_(values)
        for memory in self._memory:
            torch.distributed.all_reduce(memory)
        return self._values.clone()


def same_in_all(parameters: Iterable[nn.Parameter]) -> None:
    """Give all processes the values of the first one, so that they train one network. All must call this together."""
    tensors = [parameter.detach() for parameter in parameters]
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        group = [tensor for tensor in tensors if tensor.dtype == dtype]
        together = torch.cat([tensor.flatten() for tensor in group])
        torch.distributed.broadcast(together, src=0)
        for tensor, part in zip(group, together.split([tensor.numel() for tensor in group])):
            tensor.copy_(part.view_as(tensor))
