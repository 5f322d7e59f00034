"""What a run of generation keeps for all its results; what one result is stands in ``requests``."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hunyuan_model.runtime.settings import RuntimeSettings
from hunyuan_model.sampling.decoding import OutputSettings
from hunyuan_model.text.arguments import TextEncoderSettings
from hunyuan_model.transformer.config import TransformerConfig
from hunyuan_model.vae.memory import VAESettings
from networks.block_strengths import BlockStrengths


@dataclass(frozen=True)
class GenerationSettings:
    """The models of a run that samples, and where results go; the fields have the names of flags.

    Attributes:
        config: read from the header of ``dit``.
        lora_mode: merge, or inject, with which multipliers can change from result to result.
        skip_existing: leave out what an earlier run has made.
    """

    dit: str
    dit_dtype: torch.dtype
    config: TransformerConfig
    runtime: RuntimeSettings
    lora_weight: tuple[str, ...]
    lora_mode: str
    lora_partial: bool
    lora_blocks: BlockStrengths
    text: TextEncoderSettings
    vae: VAESettings
    output: OutputSettings
    skip_existing: bool = False
    decode_on_cpu: bool = False
