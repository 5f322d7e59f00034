"""What a recomputation leaves out: the last matmul of a block where nothing asks for it, kept attention, and never a gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from allocations import saved_bytes
from small_transformer import CPU, DEPTH, MOST, add_lora, blocks_of, make_inputs, make_transformer, same, train_and_sample
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from variations import slow_but

from hunyuan_model.quantization.formats import is_quantized_name, quantize_groups
from hunyuan_model.quantization.linear import enable_quantized_linears
from hunyuan_model.runtime.gradient_checkpointing import enable_gradient_checkpointing
from hunyuan_model.runtime.kept_attention import KeptAttention
from hunyuan_model.runtime.offload.activation_offload import make_offloader
from hunyuan_model.runtime.offload.block_swap import SwapSettings, enable_block_swap
from hunyuan_model.transformer.attention import OPERATORS, make_attention

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


@pytest.mark.parametrize("weights", slow_but(["float32", "float8", "int8"], "int8"))
@pytest.mark.parametrize("offload", [False, True], ids=["", "offloaded"])
@pytest.mark.parametrize("keep", [False, True], ids=["", "kept"])  # the counter knows no attention on the CPU
def test_the_last_products_are_computed_once(wholly, weights: str, offload: bool, keep: bool) -> None:
    def made() -> nn.Module:
        transformer = make_transformer(weights == "float8")
        return as_int8(transformer) if weights == "int8" else transformer

    whole, less = made(), made()
    wholly(whole)
    enable_gradient_checkpointing(less, make_offloader(DEPTH, CPU, pinned=False) if offload else None, keep_attention=keep)
    wanted = backward_flops(whole, add_lora(whole)) - flops_of_last_products(whole)
    assert backward_flops(less, add_lora(less)) == wanted


def keep_attention(transformer: nn.Module) -> None:
    enable_gradient_checkpointing(transformer, keep_attention=True)


def keep_attention_on_the_host(transformer: nn.Module) -> None:
    enable_gradient_checkpointing(transformer, make_offloader(DEPTH, CPU, pinned=False), keep_attention=True)


class AttentionCalls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.forward = self.backward = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.forward += func.name() in OPERATORS
        self.backward += func.name().endswith("_backward") and func.name().removesuffix("_backward") in OPERATORS
        return func(*args, **(kwargs or {}))


def attention_calls(enable: Callable[[nn.Module], None], *, split: bool = False) -> tuple[int, int]:
    """Forward and backward, in the backward pass of one sample or, with ``split``, of two."""
    transformer = make_transformer()
    for block in blocks_of(transformer):
        block.attention = make_attention(split=split)
    enable(transformer)
    network = add_lora(transformer)
    loss = transformer(*make_inputs(lengths=(5, 2) if split else (5,))).square().mean()
    with AttentionCalls() as calls:
        loss.backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    return calls.forward, calls.backward


@pytest.mark.parametrize("split", [False, True], ids=["", "split"])
@pytest.mark.parametrize(
    ("enable", "times"), [(enable_gradient_checkpointing, 1), (keep_attention, 0), (keep_attention_on_the_host, 0)]
)
def test_kept_attention_is_not_computed_again(enable, times: int, split: bool) -> None:
    blocks = DEPTH * (2 if split else 1)
    assert attention_calls(enable, split=split) == (times * blocks, blocks)


def test_attention_that_torch_puts_together_is_computed_again_which_is_said_once(monkeypatch, caplog) -> None:
    monkeypatch.setattr(KeptAttention, "_warned", False)
    assert attention_calls(keep_attention)[0] == 0 and not caplog.text
    with sdpa_kernel(SDPBackend.MATH):
        assert attention_calls(keep_attention) == (0, 0)
    assert caplog.text.count("attention is computed twice") == 1


@pytest.mark.gpu
@pytest.mark.parametrize("offload", [False, True], ids=["", "offloaded"])
@pytest.mark.parametrize(
    "backend", [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION], ids=str
)
def test_kept_attention_on_a_gpu(backend: SDPBackend, offload: bool) -> None:
    if backend == SDPBackend.CUDNN_ATTENTION and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("cuDNN has no attention for this GPU")
    device = torch.device("cuda")

    def run(keep: bool) -> tuple[tuple[int, int], list[torch.Tensor]]:
        transformer = make_transformer().to(device, torch.bfloat16)
        offloader = make_offloader(DEPTH, device, pinned=True) if offload else None
        enable_gradient_checkpointing(transformer, offloader, keep_attention=keep)
        network = add_lora(transformer).to(device)
        with sdpa_kernel(backend):
            with torch.autocast("cuda", torch.bfloat16):
                loss = transformer(*make_inputs(size=(4, 32, 32), device=device)).float().square().mean()
            with AttentionCalls() as calls:
                loss.backward()
        return (calls.forward, calls.backward), [parameter.grad for parameter in network.parameters()]

    (again, expected), (kept, found) = run(False), run(True)
    assert again == (again[1], again[1]) and kept == (0, again[1])
    for one, other in zip(found, expected):  # backward passes of attention add up in any order
        assert (one - other).norm() <= 0.02 * other.norm()


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
        pytest.param(kind, network_args, id=f"{kind}-{name}", marks=() if name == "LoRA" and kind == "plain" else pytest.mark.slow)
        for kind in ("plain", "float8", "int8", "swapped")
        for name, network_args in NETWORKS.items()
    ],
)
@pytest.mark.parametrize("checkpointed", [enable_gradient_checkpointing, keep_attention, keep_attention_on_the_host])
def test_outputs_and_gradients_are_the_same_to_the_bit(wholly, checkpointed, kind: str, network_args: dict[str, str]) -> None:
    def life(enable: Callable[[nn.Module], None]) -> list[torch.Tensor]:
        transformer = make_transformer(kind == "float8")
        if kind == "int8":
            as_int8(transformer)
        if kind == "swapped":
            enable_block_swap(transformer, SwapSettings(MOST, recomputed=True), CPU)
        enable(transformer)
        network = add_lora(transformer, **network_args)
        torch.manual_seed(3)
        return [tensor for tensor in train_and_sample(transformer, network) if tensor is not None]  # of modules that are left out

    assert same(life(checkpointed), life(wholly))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("checkpointed", [enable_gradient_checkpointing, keep_attention, keep_attention_on_the_host])
def test_under_autocast(wholly, checkpointed, dtype: torch.dtype) -> None:
    def gradients(enable: Callable[[nn.Module], None]) -> list[torch.Tensor]:
        transformer = make_transformer().to(dtype)
        enable(transformer)
        network = add_lora(transformer)
        with torch.autocast("cpu", torch.bfloat16):
            transformer(*make_inputs()).float().square().mean().backward()
        return [parameter.grad for parameter in network.parameters()]

    assert same(gradients(checkpointed), gradients(wholly))


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


@pytest.mark.parametrize("checkpointed", [enable_gradient_checkpointing, keep_attention])
def test_a_graph_that_is_kept_is_recomputed_each_time(checkpointed) -> None:
    transformer = make_transformer()
    checkpointed(transformer)
    network = add_lora(transformer)
    loss = transformer(*make_inputs()).square().mean()
    loss.backward(retain_graph=True)
    once = [parameter.grad.clone() for parameter in network.parameters()]
    loss.backward()
    assert same([parameter.grad for parameter in network.parameters()], [2 * gradient for gradient in once])
