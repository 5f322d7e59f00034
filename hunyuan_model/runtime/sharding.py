"""Frozen weights in shards: each process holds a part of every weight, and has a block's weights whole while it computes.

That is torch's FSDP2 (https://arxiv.org/abs/2304.11277), with each block as a unit and everything else as one more. Only frozen
weights are sharded: what is trained stands beside the transformer. The passes of all processes gather weights together, so each
process makes the same passes in the same order, or all of them wait for ever.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from utils.errors import UserError

logger = logging.getLogger(__name__)

# Of the largest block, on a GPU: its weights while it computes, and of the next one what arrives and its weights laid out.
GATHERED_BLOCKS = 3


@dataclass(frozen=True)
class ShardingSettings:
    """Which processes share the weights: all of the default process group.

    Attributes:
        processes: how many.
        offload: the shards are in host memory, and are copied to the device before they are gathered.
    """

    processes: int
    offload: bool = False

    def __post_init__(self) -> None:
        if self.processes < 2:
            raise UserError("sharded weights take two processes or more: start more of them, or leave FSDP out.")


class ShardedWeights:
    """The part of each weight that this process holds. ``load_weights`` takes it as the placement of weights."""

    def __init__(self, sharding: ShardingSettings, device: torch.device) -> None:
        self.sharding = sharding
        self.shards: dict[str, Tensor] = {}
        self._device = torch.device("cpu") if sharding.offload else device
        self._rank = torch.distributed.get_rank()

    def loads(self, name: str) -> bool:
        """Every process reads every weight."""
        return True

    def wants(self, name: str) -> bool:
        """Every weight is sharded."""
        return True

    def copy(self, name: str, tensor: Tensor) -> Tensor:
        """Keep the rows of this process, and give a tensor without values for the module: all that FSDP reads of it."""
        rows = -(-len(tensor) // self.sharding.processes)  # as FSDP cuts
        self.shards[name] = tensor[self._rank * rows : (self._rank + 1) * rows].to(self._device, copy=True)
        return torch.empty_like(tensor, device="meta")

    def loaded(self, name: str) -> None:
        """Nothing is left to do."""


def enable_sharding(transformer: nn.Module, weights: ShardedWeights, device: torch.device, *, pinned: bool = True) -> None:
    """Shard ``transformer``, whose parameters have no values yet, and give it the shards in ``weights``, from outside.

    Outside of a forward and a backward pass its parameters are DTensors. Classes keep their names, by which network modules find
    blocks, and parameters theirs. Call it once, after ``enable_quantized_linears``, with the process group running.

    Args:
        device: where the transformer computes; the current one of this process.
        pinned: page-lock shards in host memory; matters for CUDA only.
    """
    from torch.distributed import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
    from torch.distributed.tensor import DTensor, Shard

    sharding = weights.sharding
    mesh = init_device_mesh(device.type, (sharding.processes,))
    offload = CPUOffloadPolicy(pin_memory=pinned and device.type == "cuda") if sharding.offload else OffloadPolicy()
    shapes = {name: parameter.shape for name, parameter in transformer.named_parameters()}
    for unit in (*transformer.double_blocks, *transformer.single_blocks, transformer):
        name = type(unit).__name__
        fully_shard(unit, mesh=mesh, offload_policy=offload)
        type(unit).__name__ = name  # FSDP makes a class of its own for each class
    parameters = {}
    for name, shape in shapes.items():
        stride = torch.empty(shape, device="meta").stride()
        parameters[name] = DTensor.from_local(
            weights.shards.pop(name), mesh, [Shard(0)], run_check=False, shape=shape, stride=stride
        )
    transformer.load_state_dict(parameters, assign=True)
    transformer.register_forward_pre_hook(_with_gradient)
    logger.info("the weights of the transformer are shared by %d processes, each block as a unit", sharding.processes)


def _with_gradient(transformer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Let every block be in every backward pass: dropout may leave out all that is trained in the first ones, in one process."""
    if not torch.is_grad_enabled():
        return None
    return inputs[0].detach().requires_grad_(), *inputs[1:]


@contextmanager
def whole_weights(block: nn.Module) -> Iterator[None]:
    """The parameters of a block are whole tensors inside; all processes enter. Nothing happens where they are not sharded."""
    sharded = hasattr(block, "unshard")
    if sharded:
        block.unshard()
    try:
        yield
    finally:
        if sharded:
            block.reshard()
