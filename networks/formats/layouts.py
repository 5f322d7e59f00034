"""The layouts of LoRA files: how each names its tensors.

A layout is a prefix, the names of modules (``hunyuan_model.checkpoints.layouts``), with dots or flat, and the endings it is written
with. A new one is an entry of ``LAYOUTS``: it is then recognised and read, and ``convert_lora.py`` offers it if it is a target.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hunyuan_model.checkpoints.layouts import COMFYUI, DIFFUSERS, OFFICIAL, NameLayout, Place

DEFAULT = "default"
OTHER = "other"
DEFAULT_PREFIX = "lora_unet_"

# Endings of keys of kinds that are not read here, and the names of these kinds.
UNSUPPORTED = {
    "lora_mid.weight": "Tucker decomposition",
    **dict.fromkeys(("hada_t1", "hada_t2", "lokr_t1", "lokr_t2"), "Tucker decomposition"),
    **dict.fromkeys(("oft_blocks", "oft_R.weight", "boft_R", "boft_s"), "OFT"),
    **dict.fromkeys(("a1.weight", "a2.weight", "b1.weight", "b2.weight", "bm.weight"), "GLoRA"),
    **dict.fromkeys(("p_layer.weight", "q_layer.weight", "lambda_layer"), "T-LoRA"),
    "on_input": "(IA)^3",
    "lora_B.bias": "LoRA with a bias",
}

# Endings of keys, and the part of an update that each is, the same in all layouts.
ENDINGS = {
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_A.default.weight": "down",
    "lora_B.default.weight": "up",
    "lora.down.weight": "down",
    "lora.up.weight": "up",
    "alpha": "alpha",
    "dora_scale": "magnitude",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "lora_magnitude_vector.default.weight": "magnitude",
    "diff": "diff",
    "diff_b": "diff_b",
    "w_norm": "diff",
    "b_norm": "diff_b",
    "set_weight": "set_weight",
    "scalar": "scalar",
    **{name: name for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")},
    **{name: name for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")},
    **{ending: ending for ending in UNSUPPORTED},
}
_KOHYA = {"down": "lora_down.weight", "up": "lora_up.weight", "magnitude": "dora_scale"}
_PEFT = {"down": "lora_A.weight", "up": "lora_B.weight"}

LYCORIS_KINDS = ("LoHa", "LoKr", "DoRA", "DoRA on LoHa", "DoRA on LoKr")


@dataclass(frozen=True)
class LoraLayout:
    """How one program names the tensors of a LoRA.

    Attributes:
        title: who uses it, to complete "the layout of ...".
        example: a pattern of its keys, for messages.
        prefix: stands before every module.
        names: of the modules.
        dotted: whether a module is its path, else its flat name, with dots as underscores.
        endings: it is written with, by part, where they are not the parts' own names; None for a layout that is only read.
        scale_in_factors: whether a LoRA is written with sqrt(alpha / rank) multiplied into both factors, without alpha, and with
            one rank for all modules.
        kinds: of updates that it can hold besides LoRA.
    """

    title: str
    example: str
    prefix: str
    names: NameLayout
    dotted: bool
    endings: Mapping[str, str] | None = None
    scale_in_factors: bool = False
    kinds: tuple[str, ...] = field(default=())

    def read_key(self, key: str) -> tuple[Place, str] | None:
        """Where a key's module stands, and the part of its update that the key is; None for keys of other layouts."""
        if not key.startswith(self.prefix):
            return None
        module, part = split_ending(key[len(self.prefix) :])
        if part is None:
            return None
        place = self.names.place(module) if self.dotted else self.names.place_of_flat(module)
        return place and (place, part)

    def keys(self, official: str, part: str) -> tuple[str, ...]:
        """The keys to write for a part of the update of an official module: one for each module here that holds its rows."""
        ending = (self.endings or {}).get(part, part)
        modules = self.names.modules(official)
        return tuple(f"{self.prefix}{module if self.dotted else flat_name(module)}.{ending}" for module in modules)


def split_ending(key: str) -> tuple[str, str | None]:
    """A key without its ending, and the part of an update that the ending stands for; None if it is no known ending."""
    end = key.find(".")
    while end >= 0:  # the longest ending counts
        if part := ENDINGS.get(key[end + 1 :]):
            return key[:end], part
        end = key.find(".", end + 1)
    return key, None


