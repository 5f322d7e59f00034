"""Several devices on the CPU: each tensor is tagged with the device that it was put on, and no operator may read two of them.

Tensors on the device ``cpu:1`` say that they are on ``cpu``, and every operator takes them. What each operator is asked for and
given is seen below autograd: in forward passes, in recomputations and in backward passes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICES = (torch.device("cpu", 0), torch.device("cpu", 1))
COPIES = ("aten::_to_copy", "aten::copy_")  # which go from device to device


class DeviceTags(TorchDispatchMode):
    """Raises AssertionError where an operator reads tensors of two devices. Tensors of unknown devices go with any.

    Attributes:
        moved, moved_values: numbers of tensors, and of their values, that went from one device, or None, to another.
    """

    def __init__(self) -> None:
        super().__init__()
        self._tags: dict[int, tuple[torch.UntypedStorage, int]] = {}  # holds what is tagged, as addresses are used again
        self.moved: Counter[tuple[int | None, int]] = Counter()
        self.moved_values: Counter[tuple[int | None, int]] = Counter()

    def tag(self, tensor: torch.Tensor) -> int | None:
        """The number of the device that ``tensor`` is on, if that is known."""
        storage = tensor.untyped_storage()
        return self._tags.get(storage.data_ptr(), (storage, None))[1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        read = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        tags = {self.tag(value) for value in read} - {None}
        result = func(*args, **kwargs)
        made = [value for value in tree_leaves(result) if isinstance(value, torch.Tensor)]
        asked = kwargs.get("device")
        if asked is not None and asked.index is not None:
            self._set(made, asked.index)
        if func.name().startswith(COPIES):
            target, source = self.tag(made[0]), self.tag(read[-1])
            if target is None and source is not None:  # such as host memory, which one device uses
                self._set(made, source)
            elif target != source and (source is not None or asked is not None):
                self.moved[source, target] += 1
                self.moved_values[source, target] += read[-1].numel()
        elif asked is None or asked.index is None:
            if len(tags) > 1:
                raise AssertionError(f"{func.name()} reads tensors of the devices {sorted(tags)}")
            for tag in tags:
                self._set([value for value in made if self.tag(value) is None], tag)
        return result

    def _set(self, tensors: list[torch.Tensor], tag: int) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.nbytes():
                self._tags[storage.data_ptr()] = storage, tag


class _Moved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: torch.Tensor, device: torch.device, source: torch.device) -> torch.Tensor:
        ctx.source = source
        return tensor.to(device)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradient.to(ctx.source), None, None


class _GradientsGoBack(TorchFunctionMode):
    """The gradient of ``to`` goes to the device that the tensor was on, as between real devices; on the CPU it would stay."""

    def __init__(self, tags: DeviceTags) -> None:
        super().__init__()
        self._tags = tags

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.to and args[0].requires_grad and isinstance(args[1], torch.device) and args[1].index is not None:
            source = self._tags.tag(args[0])
            if source not in (None, args[1].index):
                return _Moved.apply(args[0], args[1], DEVICES[source])
        return func(*args, **(kwargs or {}))


@contextmanager
def device_tags() -> Iterator[DeviceTags]:
    """Everything inside is checked."""
    with DeviceTags() as tags, _GradientsGoBack(tags):
        yield tags
