"""Attention is computed once a step where its results are kept, for the same bits, and takes what is said for it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_transformer import CONFIG, CPU, DEPTH, MOST, add_lora, make_inputs, make_transformer, same, train_and_sample
from test_activation_offload import LateTransfers, Pool
from test_recomputation import NETWORKS, as_int8, backward_flops
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hunyuan_model.runtime.activation_offload import ActivationOffloader
from hunyuan_model.runtime.block_swap import SwapSettings, enable_block_swap
from hunyuan_model.runtime.gradient_checkpointing import enable_gradient_checkpointing
from hunyuan_model.transformer.attention import OPERATORS, make_attention

checkpointing = enable_gradient_checkpointing
keeping = functools.partial(enable_gradient_checkpointing, keep_attention=True)


def keeping_on_the_host(transformer: nn.Module) -> LateTransfers:
    pool = Pool()
    transfers = LateTransfers(pool)
    enable_gradient_checkpointing(transformer, ActivationOffloader(DEPTH, transfers, pool), keep_attention=True)
    return transfers


class Calls(TorchDispatchMode):
    """Counts attention operators, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.forward = self.backward = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.forward += func.name() in OPERATORS
        self.backward += func.name().removesuffix("_backward") in OPERATORS and func.name().endswith("_backward")
        return func(*args, **(kwargs or {}))


def attention_calls(enable: Callable[[nn.Module], Any], *, split: bool = False) -> tuple[int, int]:
    """Forward and backward, in a step with one sample or, with ``split``, two of other lengths."""
    transformer = make_transformer()
    for block in (*transformer.double_blocks, *transformer.single_blocks):
        block.attention = make_attention(split=split)
    enable(transformer)
    network = add_lora(transformer)
    with Calls() as calls:
        transformer(*make_inputs(lengths=(5, 2) if split else (5,))).square().mean().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    return calls.forward, calls.backward


@pytest.mark.parametrize("split", [False, True], ids=["", "split"])
@pytest.mark.parametrize(("enable", "times"), [(checkpointing, 2), (keeping, 1), (keeping_on_the_host, 1)])
def test_attention_is_computed_once_for_each_block(enable, times: int, split: bool) -> None:
    blocks = DEPTH * (1 + split)
    refiner = CONFIG.refiner_depth * (1 + split)  # is not checkpointed
    forward, backward = attention_calls(enable, split=split)
    assert backward == blocks
    assert forward - times * blocks in (0, refiner)


@pytest.mark.parametrize("enable", [keeping, keeping_on_the_host])
@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_the_last_products_are_left_out_as_well(enable, weights: str) -> None:
    def flops(enable: Callable[[nn.Module], Any]) -> int:
        transformer = make_transformer()
        transformer = as_int8(transformer) if weights == "int8" else transformer
        enable(transformer)
        return backward_flops(transformer, add_lora(transformer))

    assert flops(enable) == flops(checkpointing)  # torch's counter knows no attention on the CPU


KINDS = ("plain", "float8", "int8", "swapped")


@pytest.mark.parametrize("enable", [keeping, keeping_on_the_host])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        pytest.param(kind, name, marks=() if kind == "plain" or name == "LoRA" else pytest.mark.slow)
        for kind in KINDS
        for name in NETWORKS
    ],
)
def test_outputs_and_gradients_are_the_same_to_the_bit(enable, kind: str, name: str) -> None:
    def life(enable: Callable[[nn.Module], Any]) -> list[torch.Tensor]:
        transformer = make_transformer(kind == "float8")
        if kind == "int8":
            as_int8(transformer)
        if kind == "swapped":
            enable_block_swap(transformer, SwapSettings(MOST, recomputed=True), CPU)
        enable(transformer)
        network = add_lora(transformer, **NETWORKS[name])
        torch.manual_seed(3)
        return [tensor for tensor in train_and_sample(transformer, network) if tensor is not None]

    assert same(life(enable), life(checkpointing))


def under_autocast(transformer: nn.Module) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        out = transformer(*make_inputs())
    out.float().square().mean().backward()


def graph_used_twice(transformer: nn.Module) -> None:
    loss = transformer(*make_inputs()).square().mean()
    loss.backward(retain_graph=True)
    loss.backward()


@pytest.mark.parametrize("enable", [keeping, keeping_on_the_host])
@pytest.mark.parametrize("run", [under_autocast, graph_used_twice])
def test_gradients_are_the_same_to_the_bit(enable, run: Callable[[nn.Module], None]) -> None:
    def gradients(enable: Callable[[nn.Module], Any]) -> list[torch.Tensor]:
        transformer = make_transformer()
        enable(transformer)
        network = add_lora(transformer)
        run(transformer)
        return [parameter.grad for parameter in network.parameters()]

    assert same(gradients(enable), gradients(checkpointing))


def test_attention_made_of_products_is_computed_again() -> None:
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert attention_calls(keeping) == (0, 0)
