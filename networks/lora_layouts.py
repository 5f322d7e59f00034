"""The layouts of LoRA files: how each names its tensors.

A new layout is an entry of ``LAYOUTS``. It is then recognised, read and written (``networks.lora_files``), and
``convert_lora.py`` offers it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from utils.errors import UserError

DEFAULT = "default"
OTHER = "other"
DEFAULT_PREFIX = "lora_unet_"


@dataclass(frozen=True)
class LoraLayout:
    """Names of the tensors of one module: a prefix, the module, and an ending for each part.

    Attributes:
        name: what --target of convert_lora.py calls it.
        example: a pattern of its keys, for messages.
        prefixes: what may stand before the module; the first one is written.
        dotted: whether the module is its path (``double_blocks.0.img_mlp.fc1``), else its flat name, with dots as underscores.
        down, up: endings of the factors, (rank, in) and (out, rank).
        scale_in_factors: whether a file is written with sqrt(alpha / rank) multiplied into both factors, and no alpha.
    """

    name: str
    example: str
    prefixes: tuple[str, ...]
    dotted: bool
    down: str
    up: str
    scale_in_factors: bool
    alpha: str = "alpha"

    def read_key(self, key: str) -> tuple[str, str] | None:
        """The module (path or flat name) and the part ("down", "up" or "alpha") of a key; None for keys of other layouts."""
        for prefix in self.prefixes:
            for part in ("down", "up", "alpha"):
                module = key.removeprefix(prefix).removesuffix(f".{getattr(self, part)}")
                if key == f"{prefix}{module}.{getattr(self, part)}" and module and (self.dotted or "." not in module):
                    return module, part
        return None

    def key(self, flat: str, part: str) -> str:
        """The key to write for a part of the module with a flat name.

        Raises:
            UserError: the layout needs a path, and no linear layer of the transformer has this flat name.
        """
        return f"{self.prefixes[0]}{module_path(flat) if self.dotted else flat}.{getattr(self, part)}"


LAYOUTS = {
    layout.name: layout
    for layout in (
        # sd-scripts, and what training writes: the update of a weight is alpha / rank * up @ down.
        LoraLayout(
            name=DEFAULT,
            example="lora_unet_*.lora_down.weight",
            prefixes=(DEFAULT_PREFIX,),
            dotted=False,
            down="lora_down.weight",
            up="lora_up.weight",
            scale_in_factors=False,
        ),
        # ComfyUI and diffusers: without an alpha the update is B @ A.
        LoraLayout(
            name=OTHER,
            example="diffusion_model.*.lora_A.weight",
            prefixes=("diffusion_model.", "transformer."),
            dotted=True,
            down="lora_A.weight",
            up="lora_B.weight",
            scale_in_factors=True,
        ),
    )
}

# Every linear layer of the transformer. Flat names are ambiguous without it: underscores also stand inside names.
_MODULE_PATHS = (
    "double_blocks.{n}.img_mod.linear",
    "double_blocks.{n}.img_attn_qkv",
    "double_blocks.{n}.img_attn_proj",
    "double_blocks.{n}.img_mlp.fc1",
    "double_blocks.{n}.img_mlp.fc2",
    "double_blocks.{n}.txt_mod.linear",
    "double_blocks.{n}.txt_attn_qkv",
    "double_blocks.{n}.txt_attn_proj",
    "double_blocks.{n}.txt_mlp.fc1",
    "double_blocks.{n}.txt_mlp.fc2",
    "single_blocks.{n}.linear1",
    "single_blocks.{n}.linear2",
    "single_blocks.{n}.modulation.linear",
    "txt_in.input_embedder",
    "txt_in.t_embedder.mlp.{n}",
    "txt_in.c_embedder.linear_{n}",
    "txt_in.individual_token_refiner.blocks.{n}.self_attn_qkv",
    "txt_in.individual_token_refiner.blocks.{n}.self_attn_proj",
    "txt_in.individual_token_refiner.blocks.{n}.mlp.fc1",
    "txt_in.individual_token_refiner.blocks.{n}.mlp.fc2",
    "txt_in.individual_token_refiner.blocks.{n}.adaLN_modulation.1",
    "time_in.mlp.{n}",
    "guidance_in.mlp.{n}",
    "vector_in.in_layer",
    "vector_in.out_layer",
    "final_layer.linear",
    "final_layer.adaLN_modulation.1",
)
_FLAT_TO_PATH = [(re.compile(path.replace(".", "_").replace("{n}", r"(\d+)")), path) for path in _MODULE_PATHS]


def flat_name(module_path: str) -> str:
    """``double_blocks.0.img_mlp.fc1`` -> ``double_blocks_0_img_mlp_fc1``."""
    return module_path.replace(".", "_")


def module_path(flat: str) -> str:
    """``double_blocks_0_img_mlp_fc1`` -> ``double_blocks.0.img_mlp.fc1``.

    Raises:
        UserError: no linear layer of a HunyuanVideo transformer has this name.
    """
    for pattern, path in _FLAT_TO_PATH:
        if found := pattern.fullmatch(flat):
            return path.format(n=found[1]) if found.groups() else path
    raise UserError(f"{DEFAULT_PREFIX}{flat} names no linear layer of a HunyuanVideo transformer, so its keys cannot be converted.")
