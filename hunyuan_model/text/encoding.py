"""Prompts to the conditions that the transformer reads, with one text encoder in memory at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hunyuan_model.text.clip import load_text_encoder_2, load_tokenizer_2
from hunyuan_model.text.llm import load_text_encoder_1, load_tokenizer_1
from hunyuan_model.text.settings import TextEncoderSettings
from utils.devices import free_memory


class TextConditions(NamedTuple):
    """One prompt, in the order in which ``sampling.sample_latents`` takes it; on the CPU, in the encoders' dtype."""

    states: Tensor  # (1, 256, D)
    mask: Tensor  # (1, 256)
    pooled: Tensor  # (1, P)


def encode_prompts(prompts: Sequence[str], settings: TextEncoderSettings, device: torch.device) -> list[TextConditions]:
    """Encode every prompt, each distinct text once. Both encoders are gone from ``device`` afterwards.

    Raises:
        UserError: as ``load_text_encoder_1`` and ``load_text_encoder_2``; tokenizers are found before weights are read.
    """
    dtype = settings.text_encoder_dtype
    llama_tokenizer = load_tokenizer_1(settings.text_encoder1, settings.tokenizer1)
    clip_tokenizer = load_tokenizer_2(settings.text_encoder2, settings.tokenizer2)
    texts = dict.fromkeys(prompts)
    clip = load_text_encoder_2(settings.text_encoder2, device=device, dtype=dtype, tokenizer=clip_tokenizer)
    pooled = {text: clip.encode([text]).cpu() for text in texts}
    del clip
    free_memory(device)
    llama = load_text_encoder_1(settings.text_encoder1, device=device, dtype=dtype, fp8=settings.fp8_llm, tokenizer=llama_tokenizer)
    states = {text: [output.cpu() for output in llama.encode([text])] for text in texts}
    del llama
    free_memory(device)
    return [TextConditions(*states[text], pooled[text]) for text in prompts]
