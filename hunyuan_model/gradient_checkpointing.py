"""Recompute each block's activations in the backward pass instead of keeping them (https://arxiv.org/abs/1604.06174)."""

from __future__ import annotations

import functools

from torch import nn
from torch.utils.checkpoint import checkpoint

from hunyuan_model.activation_offload import ActivationOffloader, OffloadedForward

DOUBLE_INPUTS, SINGLE_INPUTS = 2, 1  # image and text tokens; both in one. Every other argument is the same for all blocks.


def enable_gradient_checkpointing(transformer: nn.Module, offloader: ActivationOffloader | None = None) -> None:
    """Wrap the forward of every double and single block from outside; the blocks keep their class and parameters.

    Only each block's inputs stay in memory until the backward pass. Results and gradients do not change.

    Args:
        offloader: has the inputs wait in host memory instead of on the device.
    """
    blocks = [(block, DOUBLE_INPUTS) for block in transformer.double_blocks]
    blocks += [(block, SINGLE_INPUTS) for block in transformer.single_blocks]
    for index, (block, inputs) in enumerate(blocks):
        if offloader is None:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        else:
            block.forward = OffloadedForward(offloader, index, inputs, block.forward)
