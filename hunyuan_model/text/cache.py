"""Text states on disk (--text_cache): a prompt that the same encoders have read before needs no encoder."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

import torch

from hunyuan_model.text.arguments import TextEncoderSettings
from hunyuan_model.text.conditions import TextConditions
from hunyuan_model.text.template import TEXT_LENGTH, apply_prompt_template
from utils.errors import UserError, first_line
from utils.safetensors_io import read_tensors, save_tensors

logger = logging.getLogger(__name__)


class TextCache:
    """A folder with a file for each prompt, named by a hash of everything that the states depend on.

    Args:
        fingerprints: of the encoders and tokenizers; see ``encoding.fingerprints``.
        device: kernels of different devices round differently.
    """

    def __init__(self, folder: str, settings: TextEncoderSettings, fingerprints: dict[str, str], device: torch.device) -> None:
        self._folder = Path(folder)
        self._made_by = fingerprints | {
            "dtype": str(settings.text_encoder_dtype),
            "fp8_llm": str(settings.fp8_llm),
            "device": device.type,
            "length": str(TEXT_LENGTH),
        }

    def read(self, text: str) -> TextConditions | None:
        """The states of ``text``; None where they have to be made, also when their file is damaged, which is logged."""
        path = self._path(text)
        if not path.exists():
            return None
        try:
            tensors = read_tensors(path, "--text_cache").tensors
            # In memory of their own, aligned as what an encoder gives: where they lie decides the last bits of products.
            return TextConditions(*(tensors[name].clone() for name in TextConditions._fields))
        except (UserError, KeyError) as error:
            logger.warning("%s is encoded again, as its cache is damaged: %s", path.name, first_line(error))
            return None

    def write(self, text: str, conditions: TextConditions) -> None:
        """Keep the states of ``text``. Raises UserError where the disk is full."""
        tensors = {name: tensor.contiguous() for name, tensor in conditions._asdict().items()}
        save_tensors(self._path(text), tensors, {"prompt": text, **self._made_by})

    def _path(self, text: str) -> Path:
        content = json.dumps([apply_prompt_template(text), text, sorted(self._made_by.items())])
        return self._folder / f"{hashlib.blake2b(content.encode(), digest_size=16).hexdigest()}.safetensors"
