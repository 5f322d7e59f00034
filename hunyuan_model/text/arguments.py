"""The flags of the text encoders, and their settings."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING

from utils.cli.settings import settings_from
from utils.files import require_writable_folder

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
        text_cache: folder for the states of prompts; None keeps none.
    """

    text_encoder1: str | None
    text_encoder2: str | None
    text_encoder_dtype: torch.dtype
    tokenizer1: str | None = None
    tokenizer2: str | None = None
    fp8_llm: bool = False
    text_cache: str | None = None


def add_text_encoder_arguments(
    group: argparse._ArgumentGroup, *, required: bool, weights: bool = True, cache: bool = False
) -> None:
    """--text_encoder1/2 with their tokenizers, their precision if ``weights`` are loaded, --text_cache if there is a ``cache``."""
    group.add_argument(
        "--text_encoder1",
        metavar="PATH",
        required=required,
        help="Llama-type text encoder: a Hugging Face folder (also of LLaVA), or one .safetensors or .gguf file",
    )
    group.add_argument(
        "--text_encoder2",
        metavar="PATH",
        required=required,
        help="CLIP-type text encoder: a Hugging Face folder or one .safetensors file",
    )
    group.add_argument(
        "--tokenizer1", metavar="PATH", help="tokenizer folder or hub id for --text_encoder1 (default: the one beside the weights)"
    )
    group.add_argument(
        "--tokenizer2", metavar="PATH", help="tokenizer folder or hub id for --text_encoder2 (default: the one beside the weights)"
    )
    if weights:
        group.add_argument(
            "--text_encoder_dtype",
            metavar="DTYPE",
            help="precision of the text encoders (default: float16 on CUDA, float32 on the CPU)",
        )
        group.add_argument(
            "--fp8_llm",
            action="store_true",
            help="keep text encoder 1's weights in float8: 7.6 GB in place of 14.1 GB (default: off)",
        )
    if cache:
        group.add_argument(
            "--text_cache",
            metavar="FOLDER",
            help="keep the states of prompts here; the text encoders are not loaded for those that are known (default: none)",
        )


def text_encoder_settings(args: argparse.Namespace, device: torch.device) -> TextEncoderSettings:
    """As the flags of ``add_text_encoder_arguments`` say.

    Raises:
        UserError: an unknown dtype, or a --text_cache that cannot be written to.
    """
    import torch  # here, as parsing alone does not need it

    from utils.devices import choose_dtype

    if getattr(args, "text_cache", None) is not None:
        require_writable_folder(args.text_cache, "--text_cache")
    dtype = choose_dtype(args.text_encoder_dtype, "--text_encoder_dtype", device, torch.float16)
    return settings_from(TextEncoderSettings, args, text_encoder_dtype=dtype)
