"""What a file of tensors is, judged by the names in it, so that a message can name what was given in place of what was needed.

Works on names and shapes only, which every format gives without reading a tensor: a check takes a moment.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from enum import Enum

from hunyuan_model.checkpoints.reading import Checkpoint, open_checkpoint
from utils.errors import UserError


class Kind(Enum):
    """The kinds of files users mix up; the value completes "this is ..."."""

    TRANSFORMER = "a HunyuanVideo transformer"
    TRANSFORMER_DIFFUSERS = "a HunyuanVideo transformer in the layout of diffusers"
    TRANSFORMER_COMFY = "a transformer in the layout of Flux or ComfyUI"
    VAE = "a HunyuanVideo VAE"
    VAE_OTHER = "a VAE of another model or in another layout"
    LLAMA = "a Llama language model"
    CLIP_TEXT = "a CLIP text model"
    OPEN_CLIP = "a CLIP model in the layout of open_clip"
    T5 = "a T5 text encoder"
    LORA_SD_SCRIPTS = "a LoRA in the layout of sd-scripts"
    LORA_AB = "a LoRA with lora_A/lora_B keys"
    LYCORIS = "a LyCORIS network"
    LATENT_CACHE = "a latent cache"
    TEXT_CACHE = "a text encoder output cache"


# A kind is the first one of which every pattern is found in some name. Networks come before the models they train,
# the names of which they contain.
_SIGNS: tuple[tuple[Kind, tuple[str, ...]], ...] = (
    (Kind.LORA_AB, (r"\.lora_A\.(\w+\.)?weight$",)),
    (Kind.LYCORIS, (r"\.(lokr_w[12](_[ab])?|hada_w[12]_[ab]|oft_blocks)$",)),
    (Kind.LORA_SD_SCRIPTS, (r"\.lora_down\.weight$",)),
    (Kind.LATENT_CACHE, (r"^latents_\d+x\d+x\d+_\w+$",)),
    (Kind.TEXT_CACHE, (r"^llm_\w+$", r"^(llm_mask|clipL_\w+)$")),
    (Kind.TRANSFORMER_COMFY, (r"(^|\.)double_blocks\.\d+\.img_attn\.qkv\.",)),
    (Kind.TRANSFORMER, (r"(^|\.)(double_blocks\.\d+\.img_attn_qkv|single_blocks\.\d+\.linear1)\.weight$", r"(^|\.)img_in\.")),
    (Kind.TRANSFORMER_DIFFUSERS, (r"(^|\.)single_transformer_blocks\.\d+\.", r"(^|\.)context_embedder\.token_refiner\.")),
    (Kind.VAE, (r"(^|\.)decoder\.(up_blocks\.\d+|mid_block)\.resnets\.\d+\.conv1\.conv\.weight$", r"(^|\.)post_quant_conv\.")),
    (Kind.VAE_OTHER, (r"(^|\.)encoder\.conv_in\.", r"(^|\.)decoder\.conv_in\.")),
    (Kind.LLAMA, (r"(^|\.)layers\.\d+\.self_attn\.q_proj\.weight$", r"(^|\.)embed_tokens\.weight$")),
    (Kind.CLIP_TEXT, (r"(^|\.)embeddings\.token_embedding\.weight$", r"(^|\.)encoder\.layers\.\d+\.self_attn\.q_proj\.weight$")),
    (Kind.OPEN_CLIP, (r"(^|\.)resblocks\.\d+\.attn\.in_proj_weight$",)),
    (Kind.T5, (r"(^|\.)block\.\d+\.layer\.0\.SelfAttention\.q\.weight$",)),
)

# Scales beside float8 weights: without them the weights mean something else.
_SCALE = re.compile(r"(^|\.)(scaled_fp8|scale_weight|weight_scale|scale_input|input_scale)$")


def identify(names: Iterable[str]) -> Kind | None:
    """The kind of file that holds tensors under ``names``; None if it is none of those known here."""
    text = "\n".join(names)
    for kind, signs in _SIGNS:
        if all(re.search(sign, text, re.MULTILINE) for sign in signs):
            return kind
    return None


def describe_shapes(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """What a file with tensors of these names looks like, to complete "it looks like ..."."""
    if not shapes:
        return "a file without tensors"
    kind = identify(shapes)
    if kind is not None:
        return kind.value
    return f"an unknown file; its first keys are {', '.join(list(shapes)[:3])}"


def check_is(shapes: Mapping[str, tuple[int, ...]], kind: Kind, path: str | os.PathLike[str], flag: str) -> None:
    """Refuse a file that is not of ``kind``, before minutes are spent on it.

    Raises:
        UserError: names ``flag``, what it needs, and what the file looks like; or says that float8 weights come with scales.
    """
    if identify(shapes) is not kind:
        raise UserError(f"{flag} needs {kind.value}, but {path} looks like {describe_shapes(shapes)}. Give the right file.")
    scale = next((name for name in shapes if _SCALE.search(name)), None)
    if scale is not None:
        raise UserError(
            f"{flag} {path} holds float8 weights with scales (such as {scale}), which cannot be read. "
            "Give a bfloat16 or float16 file, or a float8 one without scales."
        )


def open_checkpoint_of(kind: Kind, path: str | os.PathLike[str], flag: str) -> Checkpoint:
    """Open ``path`` and refuse it, naming ``flag``, if it is missing, damaged or not of ``kind``."""
    checkpoint = open_checkpoint(path, flag)
    check_is(checkpoint.shapes, kind, path, flag)
    return checkpoint


def check_text_encoder_files(text_encoder_1: str | os.PathLike[str], text_encoder_2: str | os.PathLike[str]) -> tuple[int, int]:
    """Refuse what --text_encoder1 and --text_encoder2 name if it is missing, damaged or something else.

    Returns:
        The widths of the text states and of the pooled output.
    """
    llama = open_checkpoint_of(Kind.LLAMA, text_encoder_1, "--text_encoder1")
    clip = open_checkpoint_of(Kind.CLIP_TEXT, text_encoder_2, "--text_encoder2")
    return _embedding_width(llama, "embed_tokens.weight"), _embedding_width(clip, "token_embedding.weight")


def _embedding_width(checkpoint: Checkpoint, name: str) -> int:
    return next((shape[-1] for key, shape in checkpoint.shapes.items() if key.endswith(name) and shape), 0)
