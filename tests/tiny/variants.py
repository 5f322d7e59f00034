"""Beside the tiny model: every part of it with other weights, other tokenizers, and a LoRA."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import hunyuan_model
from examples.toy.model_files import ModelFiles
from examples.toy.recipe.make_tokenizers import write_clip_tokenizer, write_llama_tokenizer
from networks.lora import create_network
from utils.safetensors_io import read_header


def write_other_models(model: ModelFiles, data: Path) -> None:
    """Every part of the model with other weights, as ``other.safetensors`` and ``other_vae`` ..., and other tokenizers."""
    write_altered(model.dit, data / "other.safetensors")
    for folder in (model.vae, model.text_encoder1, model.text_encoder2):
        (weights,) = folder.glob("*.safetensors")
        shutil.copytree(folder, data / f"other_{folder.name}", ignore=shutil.ignore_patterns(weights.name))
        write_altered(weights, data / f"other_{folder.name}" / weights.name)
    write_llama_tokenizer(data / "tokenizer1", ["Nothing is as before."], vocabulary=300)
    write_clip_tokenizer(data / "tokenizer2", ["Nothing is as before."])


def write_altered(source: Path, target: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = {name: value * (1 + 0.2 * torch.randn(value.shape, generator=generator)) for name, value in load_file(source).items()}
    save_file(tensors, target, read_header(source).metadata or None)


def write_lora(dit: Path, path: Path, seed: int = 0, **network_args: str) -> None:
    """A LoRA of rank 3 and alpha 3 that changes much."""
    transformer = hunyuan_model.load_transformer(dit, device="cpu", dtype=torch.float32)
    torch.manual_seed(seed)
    tensors = create_network(1.0, 3, 3.0, None, None, transformer, **network_args).state_dict()
    save_file({name: torch.randn_like(value) * 0.1 if "lora_up" in name else value for name, value in tensors.items()}, path)


def write_lora_of_every_kind(dit: Path, path: Path) -> None:
    """A file whose strong updates are LoRA, LoHa, LoKr, DoRA, differences, also of biases, and replaced weights, in turns."""
    torch.manual_seed(0)
    tensors, kinds = {}, itertools.cycle(("lora", "loha", "lokr", "dora", "diff", "set_weight"))
    for name, weight in load_file(dit).items():
        if "_blocks." not in name or not name.endswith("weight") or weight.dim() != 2:
            continue
        module, weight = f"diffusion_model.{name.removesuffix('.weight')}", weight.float()
        (out, inputs), size = weight.shape, 0.3 * weight.std().item()
        lora = {"lora_A.weight": torch.randn(2, inputs), "lora_B.weight": torch.randn(out, 2) * size}
        match next(kinds):
            case "lora":
                keys = lora
            case "loha":
                shapes = {"hada_w1_a": (out, 2), "hada_w1_b": (2, inputs), "hada_w2_a": (out, 2), "hada_w2_b": (2, inputs)}
                keys = {key: torch.randn(shape) * size**0.25 for key, shape in shapes.items()} | {"alpha": torch.tensor(2.0)}
            case "lokr":
                keys = {"lokr_w1": torch.randn(2, 2), "lokr_w2": torch.randn(out // 2, inputs // 2) * size}
            case "dora":
                keys = {**lora, "dora_scale": torch.linalg.vector_norm(weight, dim=1, keepdim=True) * 1.2}
            case "diff":
                keys = {"diff": torch.randn(out, inputs) * size, "diff_b": torch.randn(out) * size}
            case "set_weight":
                keys = {"set_weight": weight * 1.2}
        tensors |= {f"{module}.{key}": value for key, value in keys.items()}
    save_file(tensors, path)
