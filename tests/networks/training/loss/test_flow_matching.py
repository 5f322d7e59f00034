"""networks.training.loss.flow_matching: the pass of a process that has no batch."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from small_transformer import add_lora, make_transformer

from networks.training.loss.flow_matching import FlowMatching


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_an_empty_loss_passes_every_block_and_adds_nothing_to_the_gradients(precision: str) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    transformer, passed = make_transformer(), []
    network = add_lora(transformer)
    for block in (*transformer.double_blocks, *transformer.single_blocks):
        block.register_forward_hook(lambda block, *_: passed.append(block))
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    flow_matching = FlowMatching(transformer, accelerator, None, None, torch.float32, guidance_scale=1.0)
    loss = flow_matching.empty_loss()
    loss.backward()
    assert passed == [*transformer.double_blocks, *transformer.single_blocks]
    assert loss == 0 and all((parameter.grad == 0).all() for parameter in network.parameters())
