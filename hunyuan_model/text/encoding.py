"""Prompts to the conditions that the transformer reads, with one text encoder in memory at a time."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from hunyuan_model.checkpoints.fingerprint import fingerprint_weights
from hunyuan_model.checkpoints.identify import Kind, open_checkpoint_of
from hunyuan_model.text import clip, llm
from hunyuan_model.text.arguments import TextEncoderSettings
from hunyuan_model.text.cache import TextCache
from hunyuan_model.text.clip import check_text_encoder_2, load_text_encoder_2
from hunyuan_model.text.conditions import TextConditions
from hunyuan_model.text.llm import check_text_encoder_1, load_text_encoder_1
from hunyuan_model.text.placement import place_beside_others
from hunyuan_model.text.template import TEMPLATE_BEFORE_PROMPT, TEXT_LENGTH, apply_prompt_template
from hunyuan_model.text.tokenizers import fingerprint_tokenizer, load_tokenizer, token_ids
from utils.devices import free_memory
from utils.errors import shown

logger = logging.getLogger(__name__)

CLIP_LENGTH = 77  # tokens that text encoder 2 reads, with begin and end


def fingerprints(settings: TextEncoderSettings, tokenizers: Sequence[PreTrainedTokenizerBase]) -> dict[str, str]:
    """What distinguishes these encoders and tokenizers from others, by the flags that name them."""
    given = ((Kind.LLAMA, settings.text_encoder1, llm.FLAG), (Kind.CLIP_TEXT, settings.text_encoder2, clip.FLAG))
    weights = (fingerprint_weights(open_checkpoint_of(*checkpoint)) for checkpoint in given)
    names = ("text_encoder1", "text_encoder2", "tokenizer1", "tokenizer2")
    return dict(zip(names, (*weights, *map(fingerprint_tokenizer, tokenizers))))


def load_tokenizers(settings: TextEncoderSettings) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
    """The tokenizers alone: a script learns in a moment whether there are any. Errors as of ``load_tokenizer``."""
    llama = open_checkpoint_of(Kind.LLAMA, settings.text_encoder1, llm.FLAG)
    first = load_tokenizer(settings.tokenizer1, llama, llm.TOKENIZER)
    clip_text = open_checkpoint_of(Kind.CLIP_TEXT, settings.text_encoder2, clip.FLAG)
    return first, load_tokenizer(settings.tokenizer2, clip_text, clip.TOKENIZER)


def check_text_encoder_files(text_encoder_1: str | os.PathLike[str], text_encoder_2: str | os.PathLike[str]) -> None:
    """Refuse what --text_encoder1 and --text_encoder2 name if it is missing, damaged, incomplete or something else.

    Raises:
        UserError: as ``load_text_encoder_1`` and ``load_text_encoder_2``, but in a moment: only headers are read.
    """
    check_text_encoder_1(text_encoder_1)
    check_text_encoder_2(text_encoder_2)


class TextLength(NamedTuple):
    """How long a text is, in tokens of each encoder."""

    tokens1: int  # with what follows the prompt in the template; encoder 1 reads 256
    tokens2: int  # with the begin and the end; encoder 2 reads 77

    @property
    def counts(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """For encoder 1 and 2: the tokens, and how many it reads."""
        return (self.tokens1, TEXT_LENGTH), (self.tokens2, CLIP_LENGTH)

    @property
    def is_cut(self) -> bool:
        """Whether one of the encoders does not read to the end."""
        return any(count > limit for count, limit in self.counts)

    def __str__(self) -> str:
        return f"{self.tokens1} of {TEXT_LENGTH} tokens for encoder 1, {self.tokens2} of {CLIP_LENGTH} for encoder 2"


def text_lengths(texts: Iterable[str], tokenizers: Sequence[PreTrainedTokenizerBase]) -> dict[str, TextLength]:
    """The lengths of the texts, each once."""
    llama_tokenizer, clip_tokenizer = tokenizers
    distinct = list(dict.fromkeys(texts))
    if not distinct:
        return {}
    before = len(token_ids(llama_tokenizer, [TEMPLATE_BEFORE_PROMPT])[0])
    llama = token_ids(llama_tokenizer, [apply_prompt_template(text) for text in distinct])
    clip_ids = token_ids(clip_tokenizer, distinct)
    return {text: TextLength(len(one) - before, len(two) + 2) for text, one, two in zip(distinct, llama, clip_ids)}


def cut_texts(texts: Iterable[str], tokenizers: Sequence[PreTrainedTokenizerBase]) -> dict[str, TextLength]:
    """Those of the texts that are too long for an encoder, each once."""
    return {text: length for text, length in text_lengths(texts, tokenizers).items() if length.is_cut}


def encode_prompts(
    prompts: Sequence[str], settings: TextEncoderSettings, device: torch.device, *, beside_others: bool = False
) -> list[TextConditions]:
    """Encode every prompt, each distinct text once, with a warning for those that are cut. Both encoders are gone from ``device``
    afterwards; where all texts are in the text cache, none is loaded.

    Args:
        beside_others: other networks stay on ``device``: where its free memory does not suffice, the encoders are on the CPU, and
            what they give there is not cached.

    Raises:
        UserError: as ``load_text_encoder_1`` and ``load_text_encoder_2``; tokenizers are found before weights are read.
    """
    llama_tokenizer, clip_tokenizer = load_tokenizers(settings)
    texts = dict.fromkeys(prompts)
    for text, cut in cut_texts(texts, (llama_tokenizer, clip_tokenizer)).items():
        logger.warning("the end of a prompt is not read, it has %s: %s", cut, shown(text))
    cache, found = None, {}
    if settings.text_cache is not None:
        made_by = fingerprints(settings, (llama_tokenizer, clip_tokenizer))
        cache = TextCache(settings.text_cache, settings, made_by, device)
        found = {text: conditions for text in texts if (conditions := cache.read(text)) is not None}
        logger.info("%d of %d texts are in --text_cache", len(found), len(texts))
    if missing := [text for text in texts if text not in found]:
        if beside_others:
            settings, place = place_beside_others(settings, device)
            cache, device = cache if place == device else None, place
        dtype = settings.text_encoder_dtype
        encoder = load_text_encoder_2(settings.text_encoder2, device=device, dtype=dtype, tokenizer=clip_tokenizer)
        pooled = {text: encoder.encode([text]).cpu() for text in missing}
        del encoder
        free_memory(device)
        encoder = load_text_encoder_1(
            settings.text_encoder1, device=device, dtype=dtype, fp8=settings.fp8_llm, tokenizer=llama_tokenizer
        )
        for text in missing:
            states, mask = (output.cpu() for output in encoder.encode([text]))
            found[text] = TextConditions(states, mask, pooled[text])
            if cache is not None:
                cache.write(text, found[text])
        del encoder
        free_memory(device)
    return [found[text] for text in prompts]
