"""Recompute each block's activations in the backward pass instead of keeping them (https://arxiv.org/abs/1604.06174)."""

from __future__ import annotations

import functools

from torch import nn
from torch.utils.checkpoint import checkpoint


def enable_gradient_checkpointing(transformer: nn.Module) -> None:
    """Wrap the forward of every double and single block from outside; the blocks keep their class and parameters.

    Only each block's inputs stay in memory until the backward pass. Results and gradients do not change.
    """
    for block in (*transformer.double_blocks, *transformer.single_blocks):
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
