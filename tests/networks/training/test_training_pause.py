"""networks.training.pause: what is drawn or switched inside is as it was afterwards, also after an error."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from networks.training.pause import evaluation_weights, kept_random_state, paused_training

CPU = torch.device("cpu")


def draws() -> list[float]:
    return [random.random(), float(np.random.rand()), torch.rand(()).item()]


def test_generators_go_on_as_if_nothing_had_been_drawn():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = [draws(), draws()]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    first = draws()
    with pytest.raises(RuntimeError, match="inside"), kept_random_state(CPU):
        draws()
        torch.manual_seed(9)
        raise RuntimeError("inside")
    assert [first, draws()] == expected


@pytest.mark.gpu
def test_generators_of_the_device_go_on():
    device = torch.device("cuda", torch.cuda.current_device())
    torch.cuda.manual_seed(1)
    expected = [torch.rand(1, device=device).item() for _ in range(2)]
    torch.cuda.manual_seed(1)
    first = torch.rand(1, device=device).item()
    with kept_random_state(device):
        torch.rand(5, device=device)
    assert [first, torch.rand(1, device=device).item()] == expected


def test_every_module_gets_its_own_mode_back():
    transformer = nn.Sequential(nn.Dropout(), nn.Linear(2, 2)).train()
    transformer[0].eval()
    network = nn.Sequential(nn.Dropout(), nn.Dropout()).eval()
    network[1].train()
    modules = [*transformer.modules(), *network.modules()]
    modes = [module.training for module in modules]
    optimizer = torch.optim.SGD(transformer.parameters(), lr=0.1)
    with pytest.raises(RuntimeError), paused_training(transformer, network, optimizer, CPU):
        assert not any(module.training for module in modules)
        raise RuntimeError
    assert [module.training for module in modules] == modes
    assert len(set(modes)) == 2


class Rounding(torch.optim.SGD):
    """In evaluation mode the weights are a third of those of training; on the way back they round."""

    def eval(self) -> None:
        self.scale(1 / 3)

    def train(self) -> None:
        self.scale(3.0)

    @torch.no_grad()
    def scale(self, factor: float) -> None:
        self.param_groups[0]["params"][0].mul_(factor)


@pytest.mark.parametrize("wrapped", [False, True])
def test_weights_come_back_bit_by_bit(wrapped):
    weights = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    parameter = nn.Parameter(weights.clone())
    optimizer = Rounding([parameter], lr=0.1)
    optimizer.eval(), optimizer.train()
    assert not torch.equal(parameter, weights), "this test would not notice"
    with torch.no_grad():
        parameter.copy_(weights)
    outer = optimizer
    if wrapped:
        AcceleratorState._reset_state(reset_partial_state=True)
        outer = Accelerator(cpu=True).prepare(optimizer)
    with evaluation_weights(outer):
        torch.testing.assert_close(parameter.detach(), weights / 3)
    assert torch.equal(parameter, weights) and parameter.requires_grad
