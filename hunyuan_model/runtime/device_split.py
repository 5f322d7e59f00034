"""The blocks of one transformer on several devices: activations go from device to device, weights stay where they are.

The first device has the embedders and the first blocks, the last one the last blocks and the final layer: what goes back to the
first is the velocity, 64 numbers for each image token, where the tokens would be 3072.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hunyuan_model.transformer.config import TransformerConfig
from utils.cli.arguments import AUTO
from utils.errors import UserError, shown
from utils.processes.ranks import launched_with_others

logger = logging.getLogger(__name__)

FLAG = "--split_blocks"
_BLOCK_NAME = re.compile(r"(double|single)_blocks\.(\d+)(?:\.|$)")


def parse_split(text: str | None) -> tuple[int, ...] | str:
    """``"auto"`` as it is; ``"20,40"`` -> (20, 40); None -> (). Raises UserError for anything else."""
    if text is None or text == AUTO:
        return text or ()
    counts = text.split(",")
    if len(counts) < 2 or not all(count.strip().isascii() and count.strip().isdecimal() and int(count) for count in counts):
        raise UserError(
            f"{FLAG} {shown(text)} is not understood: give {AUTO}, or for each of at least two GPUs how many blocks it has, such "
            "as 20,40."
        )
    return tuple(map(int, counts))


def split_devices(device: torch.device, counts: Sequence[int] | str) -> tuple[torch.device, ...]:
    """The devices of a split: that of this process, and the other visible GPUs behind it; for ``()`` that of this process alone.

    Raises:
        UserError: there are not as many, or other processes have them.
    """
    if not counts:
        return (device,)
    gpus = visible_gpus(device)
    given = f"{FLAG} {counts if counts == AUTO else ','.join(map(str, counts))}"
    if launched_with_others():
        raise UserError(
            f"{given} is for one process that has all GPUs, but this one was launched with others: start it with plain python, or "
            f"with accelerate launch --num_processes 1; or leave {FLAG} out."
        )
    if not gpus:
        raise UserError(f"{given} spreads the blocks over several GPUs, but this runs on {device}; leave it out.")
    needed = 2 if counts == AUTO else len(counts)
    if len(gpus) < needed:
        raise UserError(
            f"{given} needs {needed} GPUs, but this process sees {len(gpus)}: leave it out, or check CUDA_VISIBLE_DEVICES."
        )
    return gpus if counts == AUTO else gpus[:needed]


def visible_gpus(device: torch.device) -> tuple[torch.device, ...]:
    """All that this process sees, ``device`` first; none where that is no GPU."""
    if device.type != "cuda":
        return ()
    first = torch.cuda.current_device() if device.index is None else device.index
    others = [index for index in range(torch.cuda.device_count()) if index != first]
    return tuple(torch.device("cuda", index) for index in (first, *others))


def check_split(counts: Sequence[int], config: TransformerConfig) -> None:
    """Raise a UserError where ``counts`` are not those of all blocks."""
    depth = config.double_depth + config.single_depth
    if counts and sum(counts) != depth:
        raise UserError(
            f"{FLAG} {','.join(map(str, counts))} places {sum(counts)} blocks, but this transformer has {depth}: "
            f"{config.double_depth} double and {config.single_depth} single ones. Give numbers that add up to {depth}, or {AUTO}."
        )


def block_number(name: str, config: TransformerConfig) -> int | None:
    """Of the block that a module or weight belongs to, double and single ones counted together; None for what is in none."""
    match = _BLOCK_NAME.match(name)
    return match and int(match[2]) + (config.double_depth if match[1] == "single" else 0)


@dataclass(frozen=True)
class Share:
    """What one device has of a transformer: these blocks, and what comes before the first and after the last of all."""

    blocks: range
    is_first: bool = True
    is_last: bool = True

    def has(self, name: str, config: TransformerConfig) -> bool:
        """Whether a module or weight is here."""
        number = block_number(name, config)
        if number is None:
            return self.is_last if name.startswith("final_layer") else self.is_first
        return number in self.blocks

    def part_of(self, config: TransformerConfig) -> TransformerConfig:
        """``config`` with the blocks that are here alone."""
        doubles = len(range(self.blocks.start, min(self.blocks.stop, config.double_depth)))
        return replace(config, double_depth=doubles, single_depth=len(self.blocks) - doubles)


def shares(counts: Sequence[int], config: TransformerConfig) -> tuple[Share, ...]:
    """Of each device; ``counts`` are its numbers of blocks, () for a device that has everything."""
    counts, end, found = counts or (config.double_depth + config.single_depth,), 0, []
    for position, count in enumerate(counts):
        found.append(Share(range(end, end + count), position == 0, position == len(counts) - 1))
        end += count
    return tuple(found)


@dataclass(frozen=True)
class DeviceSplit:
    """``shares`` of a transformer of ``config``, one for each of ``devices``."""

    devices: tuple[torch.device, ...]
    shares: tuple[Share, ...]
    config: TransformerConfig

    def device_of(self, name: str) -> torch.device:
        """Where a module computes, or a weight is used."""
        return next(device for device, share in zip(self.devices, self.shares) if share.has(name, self.config))


def make_split(counts: Sequence[int], devices: Sequence[torch.device], config: TransformerConfig) -> DeviceSplit:
    """``counts`` blocks on each of ``devices``; () and one device for a transformer that is not split."""
    check_split(counts, config)
    return DeviceSplit(tuple(devices), shares(counts, config), config)


def device_of(transformer: nn.Module, name: str, device: torch.device) -> torch.device:
    """Where the module or weight ``name`` of a transformer that is on ``device``, or split, computes."""
    split = getattr(transformer, "device_split", None)
    return device if split is None else split.device_of(name)


def devices_of(transformer: nn.Module, device: torch.device) -> tuple[torch.device, ...]:
    """All on which a transformer that is on ``device``, or split, computes."""
    split = getattr(transformer, "device_split", None)
    return (device,) if split is None else split.devices


def enable_device_split(transformer: nn.Module, split: DeviceSplit) -> None:
    """Have each block of ``transformer`` compute on its device, from outside; ``transformer.device_split`` is ``split``.

    The weights are there already. Only ``forward`` of blocks and of the final layer is wrapped, around whatever wraps ``branches``:
    what checkpointing keeps is on the device of its block. Nothing happens where there is one device.
    """
    if len(split.devices) == 1:
        return
    first, *others = zip(split.devices, split.shares)
    blocks = [*transformer.double_blocks, *transformer.single_blocks]
    moved: list[_MovedOnce] = []
    for device, share in others:
        once = _MovedOnce(device)
        moved.append(once)
        for number in share.blocks:
            block = blocks[number]
            block.forward = _ForwardOnDevice(once, block.forward, arrives=number == share.blocks.start)
    final = transformer.final_layer
    final.forward = _FinalForwardOnDevice(moved[-1], first[0], final.forward)

    def forget(*_: object) -> None:
        for once in moved:
            once.forget()

    transformer.register_forward_hook(forget, always_call=True)
    transformer.device_split = split
    logger.info(
        "blocks by device: %s", ", ".join(f"{len(share.blocks)} on {device}" for device, share in zip(split.devices, split.shares))
    )


class _MovedOnce:
    """Copies on ``device`` of what all blocks read, each made once in a forward pass."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._copies: list[tuple[Tensor, Tensor]] = []

    def of(self, tensor: Tensor) -> Tensor:
        for source, copy in self._copies:
            if source is tensor:
                return copy
        self._copies.append((tensor, _to(self.device, tensor)))
        return self._copies[-1][1]

    def forget(self) -> None:
        self._copies.clear()


