"""What a recomputation leaves out: the last matmul of each block where nothing asks for its result, and never a gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from allocations import saved_bytes
from small_transformer import CPU, DEPTH, add_lora, blocks_of, make_inputs, make_transformer, same, train_and_sample
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hunyuan_model.quantization.formats import is_quantized_name, quantize_groups
from hunyuan_model.quantization.linear import enable_quantized_linears
from hunyuan_model.runtime.activation_offload import make_offloader
from hunyuan_model.runtime.block_swap import SwapSettings, enable_block_swap
from hunyuan_model.runtime.gradient_checkpointing import enable_gradient_checkpointing

LAST = ("img_mlp.fc2", "linear2")


def last_layers(transformer: nn.Module) -> list[nn.Linear]:
    return [layer for name, layer in transformer.named_modules() if name.endswith(LAST)]


def backward_flops(transformer: nn.Module, network: nn.Module) -> int:
    loss = transformer(*make_inputs()).square().mean()
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    network.zero_grad(set_to_none=True)
    return counter.get_total_flops()


def flops_of_last_products(transformer: nn.Module) -> int:
    """Of one forward pass."""
    rows: list[int] = []
    hooks = [
        layer.register_forward_hook(lambda layer, given, out: rows.append(out.numel() // out.shape[-1] * layer.weight.numel()))
        for layer in last_layers(transformer)
    ]
    with torch.no_grad():
        transformer(*make_inputs())
    for hook in hooks:
        hook.remove()
    return 2 * sum(rows)


@pytest.fixture
def wholly() -> Callable[[nn.Module], None]:
    """Checkpoints a transformer with nothing left out."""

    def enable(transformer: nn.Module) -> None:
        for block in blocks_of(transformer):
            block.forward = functools.partial(torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False)

    return enable


def as_int8(transformer: nn.Module) -> nn.Module:
    """The weights as int8 with scales."""
    for name, layer in list(transformer.named_modules()):
        if isinstance(layer, nn.Linear) and is_quantized_name(f"{name}.weight"):
            layer.weight.data, scale = quantize_groups(layer.weight.data)
            layer.weight_scale = nn.Parameter(scale, requires_grad=False)
    enable_quantized_linears(transformer, torch.float32)
    return transformer


@pytest.mark.parametrize("weights", ["float32", "float8", "int8"])
@pytest.mark.parametrize("offload", [False, True], ids=["", "offloaded"])
def test_the_last_products_are_computed_once(wholly, weights: str, offload: bool) -> None:
    def made() -> nn.Module:
        transformer = make_transformer(weights == "float8")
        return as_int8(transformer) if weights == "int8" else transformer

    whole, less = made(), made()
    wholly(whole)
    enable_gradient_checkpointing(less, make_offloader(4, torch.device("cpu"), pinned=False) if offload else None)
    wanted = backward_flops(whole, add_lora(whole)) - flops_of_last_products(whole)
    assert backward_flops(less, add_lora(less)) == wanted


NETWORKS = {
    "LoRA": {},
    "dropouts": {"rank_dropout": "0.5", "dropout": "0.3", "module_dropout": "0.4"},
    "modulation learns": {"include_patterns": "['.*(mod|modulation).*']"},
    "few layers learn": {"exclude_patterns": "['.*']", "include_patterns": "['.*(img_attn_qkv|txt_mlp.fc2|linear1)']"},
    "last layers learn": {"exclude_patterns": "['.*']", "include_patterns": "['.*(mlp.fc2|linear2)']"},
}


@pytest.mark.parametrize(
    ("kind", "network_args"),
    [
        pytest.param(kind, network_args, id=f"{kind}-{name}", marks=() if name == "LoRA" else pytest.mark.slow)
        for kind in ("plain", "float8", "swapped")
        for name, network_args in NETWORKS.items()
    ],
)
def test_outputs_and_gradients_are_the_same_to_the_bit(wholly, kind: str, network_args: dict[str, str]) -> None:
    def life(enable: Callable[[nn.Module], None]) -> list[torch.Tensor]:
        transformer = make_transformer(kind == "float8")
        if kind == "swapped":
            enable_block_swap(transformer, SwapSettings(2, recomputed=True), torch.device("cpu"))
        enable(transformer)
        network = add_lora(transformer, **network_args)
        torch.manual_seed(3)
        return [tensor for tensor in train_and_sample(transformer, network) if tensor is not None]  # of modules that are left out

    assert same(life(enable_gradient_checkpointing), life(wholly))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_under_autocast(wholly, dtype: torch.dtype) -> None:
    def gradients(enable: Callable[[nn.Module], None]) -> list[torch.Tensor]:
        transformer = make_transformer().to(dtype)
        enable(transformer)
        network = add_lora(transformer)
        with torch.autocast("cpu", torch.bfloat16):
            transformer(*make_inputs()).float().square().mean().backward()
        return [parameter.grad for parameter in network.parameters()]

    assert same(gradients(enable_gradient_checkpointing), gradients(wholly))


@pytest.mark.parametrize("offload", [False, True], ids=["", "offloaded"])
def test_trained_modulation_keeps_no_branch_for_its_gate(offload: bool) -> None:
    def kept(**network_args: str) -> int:
        transformer = make_transformer()
        enable_gradient_checkpointing(transformer, make_offloader(DEPTH, CPU, pinned=False) if offload else None)
        add_lora(transformer, **network_args)
        return saved_bytes(lambda: transformer(*make_inputs(size=(2, 16, 16))), except_for=())

    assert kept(**NETWORKS["modulation learns"]) <= kept()


@pytest.mark.parametrize("trained", ["modulation", "last layers", "embedder"])
def test_layers_that_learn_themselves_get_their_gradients(wholly, trained: str) -> None:
    parts = {"modulation": ("_mod.linear", "modulation.linear"), "last layers": LAST, "embedder": ("vector_in.in_layer",)}[trained]

    def gradients(enable: Callable[[nn.Module], None]) -> list[torch.Tensor]:
        transformer = make_transformer()
        enable(transformer)
        learning = [layer.requires_grad_() for name, layer in transformer.named_modules() if name.endswith(parts)]
        assert learning
        transformer(*make_inputs()).square().mean().backward()
        return [parameter.grad for layer in learning for parameter in layer.parameters()]

    assert same(gradients(enable_gradient_checkpointing), gradients(wholly))


def test_a_graph_that_is_kept_is_recomputed_each_time() -> None:
    transformer = make_transformer()
    enable_gradient_checkpointing(transformer)
    network = add_lora(transformer)
    loss = transformer(*make_inputs()).square().mean()
    loss.backward(retain_graph=True)
    once = [parameter.grad.clone() for parameter in network.parameters()]
    loss.backward()
    assert same([parameter.grad for parameter in network.parameters()], [2 * gradient for gradient in once])