LAYOUTS = {
    # sd-scripts, and what training writes: the update of a weight is alpha / rank * up @ down.
    DEFAULT: LoraLayout(
        "sd-scripts and musubi-tuner",
        "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight",
        DEFAULT_PREFIX,
        OFFICIAL,
        False,
        _KOHYA,
        kinds=LYCORIS_KINDS,
    ),
    # ComfyUI, its wrapper and diffusers: without an alpha the update is B @ A.
    OTHER: LoraLayout(
        "ComfyUI and OneTrainer",
        "diffusion_model.double_blocks.0.img_attn_qkv.lora_A.weight",
        "diffusion_model.",
        OFFICIAL,
        True,
        _PEFT,
        scale_in_factors=True,
    ),
    "diffusers": LoraLayout(
        "diffusers",
        "transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
        "transformer.",
        DIFFUSERS,
        True,
        _PEFT,
        scale_in_factors=True,
    ),
    "comfy": LoraLayout(
        "ComfyUI's own names",
        "diffusion_model.double_blocks.0.img_attn.qkv.lora_down.weight",
        "diffusion_model.",
        COMFYUI,
        True,
        _KOHYA,
        kinds=(*LYCORIS_KINDS, "a whole difference", "a replaced weight"),
    ),
    "framepack": LoraLayout(
        "FramePack in musubi-tuner",
        "lora_unet_transformer_blocks_0_attn_to_q.lora_down.weight",
        DEFAULT_PREFIX,
        DIFFUSERS,
        False,
        _KOHYA,
    ),
    "diffusion-pipe": LoraLayout(
        "diffusion-pipe",
        "transformer.double_blocks.0.img_attn_qkv.lora_A.weight",
        "transformer.",
        OFFICIAL,
        True,
    ),
    "onetrainer": LoraLayout(
        "OneTrainer before 2026",
        "lora_transformer_transformer_blocks_0_attn_to_q.lora_down.weight",
        "lora_transformer_",
        DIFFUSERS,
        False,
    ),
    "original": LoraLayout(
        "OneTrainer's original names",
        "double_blocks.0.img_attn_qkv.lora_A.weight",
        "",
        OFFICIAL,
        True,
    ),
    "hunyuan": LoraLayout(
        "Tencent's trainer",
        "Hunyuan_video_I2V_lora_double_blocks_0_img_attn_qkv.lora_down.weight",
        "Hunyuan_video_I2V_lora_",
        OFFICIAL,
        False,
    ),
    "lycoris": LoraLayout(
        "LyCORIS",
        "lycoris_double_blocks_0_img_attn_qkv.lokr_w1",
        "lycoris_",
        OFFICIAL,
        False,
    ),
    "lycoris-diffusers": LoraLayout(
        "LyCORIS on diffusers",
        "lycoris_transformer_blocks_0_attn_to_q.lokr_w1",
        "lycoris_",
        DIFFUSERS,
        False,
    ),
    "comfy-flat": LoraLayout(
        "ComfyUI's names in the style of sd-scripts",
        "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight",
        DEFAULT_PREFIX,
        COMFYUI,
        False,
    ),
    "diffusers-model": LoraLayout(
        "a model of diffusers",
        "transformer_blocks.0.attn.to_q.lora_A.weight",
        "",
        DIFFUSERS,
        True,
    ),
    "peft": LoraLayout(
        "PEFT",
        "base_model.model.double_blocks.0.img_attn_qkv.lora_A.weight",
        "base_model.model.",
        OFFICIAL,
        True,
    ),
    "peft-diffusers": LoraLayout(
        "PEFT on diffusers",
        "base_model.model.transformer_blocks.0.attn.to_q.lora_A.weight",
        "base_model.model.",
        DIFFUSERS,
        True,
    ),
}

TARGETS = tuple(name for name, layout in LAYOUTS.items() if layout.endings is not None)
"""The layouts that are written."""

# Beside the transformer's: of text encoders, and trained embeddings.
OTHER_MODELS = (
    "lora_te_",
    "lora_te1_",
    "lora_te2_",
    "lycoris_te",
    "text_encoder.",
    "text_encoder_2.",
    "text_encoders.",
    "bundle_emb.",
)


def flat_name(module_path: str) -> str:
    """``double_blocks.0.img_mlp.fc1`` -> ``double_blocks_0_img_mlp_fc1``."""
    return module_path.replace(".", "_")
