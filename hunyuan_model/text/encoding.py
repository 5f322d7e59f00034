"""Prompts to the conditions that the transformer reads, with one text encoder in memory at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hunyuan_model.checkpoints.reading import open_checkpoint
from hunyuan_model.text import clip, llm
from hunyuan_model.text.arguments import TextEncoderSettings
from hunyuan_model.text.clip import load_text_encoder_2
from hunyuan_model.text.llm import load_text_encoder_1
from hunyuan_model.text.tokenizers import load_tokenizer
from utils.devices import free_memory


class TextConditions(NamedTuple):
    """One prompt, in the order in which ``sampling.sample_latents`` takes it; on the CPU, in the encoders' dtype."""

    states: Tensor  # (1, 256, D)
    mask: Tensor  # (1, 256)
    pooled: Tensor  # (1, P)


def load_tokenizers(settings: TextEncoderSettings) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
    """The tokenizers alone: a script learns in a moment whether there are any. Errors as of ``load_tokenizer``."""
    first = load_tokenizer(settings.tokenizer1, open_checkpoint(settings.text_encoder1, llm.FLAG), llm.TOKENIZER)
    second = load_tokenizer(settings.tokenizer2, open_checkpoint(settings.text_encoder2, clip.FLAG), clip.TOKENIZER)
    return first, second


def encode_prompts(prompts: Sequence[str], settings: TextEncoderSettings, device: torch.device) -> list[TextConditions]:
    """Encode every prompt, each distinct text once. Both encoders are gone from ``device`` afterwards.

    Raises:
        UserError: as ``load_text_encoder_1`` and ``load_text_encoder_2``; tokenizers are found before weights are read.
    """
    dtype = settings.text_encoder_dtype
    llama_tokenizer, clip_tokenizer = load_tokenizers(settings)
    texts = dict.fromkeys(prompts)
    encoder = load_text_encoder_2(settings.text_encoder2, device=device, dtype=dtype, tokenizer=clip_tokenizer)
    pooled = {text: encoder.encode([text]).cpu() for text in texts}
    del encoder
    free_memory(device)
    encoder = load_text_encoder_1(
        settings.text_encoder1, device=device, dtype=dtype, fp8=settings.fp8_llm, tokenizer=llama_tokenizer
    )
    states = {text: [output.cpu() for output in encoder.encode([text])] for text in texts}
    del encoder
    free_memory(device)
    return [TextConditions(*states[text], pooled[text]) for text in prompts]
