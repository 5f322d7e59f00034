"""Headers of models in every layout with seeded damage to keys, shapes and dtypes: a sentence, or a model that is whole."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel

from benchmarks.diffusers_twins import to_diffusers
from hunyuan_model import check_text_encoder_files, check_transformer_file, check_vae_file
from hunyuan_model.checkpoints.layouts import COMFYUI, NameLayout
from hunyuan_model.checkpoints.layouts_text import gguf_llama
from hunyuan_model.checkpoints.layouts_vae import LATENT_DIFFUSION
from hunyuan_model.quantization.formats import FP8_DTYPE, is_quantized_name
from utils.errors import UserError

GOLDENS = Path(__file__).resolve().parents[1] / "goldens"
LLM, CLIP = GOLDENS / "text_llm", GOLDENS / "text_clip"
FILES_OF_EACH = 30
Tensors = dict[str, Tensor]


def renamed(tensors: Tensors, layout: NameLayout) -> Tensors:
    return {f"{layout.modules(name.rpartition('.')[0])[0]}.{name.rpartition('.')[2]}": value for name, value in tensors.items()}


def below(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def scaled(tensors: Tensors) -> Tensors:
    stored = {name: tensor.to(FP8_DTYPE) if is_quantized_name(name) else tensor for name, tensor in tensors.items()}
    scales = {name.replace(".weight", ".scale_weight"): torch.ones(1) for name in tensors if is_quantized_name(name)}
    return stored | scales | {"scaled_fp8": torch.ones(2)}


def transformer() -> Tensors:
    return load_file(GOLDENS / "dit.safetensors")


def vae() -> Tensors:
    return load_file(GOLDENS / "vae.safetensors")


@cache
def llama() -> Tensors:
    """Of Llama-3's size of heads: no config.json stands beside the files."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaModel(LlamaConfig(**sizes, head_dim=128, vocab_size=32)).state_dict()


@cache
def clip() -> Tensors:
    sizes = {"hidden_size": 64, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 1}
    tensors = CLIPTextModel(CLIPTextConfig(**sizes, vocab_size=32)).state_dict()
    return {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}


LAYOUTS: dict[str, tuple[Callable[[], Tensors], Callable[[Path], object]]] = {
    "transformer": (transformer, check_transformer_file),
    "transformer of ComfyUI": (lambda: below("model.model.", renamed(transformer(), COMFYUI)), check_transformer_file),
    "transformer of diffusers": (lambda: to_diffusers(transformer(), 48), check_transformer_file),
    "transformer in scaled float8": (lambda: scaled(transformer()), check_transformer_file),
    "full checkpoint": (
        lambda: below("model.diffusion_model.", transformer()) | below("vae.", renamed(vae(), LATENT_DIFFUSION)),
        lambda path: (check_transformer_file(path), check_vae_file(path)),
    ),
    "VAE": (vae, check_vae_file),
    "VAE of ComfyUI": (lambda: renamed(vae(), LATENT_DIFFUSION), check_vae_file),
    "Llama": (lambda: below("model.", llama()), lambda path: check_text_encoder_files(path, CLIP)),
    "LLaVA": (lambda: below("language_model.model.", llama()), lambda path: check_text_encoder_files(path, CLIP)),
    "Llama of GGUF": (lambda: renamed(llama(), gguf_llama(128)), lambda path: check_text_encoder_files(path, CLIP)),
    "CLIP": (lambda: below("text_model.", clip()), lambda path: check_text_encoder_files(LLM, path)),
    "CLIP without prefix": (clip, lambda path: check_text_encoder_files(LLM, path)),
}
WORDS = (
    "weight",
    "scale",
    "bias",
    "blocks",
    "layers",
    "norm",
    "img_attn_qkv",
    "attn.to_q",
    "0",
    "7",
    "99999999",
    "",
    "x",
    "lora_down",
)
DTYPES = (torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.float64, torch.float16)
SHAPES = ((), (0,), (1,), (3,), (2, 2), (0, 4), (5, 1, 2), (2, 16, 1, 2, 2), (4, 33, 1, 2, 2))


def damage(tensors: Tensors, chance: random.Random) -> None:
    """One thing that is wrong in a file: keys that are dropped, doubled or renamed, tensors of another shape or dtype."""
    kind = chance.choice(("drop", "drop many", "double", "rename", "swap", "shape", "dtype", "all dtypes", "foreign"))
    name, other = chance.choice(list(tensors)), chance.choice(list(tensors))
    parts = name.split(".")
    if kind == "drop":
        del tensors[name]
    elif kind == "drop many":
        for gone in chance.sample(list(tensors), chance.randint(1, len(tensors))):
            del tensors[gone]
    elif kind == "double":
        tensors[chance.choice(("x.", "model.", "model.diffusion_model.", "vae.")) + name] = tensors[name].clone()
    elif kind == "rename":
        parts[chance.randrange(len(parts))] = chance.choice(WORDS)
        tensors[".".join(parts)] = tensors.pop(name)
    elif kind == "swap":
        tensors[name], tensors[other] = tensors[other], tensors[name]
    elif kind == "shape":
        tensors[name] = torch.zeros(chance.choice((*SHAPES, tensors[name].shape[::-1], (2, *tensors[name].shape))))
    elif kind == "dtype":
        tensors[name] = tensors[name].to(chance.choice(DTYPES))
    elif kind == "all dtypes":
        dtype = chance.choice(DTYPES)
        tensors |= {name: tensor.to(dtype) for name, tensor in tensors.items()}
    else:
        tensors[chance.choice(("x", "double_blocks.0.x.weight", "scaled_fp8", "y.scale_weight", "z.comfy_quant"))] = torch.ones(2)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_damaged_headers(tmp_path, layout):
    make, check = LAYOUTS[layout]
    whole, refused = make(), 0
    for seed in range(FILES_OF_EACH):
        chance, tensors = random.Random(f"{layout} {seed}"), dict(whole)
        for _ in range(chance.randint(1, 3)):
            if tensors:
                damage(tensors, chance)
        path = tmp_path / f"{seed}.safetensors"
        save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)
        try:
            check(path)
        except UserError as error:
            refused += 1
            assert len(str(error).splitlines()) == 1 and str(error).endswith("."), (seed, str(error))
            assert str(path) in str(error), (seed, str(error))
        path.unlink()
    assert refused > FILES_OF_EACH / 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_without_damage(tmp_path, layout):
    make, check = LAYOUTS[layout]
    save_file({name: tensor.contiguous().clone() for name, tensor in make().items()}, tmp_path / "m.safetensors")
    check(tmp_path / "m.safetensors")
