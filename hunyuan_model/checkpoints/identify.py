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
    """The kinds of files users mix up: what completes "this is ...", and patterns of which each is found in some name.

    The first kind that fits counts. Networks come before the models they train, the names of which they contain.
    """

    LORA_AB = ("a LoRA with lora_A/lora_B keys", r"\.lora_A\.(\w+\.)?weight$")
    LYCORIS = ("a LyCORIS network", r"\.(lokr_w[12](_[ab])?|hada_w[12]_[ab]|oft_blocks)$")
    LORA_SD_SCRIPTS = ("a LoRA in the layout of sd-scripts", r"\.lora_down\.weight$")
    LATENT_CACHE = ("a latent cache", r"^latents_\d+x\d+x\d+_\w+$")
    TEXT_CACHE = ("a text encoder output cache", r"^llm_\w+$", r"^(llm_mask|clipL_\w+)$")
    TRANSFORMER_COMFY = ("a transformer in the layout of Flux or ComfyUI", r"(^|\.)double_blocks\.\d+\.img_attn\.qkv\.")
    TRANSFORMER = (
        "a HunyuanVideo transformer",
        r"(^|\.)(double_blocks\.\d+\.img_attn_qkv|single_blocks\.\d+\.linear1)\.weight$",
        r"(^|\.)img_in\.",
    )
    TRANSFORMER_DIFFUSERS = (
        "a HunyuanVideo transformer in the layout of diffusers",
        r"(^|\.)single_transformer_blocks\.\d+\.",
        r"(^|\.)context_embedder\.token_refiner\.",
    )
    VAE = (
        "a HunyuanVideo VAE",
        r"(^|\.)decoder\.(up_blocks\.\d+|mid_block)\.resnets\.\d+\.conv1\.conv\.weight$",
        r"(^|\.)post_quant_conv\.",
    )
    VAE_OTHER = ("a VAE of another model or in another layout", r"(^|\.)encoder\.conv_in\.", r"(^|\.)decoder\.conv_in\.")
    LLAMA = ("a Llama language model", r"(^|\.)layers\.\d+\.self_attn\.q_proj\.weight$", r"(^|\.)embed_tokens\.weight$")
    CLIP_TEXT = (
        "a CLIP text model",
        r"(^|\.)embeddings\.token_embedding\.weight$",
        r"(^|\.)encoder\.layers\.\d+\.self_attn\.q_proj\.weight$",
    )
    OPEN_CLIP = ("a CLIP model in the layout of open_clip", r"(^|\.)resblocks\.\d+\.attn\.in_proj_weight$")
    T5 = ("a T5 text encoder", r"(^|\.)block\.\d+\.layer\.0\.SelfAttention\.q\.weight$")

    def __init__(self, text: str, *signs: str) -> None:
        self.text = text
        self.signs = signs


# Scales beside float8 weights: without them the weights mean something else.
_SCALE = re.compile(r"(^|\.)(scaled_fp8|scale_weight|weight_scale|scale_input|input_scale)$")


def identify(names: Iterable[str]) -> Kind | None:
    """The kind of file that holds tensors under ``names``; None if it is none of those known here."""
    text = "\n".join(names)
    return next((kind for kind in Kind if all(re.search(sign, text, re.MULTILINE) for sign in kind.signs)), None)


def describe_shapes(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """What a file with tensors of these names looks like, to complete "it looks like ..."."""
    if not shapes:
        return "a file without tensors"
    if kind := identify(shapes):
        return kind.text
    return f"an unknown file; its first keys are {', '.join(list(shapes)[:3])}"


def check_is(shapes: Mapping[str, tuple[int, ...]], kind: Kind, path: str | os.PathLike[str], flag: str) -> None:
    """Refuse a file that is not of ``kind``, before minutes are spent on it.

    Raises:
        UserError: names ``flag``, what it needs, and what the file looks like; or says that float8 weights come with scales.
    """
    if identify(shapes) is not kind:
        raise UserError(f"{flag} needs {kind.text}, but {path} looks like {describe_shapes(shapes)}. Give the right file.")
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
