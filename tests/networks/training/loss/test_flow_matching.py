"""networks.training.loss.flow_matching: the pass of a process that has no batch, and the validation loss of several processes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from small_transformer import add_lora, make_transformer

from networks.training.loss import flow_matching as module
from networks.training.loss.flow_matching import FlowMatching
from networks.training.loss.timestep_sampling import TimestepSampler, TimestepSettings


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


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_processes_share_out_the_items_of_the_validation_loss(processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three items: the fourth process has none."""
    monkeypatch.setattr(FlowMatching, "loss_at", lambda self, item, noise, t: noise.mean() * t[0] + item["number"])
    items = [{"latents": torch.zeros(1, 16, 1, 4, 4), "number": number / 7} for number in range(3)]
    sampler = TimestepSampler(TimestepSettings(), torch.Generator())

    def measure(index: int, count: int, together: bool = False) -> float:
        accelerator = SimpleNamespace(process_index=index, num_processes=count, device=torch.device("cpu"))
        return FlowMatching(None, accelerator, sampler, None, torch.float32, 1.0).validation_loss(items, together)

    monkeypatch.setattr(module, "gather_object", lambda own: own)
    alone, shares = measure(0, 1), []
    assert measure(1, processes, together=True) == alone
    monkeypatch.setattr(module, "gather_object", lambda own: shares.append(own) or [1.0])
    for index in range(processes):
        measure(index, processes)
    assert sum(map(len, shares)) == 3 * 4 and max(map(len, shares)) == 4 * -(-3 // processes)
    monkeypatch.setattr(module, "gather_object", lambda own: [value for share in shares for value in share])
    assert {measure(index, processes) for index in range(processes)} == {alone}
