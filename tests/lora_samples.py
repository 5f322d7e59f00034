"""A transformer with the proportions that diffusers has, LoRA files on it, and what they make of its weights."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from networks.formats.reading import LoraFile
from networks.merging import LoraToMerge, MergePatch
from tests.small_transformer import CONFIG as SMALL_CONFIG
from tests.small_transformer import make_inputs, make_transformer

CONFIG = dataclasses.replace(SMALL_CONFIG, mlp_size=256, frequency_dim=256, double_depth=2, single_depth=2)
ARGUMENTS = ("x", "t", "text_states", "text_mask", "text_states_2", "guidance")


def transformer() -> nn.Module:
    return make_transformer(config=CONFIG)


def named_inputs() -> dict[str, Tensor]:
    """As ``benchmarks.diffusers_twins.run_diffusers`` takes them."""
    inputs = dict(zip(ARGUMENTS, make_inputs(config=CONFIG)))
    return inputs | {"text_mask": inputs["text_mask"].long()}


def sd_scripts_lora(model: nn.Module, wanted=lambda path: True, ranks: tuple[int, ...] = (4,), seed: int = 0) -> dict[str, Tensor]:
    """A LoRA on linear layers, in the layout of sd-scripts; ranks, scales and their signs change from layer to layer."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for path, module in model.named_modules():
        if not isinstance(module, nn.Linear) or not wanted(path):
            continue
        number = len(tensors) // 3
        rank, flat = ranks[number % len(ranks)], f"lora_unet_{path.replace('.', '_')}"
        tensors[f"{flat}.lora_down.weight"] = torch.randn(rank, module.in_features, generator=generator) * 0.2
        tensors[f"{flat}.lora_up.weight"] = torch.randn(module.out_features, rank, generator=generator) * 0.2
        tensors[f"{flat}.alpha"] = torch.tensor((1.0, rank / 2, -1.5)[number % 3])
    return tensors


def merged(lora: LoraFile, weights: dict[str, Tensor], multiplier: float = 1.0) -> dict[str, Tensor]:
    """All weights, those that ``lora`` changes with it."""
    patch = MergePatch([LoraToMerge(lora, multiplier)], {name: tuple(weight.shape) for name, weight in weights.items()})
    return {name: patch(name, weight) for name, weight in weights.items()}


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference of two tensors of a name, relative to the norm of the second."""
    assert found.keys() == expected.keys()
    differences = ((found[name] - tensor).norm() / tensor.norm().clamp(min=1e-12) for name, tensor in expected.items())
    return max(difference.item() for difference in differences)


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Give everything that is trained values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
