"""Write a tiny HunyuanVideo with random weights in the official file layouts, in seconds and the same every time.

It has every part of the real model and none of its knowledge: it shows that files load, stages fit together and a LoRA
trains, not what a trained model draws.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerBase,
)

from examples.toy.model_files import ModelFiles, files_in, write_text_encoder, write_vae
from examples.toy.recipe.make_tokenizers import CLIP_VOCABULARY, LLAMA_VOCABULARY, write_clip_tokenizer, write_llama_tokenizer
from hunyuan_model.transformer.config import TransformerConfig, rope_dims_for
from hunyuan_model.transformer.model import HYVideoDiffusionTransformer
from hunyuan_model.vae.model import AutoencoderKLCausal3D, VAEConfig
from tiny.make_media import PICTURES, draw
from utils.safetensors_io import save_tensors

SEED = 20
LLAMA_WIDTH = 64
CLIP_WIDTH = 48
HEAD_DIM = 32

TRANSFORMER = TransformerConfig(
    hidden_size=4 * HEAD_DIM,
    heads=4,
    head_dim=HEAD_DIM,
    double_depth=2,
    single_depth=4,
    mlp_size=16 * HEAD_DIM,
    text_dim=LLAMA_WIDTH,
    pooled_dim=CLIP_WIDTH,
    rope_dims=rope_dims_for(HEAD_DIM),
)
VAE = VAEConfig(block_out_channels=(16, 32, 32, 32), layers_per_block=1, norm_num_groups=8)
VAE_LOG_VARIANCE = -6.0


@torch.no_grad()
def randomise(module: nn.Module, generator: torch.Generator) -> None:
    """Random weights that keep the size of what passes through; norms pass through, biases are small."""
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            fan_in = 1 if "embedding" in name or "embed_tokens" in name else parameter[0].numel()
            parameter.normal_(0.0, fan_in**-0.5, generator=generator)
        elif "norm" in name and name.endswith("weight"):
            parameter.fill_(1.0)
        else:
            parameter.normal_(0.0, 0.05, generator=generator)


@torch.no_grad()
def tiny_transformer(generator: torch.Generator) -> HYVideoDiffusionTransformer:
    """A transformer whose last layer undoes its first one.

    Otherwise the noise, which is half of what a velocity is made of, would be scrambled by frozen random weights, and a
    LoRA on the blocks between them could hardly learn anything.
    """
    transformer = HYVideoDiffusionTransformer(TRANSFORMER)
    randomise(transformer, generator)
    patch = transformer.img_in.proj.weight  # (hidden, 16, 1, 2, 2)
    directions, _ = torch.linalg.qr(torch.randn(patch.shape[0], patch[0].numel(), generator=generator))  # (hidden, 64)
    patch.copy_(directions.view_as(patch))
    size_before_norm = (directions.shape[1] / directions.shape[0]) ** 0.5
    transformer.final_layer.linear.weight.copy_(directions.T * size_before_norm)
    return transformer


@torch.no_grad()
def tiny_vae(generator: torch.Generator) -> AutoencoderKLCausal3D:
    """A VAE whose latents of the drawn pictures have, times the scaling factor, mean 0 and deviation 1 per channel."""
    vae = AutoencoderKLCausal3D(VAE)
    randomise(vae, generator)
    pictures = [torch.from_numpy(draw(scene).copy()[:64, :64]) for scene in PICTURES]
    x = torch.stack(pictures).permute(0, 3, 1, 2)[:, :, None] / 127.5 - 1.0  # (B, 3, 1, 64, 64)
    mean = vae.encode(x).mean
    deviation = mean.std(dim=(0, 2, 3, 4)) * vae.scaling_factor
    centre = mean.mean(dim=(0, 2, 3, 4))
    channels = VAE.latent_channels
    convolution = vae.quant_conv
    convolution.bias[:channels] = (convolution.bias[:channels] - centre) / deviation
    convolution.weight[:channels] /= deviation[:, None, None, None, None]
    convolution.weight[channels:] = 0.0
    convolution.bias[channels:] = VAE_LOG_VARIANCE
    return vae


def tiny_llama(tokenizer: PreTrainedTokenizerBase, generator: torch.Generator) -> LlamaModel:
    """A Llama text model for the tiny tokenizer."""
    config = LlamaConfig(
        vocab_size=LLAMA_VOCABULARY,
        hidden_size=LLAMA_WIDTH,
        intermediate_size=3 * LLAMA_WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaModel(config)
    randomise(model, generator)
    return model


def tiny_clip(tokenizer: PreTrainedTokenizerBase, generator: torch.Generator) -> CLIPTextModel:
    """A CLIP text model for the tiny tokenizer."""
    config = CLIPTextConfig(
        vocab_size=CLIP_VOCABULARY,
        hidden_size=CLIP_WIDTH,
        intermediate_size=2 * CLIP_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = CLIPTextModel(config)
    randomise(model, generator)
    return model


def make_model(folder: str | Path) -> ModelFiles:
    """Write ``dit.safetensors``, ``vae/``, ``text_encoder/`` and ``text_encoder_2/`` under ``folder``."""
    paths = files_in(Path(folder))
    generator = torch.Generator().manual_seed(SEED)
    save_tensors(paths.dit, tiny_transformer(generator).state_dict())
    write_vae(tiny_vae(generator), paths.vae)
    llama_tokenizer = AutoTokenizer.from_pretrained(write_llama_tokenizer(paths.text_encoder1))
    write_text_encoder(tiny_llama(llama_tokenizer, generator), paths.text_encoder1, prefix="")
    clip_tokenizer = AutoTokenizer.from_pretrained(write_clip_tokenizer(paths.text_encoder2))
    write_text_encoder(tiny_clip(clip_tokenizer, generator), paths.text_encoder2, prefix="text_model.")
    return paths
