"""The networks of HunyuanVideo and how to run them. Knows nothing of datasets or training.

What other programs use is importable from here; each is imported when it is first asked for, so that a script which
needs one network does not import the libraries of the others.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hunyuan_model.runtime.gradient_checkpointing import enable_gradient_checkpointing
    from hunyuan_model.runtime.loading import check_transformer_file, load_transformer
    from hunyuan_model.text.clip import load_text_encoder_2
    from hunyuan_model.text.encoding import check_text_encoder_files, encode_prompts, load_tokenizers, text_lengths
    from hunyuan_model.text.llm import load_text_encoder_1
    from hunyuan_model.vae.loading import check_vae_file, load_vae

__all__ = [
    "check_text_encoder_files",
    "check_transformer_file",
    "check_vae_file",
    "enable_gradient_checkpointing",
    "encode_prompts",
    "load_text_encoder_1",
    "load_text_encoder_2",
    "load_tokenizers",
    "load_transformer",
    "load_vae",
    "text_lengths",
]

_HOMES = {
    "check_text_encoder_files": "hunyuan_model.text.encoding",
    "check_transformer_file": "hunyuan_model.runtime.loading",
    "check_vae_file": "hunyuan_model.vae.loading",
    "enable_gradient_checkpointing": "hunyuan_model.runtime.gradient_checkpointing",
    "encode_prompts": "hunyuan_model.text.encoding",
    "load_transformer": "hunyuan_model.runtime.loading",
    "load_vae": "hunyuan_model.vae.loading",
    "load_text_encoder_1": "hunyuan_model.text.llm",
    "load_text_encoder_2": "hunyuan_model.text.clip",
    "load_tokenizers": "hunyuan_model.text.encoding",
    "text_lengths": "hunyuan_model.text.encoding",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