def _to(device: torch.device, tensor: Tensor) -> Tensor:
    """With a gradient that goes back. Between GPUs the host does not wait, and both streams wait for the copy."""
    return tensor.to(device, non_blocking=True)


def _computing_on(device: torch.device) -> AbstractContextManager[Any]:
    """Some kernels ask for the current device, not for that of their tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class _ForwardOnDevice:
    """In place of a block's ``forward``; ``arrives``: its tokens are on another device."""

    def __init__(self, moved: _MovedOnce, forward: Callable[..., Any], arrives: bool) -> None:
        self.moved, self.forward, self.arrives = moved, forward, arrives

    def __call__(self, *inputs: Any) -> Any:
        *tokens, vec, rope, lengths = inputs
        if self.arrives:
            tokens = [_to(self.moved.device, part) for part in tokens]
        del inputs  # or the tokens would stay on the other device while the block computes
        with _computing_on(self.moved.device):
            return self.forward(*tokens, self.moved.of(vec), self.moved.of(rope), lengths)


class _FinalForwardOnDevice:
    """In place of the final layer's ``forward``: what it gives goes back to the device ``back``."""

    def __init__(self, moved: _MovedOnce, back: torch.device, forward: Callable[..., Tensor]) -> None:
        self.moved, self.back, self.forward = moved, back, forward

    def __call__(self, x: Tensor, vec: Tensor) -> Tensor:
        with _computing_on(self.moved.device):
            patches = self.forward(x, self.moved.of(vec))
        return _to(self.back, patches)
