"""The layouts of LoRA files: how each names its tensors.

A new layout is an entry of ``LAYOUTS``. It is then recognised, read and written, and ``convert_lora.py`` offers it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn

from hunyuan_model.transformer.config import TransformerConfig
from hunyuan_model.transformer.model import HYVideoDiffusionTransformer
from utils.errors import UserError

DEFAULT = "default"
OTHER = "other"
DEFAULT_PREFIX = "lora_unet_"


@dataclass(frozen=True)
class LoraLayout:
    """Names of the tensors of one module: a prefix, the module, a dot, and an ending for each part.

    Attributes:
        example: a pattern of its keys, for messages.
        prefixes: what may stand before the module; the first one is written.
        dotted: whether the module is its path (``double_blocks.0.img_mlp.fc1``), else its flat name, with dots as underscores.
        endings: of ``down`` (rank, in), ``up`` (out, rank) and ``alpha``.
        scale_in_factors: whether a file is written with sqrt(alpha / rank) multiplied into both factors, and no alpha.
    """

    example: str
    prefixes: tuple[str, ...]
    dotted: bool
    endings: Mapping[str, str]
    scale_in_factors: bool = False

    def read_key(self, key: str) -> tuple[str, str] | None:
        """The flat name of the module and the part of a key; None for keys of other layouts."""
        for prefix in self.prefixes:
            for part, ending in self.endings.items():
                if key.startswith(prefix) and key.endswith(f".{ending}"):
                    module = key[len(prefix) : -len(ending) - 1]
                    if module and (self.dotted or "." not in module):
                        return flat_name(module), part
        return None

    def key(self, flat: str, part: str) -> str:
        """The key to write for a part of the module with a flat name. Errors as in ``module_path``, where that is needed."""
        return f"{self.prefixes[0]}{module_path(flat) if self.dotted else flat}.{self.endings[part]}"


LAYOUTS = {
    # sd-scripts, and what training writes: the update of a weight is alpha / rank * up @ down.
    DEFAULT: LoraLayout(
        example="lora_unet_*.lora_down.weight",
        prefixes=(DEFAULT_PREFIX,),
        dotted=False,
        endings={"down": "lora_down.weight", "up": "lora_up.weight", "alpha": "alpha"},
    ),
    # ComfyUI and diffusers: without an alpha the update is B @ A.
    OTHER: LoraLayout(
        example="diffusion_model.*.lora_A.weight",
        prefixes=("diffusion_model.", "transformer."),
        dotted=True,
        endings={"down": "lora_A.weight", "up": "lora_B.weight", "alpha": "alpha"},
        scale_in_factors=True,
    ),
}


def flat_name(module_path: str) -> str:
    """``double_blocks.0.img_mlp.fc1`` -> ``double_blocks_0_img_mlp_fc1``."""
    return module_path.replace(".", "_")


def module_path(flat: str) -> str:
    """``double_blocks_0_img_mlp_fc1`` -> ``double_blocks.0.img_mlp.fc1``.

    Raises:
        UserError: no linear layer of the HunyuanVideo transformer has this name.
    """
    if flat not in _paths_of_linears():
        raise UserError(
            f"{DEFAULT_PREFIX}{flat} names no linear layer of a HunyuanVideo transformer, so its keys cannot be converted."
        )
    return _paths_of_linears()[flat]


@lru_cache
def _paths_of_linears() -> dict[str, str]:
    """Path by flat name. Flat names are ambiguous without the model: underscores also stand inside names."""
    with torch.device("meta"):
        transformer = HYVideoDiffusionTransformer(TransformerConfig())
    return {flat_name(path): path for path, module in transformer.named_modules() if isinstance(module, nn.Linear)}
