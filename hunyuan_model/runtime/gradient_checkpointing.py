"""Recompute each block's activations in the backward pass instead of keeping them (https://arxiv.org/abs/1604.06174)."""

from __future__ import annotations

import functools

from torch import nn

from hunyuan_model.runtime.activation_offload import ActivationOffloader, OffloadedForward
from hunyuan_model.runtime.block_swap import computes_itself
from hunyuan_model.runtime.recomputation import checkpoint_block, hook_last_layers

DOUBLE_INPUTS, SINGLE_INPUTS = 2, 1  # image and text tokens; both in one. Every other argument is the same for all blocks.


def enable_gradient_checkpointing(transformer: nn.Module, offloader: ActivationOffloader | None = None) -> None:
    """Wrap the forward of every double and single block from outside; the blocks keep their class and parameters.

    Only each block's inputs stay in memory until the backward pass. Results and gradients do not change. Call it before a
    network is hooked in, or the recomputation leaves nothing out (see ``hunyuan_model.runtime.recomputation``).

    Args:
        offloader: has the inputs wait in host memory instead of on the device.
    """
    blocks = [(block, DOUBLE_INPUTS) for block in transformer.double_blocks]
    blocks += [(block, SINGLE_INPUTS) for block in transformer.single_blocks]
    for index, (block, inputs) in enumerate(blocks):
        # A compiled block is one piece, of which nothing can be left out, and what else wraps a block is unknown.
        last_layers = hook_last_layers(block) if computes_itself(block) else []
        if offloader is None:
            block.forward = functools.partial(checkpoint_block, last_layers, block.forward)
        else:
            block.forward = OffloadedForward(offloader, index, inputs, block.forward, last_layers)
