"""Recompute each block's activations in the backward pass instead of keeping them (https://arxiv.org/abs/1604.06174).

The recomputation of a block stops once it has made the last tensor that the backward pass needs. That leaves out the block's
last matmul (5/12 of all in a single block, a third of the image's in a double block), because of three habits elsewhere: the gated
addition stands outside of what is checkpointed (``transformer.blocks``), a LoRA is computed before the layer that it is added to
(``networks.lora``), and a layer with quantized weights hands its codes to autograd before it multiplies (``quantization.linear``).

Attention is computed once as well where its results are kept (``kept_attention``), which takes memory.

Where a gate needs a gradient, because the modulation is trained, its addition keeps the branch, and is checkpointed too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hunyuan_model.runtime.kept_attention import AttentionResults, KeptAttention
from hunyuan_model.runtime.offload.activation_offload import ActivationOffloader, checkpoint_offloaded
from hunyuan_model.transformer.blocks import Branch, add_branch

DOUBLE_INPUTS, SINGLE_INPUTS = 2, 1  # image and text tokens; both in one. Every other argument is the same for all blocks.


def enable_gradient_checkpointing(
    transformer: nn.Module, *offloaders: ActivationOffloader | None, keep_attention: bool = False
) -> None:
    """Checkpoint every double and single block from outside; the blocks keep their class and parameters.

    Only each block's inputs stay in memory until the backward pass. Results and gradients do not change.

    Args:
        offloaders: keep what stays in host memory instead of on the device: one for all blocks, or several, each for the ``depth``
            blocks that follow those of the one before.
        keep_attention: the results of attention stay, too, so that it is not computed again; not for compiled blocks.
    """
    blocks = [(block, DOUBLE_INPUTS) for block in transformer.double_blocks]
    blocks += [(block, SINGLE_INPUTS) for block in transformer.single_blocks]
    offloading = [(one, index) for one in offloaders if one is not None for index in range(one.depth)]
    for number, (block, inputs) in enumerate(blocks):
        branches = functools.partial(_add_what_needs_the_branch, block.branches)
        attention = None
        if keep_attention:
            block.attention = attention = KeptAttention(block.attention)
        if offloading:
            offloader, index = offloading[number]
            block.branches = functools.partial(checkpoint_offloaded, offloader, index, inputs, attention, branches)
        elif attention is not None:
            block.branches = functools.partial(_checkpoint_all_but_attention, attention, branches)
        else:
            block.branches = functools.partial(checkpoint, branches, use_reentrant=False)


def _checkpoint_all_but_attention(attention: KeptAttention, forward: Callable[..., Any], *inputs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs)
    results = AttentionResults()

    def compute(*inputs: Any) -> Any:
        with attention.using(results):
            return forward(*inputs)

    return checkpoint(compute, *inputs, use_reentrant=False)


def _add_what_needs_the_branch(branches: Callable[..., tuple[Branch, ...]], *inputs: Any) -> tuple[Branch, ...]:
    """The block's branches, already added where the gate needs a gradient."""
    return tuple(
        (add_branch(tokens, gate, branch), None, None) if gate.requires_grad else (tokens, gate, branch)
        for tokens, gate, branch in branches(*inputs)
    )
