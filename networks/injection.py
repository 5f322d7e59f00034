"""LoRA beside the weights of a transformer, computed in every forward pass, so that the multipliers can change."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hunyuan_model.quantization.linear import dequantized_weight
from hunyuan_model.runtime.device_split import device_of
from networks.formats.reading import PlacedUpdate
from networks.formats.updates import DoRA, LowRank, Replacement, Update, strength
from networks.low_rank import low_rank_product
from networks.merging import LoraToMerge, merged_weight


class InjectedLoras:
    """LoRA updates that ``transformer`` computes beside its weights, which stay as they are, quantized and swapped ones too.

    A Linear layer adds what the update of its weight makes of its input: for LoRA by the two small factors, else by the whole
    difference, which is made anew in every call. Other parameters (biases, norms, the patch embedding) are changed when they
    are read.
    Make it after ``load_transformer`` and before the first forward pass.

    Args:
        device: of the computation, where the updates go; of a split transformer the first. They keep the dtypes of their files.

    Raises:
        UserError: a LoRA does not match the transformer.
    """

    def __init__(self, transformer: nn.Module, loras: Sequence[LoraToMerge], device: torch.device) -> None:
        self._multipliers = [lora.multiplier for lora in loras]
        shapes = {name: tuple(parameter.shape) for name, parameter in transformer.named_parameters()}
        found: dict[str, list[tuple[int, PlacedUpdate, float]]] = {}
        for index, lora in enumerate(loras):
            for name, placed, factor in lora.placed(shapes):
                found.setdefault(name, []).append((index, _on_device(placed, device_of(transformer, name, device)), factor))
        for name, updates in found.items():
            path, _, parameter = name.rpartition(".")
            module, of_parameter = transformer.get_submodule(path), _Updates(self._multipliers, tuple(updates))
            if isinstance(module, nn.Linear) and parameter == "weight":
                module.forward = _UpdatedForward(module, module.forward, of_parameter).forward
            else:
                module.updates = {**getattr(module, "updates", {}), parameter: of_parameter}
                module.__class__ = _class_that_updates(type(module), parameter)

    def set_multipliers(self, multipliers: Sequence[float]) -> None:
        """One for each LoRA, from the next forward pass on; with 0 the model computes as without it, to the bit."""
        if len(multipliers) != len(self._multipliers):
            raise ValueError(f"{len(multipliers)} multipliers for {len(self._multipliers)} LoRAs")
        self._multipliers[:] = multipliers


@dataclass(frozen=True, eq=False)
class _Updates:
    """Of one parameter: each update with the number of its LoRA and a factor of its multiplier; those of all LoRAs change."""

    multipliers: list[float]
    numbered: tuple[tuple[int, PlacedUpdate, float], ...]

    def active(self) -> list[tuple[PlacedUpdate, float]]:
        """Those that change something, with their multipliers."""
        return [(placed, self.multipliers[at] * factor) for at, placed, factor in self.numbered if self.multipliers[at] != 0]


@dataclass(frozen=True, eq=False)
class _UpdatedForward:
    """The forward of a Linear with updates of its weight. A method: the compiler compares bound methods by their function."""

    linear: nn.Linear
    base_forward: Any
    updates: _Updates

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), dtype of the base layer's output."""
        out = self.base_forward(x)
        for placed, multiplier in self.updates.active():
            update, rows = placed.update, placed.rows(out.shape[-1])
            if isinstance(update, LowRank):
                hidden = F.linear(x, update.down.flatten(1).to(x.dtype))
                change, factor = low_rank_product(hidden, update.up.flatten(1), multiplier * update.scale), 1.0
            else:
                change, factor = F.linear(x, self._delta(update, rows).to(x.dtype)), strength(update, multiplier)
            out[..., rows].add_(change.to(out.dtype), alpha=factor)  # out is the base layer's own: nobody else has it
        return out

    def _delta(self, update: Update, rows: slice) -> Tensor:
        """The change of the weight (out, in) at a multiplier of 1, float32."""
        depends = isinstance(update, DoRA | Replacement)  # else it only asks where the weight is
        return update.delta(dequantized_weight(self.linear)[rows].float() if depends else self.linear.weight)


@lru_cache
def _class_that_updates(kind: type, parameter: str) -> type:
    """A module class like ``kind``, whose ``parameter`` is read with ``updates[parameter]`` added.

    Nothing is written to the parameter, which may be one of a block that is swapped. One class serves all modules of a kind, or
    each would be compiled on its own.
    """

    def read(module: nn.Module) -> Tensor:
        base = module._parameters[parameter]
        return merged_weight(base, module.updates[parameter].active()).to(base.dtype)

    return type(kind.__name__, (kind,), {parameter: property(read)})


def injected_bytes(loras: Iterable[LoraToMerge]) -> int:
    """Of the tensors of ``loras`` on the device, and of what the largest whole difference takes while it is computed."""
    updates = [placed.update for lora in loras for placed in lora.file.updates]
    whole = [math.prod(update.shape) for update in updates if not isinstance(update, LowRank)]
    working = 3 * torch.float32.itemsize * max(whole, default=0)  # such as the weight, its direction and the difference of DoRA
    return sum(tensor.nbytes for tensor in _tensors(updates)) + working


def _tensors(value: object) -> Iterator[Tensor]:
    """In a dataclass, a list or a tuple, at any depth."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _tensors(each)
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))


def _on_device(value: Any, device: torch.device) -> Any:
    """A dataclass or tuple with the tensors in it, at any depth, on ``device``."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_on_device(each, device) for each in value)
    if is_dataclass(value):
        return replace(value, **{field.name: _on_device(getattr(value, field.name), device) for field in fields(value)})
    return value
