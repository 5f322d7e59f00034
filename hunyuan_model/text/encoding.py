"""Prompts to everything the transformer is told of them, with one text encoder in memory at a time."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hunyuan_model.text.clip import load_text_encoder_2, load_tokenizer_2
from hunyuan_model.text.llm import load_text_encoder_1, load_tokenizer_1
from utils.devices import free_memory


class TextConditions(NamedTuple):
    """One prompt, in the order in which ``sampling.sample_latents`` takes it; on the CPU, in the encoders' dtype."""

    states: Tensor  # (1, 256, D)
    mask: Tensor  # (1, 256)
    pooled: Tensor  # (1, P)


def encode_prompts(
    prompts: Sequence[str],
    *,
    text_encoder_1: str | os.PathLike[str],
    text_encoder_2: str | os.PathLike[str],
    tokenizer_1: str | os.PathLike[str] | None = None,
    tokenizer_2: str | os.PathLike[str] | None = None,
    device: torch.device,
    dtype: torch.dtype,
    fp8_llm: bool = False,
) -> list[TextConditions]:
    """Encode every prompt, each distinct text once. Both encoders are gone from ``device`` afterwards.

    Raises:
        UserError: as ``load_text_encoder_1`` and ``load_text_encoder_2``; tokenizers are found before weights are read.
    """
    tokenizers = load_tokenizer_1(text_encoder_1, tokenizer_1), load_tokenizer_2(text_encoder_2, tokenizer_2)
    texts = dict.fromkeys(prompts)
    clip = load_text_encoder_2(text_encoder_2, device=device, dtype=dtype, tokenizer=tokenizers[1])
    pooled = {text: clip.encode([text]).cpu() for text in texts}
    del clip
    free_memory(device)
    llama = load_text_encoder_1(text_encoder_1, device=device, dtype=dtype, fp8=fp8_llm, tokenizer=tokenizers[0])
    states = {text: [output.cpu() for output in llama.encode([text])] for text in texts}
    del llama
    free_memory(device)
    return [TextConditions(*states[text], pooled[text]) for text in prompts]
