"""Which text encoders and tokenizers, and in which precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TextEncoderSettings:
    """The text encoders of a run.

    Attributes:
        text_encoder1, text_encoder2: paths; None in runs that encode no text.
        tokenizer1, tokenizer2: folders or hub ids; None for the tokenizer beside the weights.
        text_encoder_dtype: of the weights and the states.
        fp8_llm: store the weights of text encoder 1 as float8_e4m3fn.
    """

    text_encoder1: str | None
    text_encoder2: str | None
    text_encoder_dtype: torch.dtype
    tokenizer1: str | None = None
    tokenizer2: str | None = None
    fp8_llm: bool = False
