"""A transformer small enough to train in a test, a LoRA on it, and everything that happens to them in training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from hunyuan_model.quantization.formats import FP8_DTYPE, cast, is_quantized_name
from hunyuan_model.quantization.linear import enable_quantized_linears
from hunyuan_model.runtime.offload.block_swap import SLOTS
from hunyuan_model.transformer.config import TransformerConfig, rope_dims_for
from hunyuan_model.transformer.model import HYVideoDiffusionTransformer
from networks.lora import create_network

GOLDENS = Path(__file__).resolve().parent / "goldens"
CPU = torch.device("cpu")
CONFIG = TransformerConfig(
    hidden_size=64,
    heads=2,
    head_dim=32,
    double_depth=3,
    single_depth=4,
    refiner_depth=1,
    mlp_size=128,
    text_dim=16,
    pooled_dim=8,
    frequency_dim=32,
    rope_dims=rope_dims_for(32),
)
DEPTH = CONFIG.double_depth + CONFIG.single_depth
MOST = DEPTH - SLOTS  # blocks that can be swapped


def make_transformer(fp8: bool = False, config: TransformerConfig = CONFIG) -> nn.Module:
    torch.manual_seed(0)
    transformer = HYVideoDiffusionTransformer(config).requires_grad_(False).eval()
    if fp8:
        for name, parameter in transformer.named_parameters():
            if is_quantized_name(name):
                parameter.data = cast(parameter.data, FP8_DTYPE)
        assert enable_quantized_linears(transformer, torch.float32)
    return transformer


def blocks_of(transformer: nn.Module) -> list[nn.Module]:
    return [*transformer.double_blocks, *transformer.single_blocks]


def move_around_blocks(transformer: nn.Module, device: torch.device, but: tuple[int, ...]) -> None:
    """Everything to ``device``, except the blocks of these numbers."""
    for name, child in transformer.named_children():
        if name not in ("double_blocks", "single_blocks"):
            child.to(device)
    for index, block in enumerate(blocks_of(transformer)):
        if index not in but:
            block.to(device)


def add_lora(transformer: nn.Module, **network_args: str) -> nn.Module:
    torch.manual_seed(1)
    network = create_network(1.0, 2, 2.0, None, None, transformer, **network_args)
    for lora in network.loras():
        nn.init.normal_(lora.lora_up.weight, std=0.1)
    network.apply_to(None, transformer)
    return network.requires_grad_(True).train()


def make_inputs(
    seed: int = 0,
    lengths: tuple[int, ...] = (5, 2),
    size: tuple[int, int, int] = (1, 4, 6),
    config: TransformerConfig = CONFIG,
    device: torch.device = CPU,
) -> tuple[torch.Tensor, ...]:
    """Those of the transformer's forward; captions have ``lengths``, latents ``size``."""
    generator = torch.Generator().manual_seed(seed)
    batch = len(lengths)
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    return (
        torch.randn(batch, 16, *size, generator=generator).to(device),
        (torch.rand(batch, generator=generator) * 1000).to(device),
        torch.randn(batch, 6, config.text_dim, generator=generator).to(device),
        mask,
        torch.randn(batch, config.pooled_dim, generator=generator).to(device),
        torch.full((batch,), 6000.0, device=device),
    )


class Interrupted(Exception):
    pass


def train_and_sample(transformer: nn.Module, network: nn.Module) -> list[torch.Tensor]:
    """Steps, samples and interruptions in one run; returns all outputs and gradients."""
    found: list[torch.Tensor] = []

    def keep_gradients() -> None:
        found.extend(parameter.grad for parameter in network.parameters())
        network.zero_grad(set_to_none=True)

    def forward(seed: int, **options: tuple[int, ...]) -> torch.Tensor:
        found.append(transformer(*make_inputs(seed, **options)))
        return found[-1].square().mean()

    forward(0).backward()  # two batches of one step, with other lengths and sizes
    forward(1, lengths=(6, 6, 0), size=(2, 2, 4)).backward()
    keep_gradients()
    with torch.no_grad():  # samples
        for seed in range(3):
            forward(seed)
    (forward(2) + forward(3)).backward()  # two forward passes, one backward pass
    keep_gradients()

    def interrupt(*_: object) -> None:
        raise Interrupted

    for block in (transformer.single_blocks[1], transformer.double_blocks[1]):
        handle = next(layer for layer in block.modules() if isinstance(layer, nn.Linear)).register_forward_pre_hook(interrupt)
        with pytest.raises(Interrupted):
            forward(4)
        handle.remove()
        forward(5).backward()
        keep_gradients()
    forward(6)  # a graph that is dropped
    with torch.no_grad():
        forward(7)
    forward(8).backward()
    keep_gradients()
    return found


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8) if tensor.dtype == FP8_DTYPE else tensor  # torch does not compare float8


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    """Equal to the bit."""
    pairs = zip(first, second, strict=True)
    return all(one.dtype == other.dtype and torch.equal(bits(one), bits(other)) for one, other in pairs)
