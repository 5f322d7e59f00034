"""Telling LoRA files of other models from those of HunyuanVideo: by their keys, their blocks and their metadata."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from hunyuan_model.checkpoints.identify import Kind, identify

BLOCKS = (20, 40)
"""The double and single blocks of HunyuanVideo."""

# Patterns of keys that HunyuanVideo has not.
_KEYS = {
    "HunyuanVideo 1.5": r"_attn_[qkv]\.|(^|[._])(vision_in|byt5_in|cond_type_embed(ding|der)?|context_embedder_2)[._]",
    "Stable Diffusion": r"(^|[._])((input|output|down|up)_blocks[._]\d+|middle_block|mid_block)[._]",
    "Wan": r"(^|\.|(?<!transformer)_)blocks[._]\d+[._]((self|cross)_attn[._][qkvo](_img)?\.|attn[12][._]to_|ffn[._])",
}
# Double and single blocks, where names and shapes are those of HunyuanVideo.
_DEPTHS = {(19, 38): "Flux", (54, 0): "HunyuanVideo 1.5", (60, 0): "Qwen-Image"}
_METADATA = ("ss_base_model_version", "modelspec.architecture")


def model_by_keys(keys: Iterable[str]) -> str | None:
    """The model that a LoRA with these keys is for, if it is another one that is known."""
    text = "\n".join(keys)
    return next((model for model, pattern in _KEYS.items() if re.search(pattern, text, re.MULTILINE)), None)


def model_itself(shapes: Mapping[str, tuple[int, ...]]) -> Kind | None:
    """The kind of model that a file with these tensors is, and no LoRA for one."""
    kind = identify(shapes)
    return None if kind in (Kind.LORA_AB, Kind.LYCORIS, Kind.LORA_SD_SCRIPTS) else kind


def model_by_blocks(modules: Iterable[str]) -> str | None:
    """As ``model_by_keys``, by the numbers of blocks among official names of modules."""
    numbers: dict[str, set[int]] = {"double_blocks": set(), "single_blocks": set()}
    for module in modules:
        kind, _, rest = module.partition(".")
        if kind in numbers:
            numbers[kind].add(int(rest.partition(".")[0]))
    depths = tuple(len(found) if found == set(range(len(found))) else -1 for found in numbers.values())
    return _DEPTHS.get(depths)


def model_by_metadata(metadata: Mapping[str, str]) -> tuple[str | None, bool]:
    """What the metadata says the base model is (``key = value``), if anything, and whether that is HunyuanVideo."""
    said = next((key for key in _METADATA if metadata.get(key)), None)
    if said is None:
        return None, False
    name = re.sub(r"[^a-z0-9]", "", metadata[said].lower())
    return f"{said} = {metadata[said]}", "hunyuanvideo" in name and "hunyuanvideo15" not in name
