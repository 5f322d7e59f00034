"""What a file of tensors is, judged by the names and shapes in it, so that a message can name what was given in place of what was
needed, and the part of a pipeline folder or of a checkpoint with several models that a flag means.

Reads no tensor: a check takes a moment.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from enum import Enum
from pathlib import Path

from hunyuan_model.checkpoints.reading import Checkpoint, open_checkpoint
from hunyuan_model.checkpoints.scales import take_scales
from utils.errors import UserError

_T2V = "which is not supported (use the text-to-video model)"
_OURS = "which is not supported (use that of HunyuanVideo)"


class Kind(Enum):
    """The kinds of files users mix up: what completes "this is ...", and patterns that are all found among the names.

    A name may be followed by its sizes: ``img_in.proj.weight 3072 33 1 2 2``. The first kind that fits counts: networks come before
    the models they train, the names of which they contain, and variants before the model that they extend.
    """

    LORA_AB = ("a LoRA with lora_A/lora_B keys", r"\.lora_A\.(\w+\.)?weight$")
    LYCORIS = ("a LyCORIS network", r"\.(lokr_w[12](_[ab])?|hada_w[12]_[ab]|oft_blocks|diff(_b)?)$")
    LORA_SD_SCRIPTS = ("a LoRA in the layout of sd-scripts", r"\.lora_down\.weight$")
    LATENT_CACHE = ("a latent cache", r"^latents_\d+x\d+x\d+_\w+$")
    TEXT_CACHE = ("a text encoder output cache", r"^llm_\w+$", r"^(llm_mask|clipL_\w+)$")
    HUNYUAN_15 = (
        "a transformer of HunyuanVideo 1.5, which is not supported (use HunyuanVideo 1.0)",
        r"(^|\.)(vision_in\.proj|byt5_in|cond_type_embed(ding)?|context_embedder_2)\.",
    )
    MEAN_FLOW = (f"a MeanFlow transformer, {_T2V}", r"(^|\.)time_r_in\.")
    FRAMEPACK = (f"a FramePack transformer, {_T2V}", r"(^|\.)(image_projection|clean_x_embedder)\.", r"(^|\.)context_embedder\.")
    I2V = (
        f"a HunyuanVideo I2V transformer with 33 input channels, {_T2V}",
        r"(^|\.)(img_in|x_embedder)\.proj\.weight \d+ 33 ",
    )
    SKYREELS = (
        f"a HunyuanVideo transformer with 32 input channels (SkyReels I2V or keyframes), {_T2V}",
        r"(^|\.)(img_in|x_embedder)\.proj\.weight \d+ 32 ",
    )
    TRANSFORMER = (
        "a HunyuanVideo transformer",
        r"(^|\.)(txt_in\.individual_token_refiner|context_embedder\.token_refiner|double_blocks\.\d+\.img_attn_qkv)\.",
        r"(^|\.)(double_blocks|single_blocks|transformer_blocks|single_transformer_blocks)\.\d+\.",
    )
    FLUX = (
        f"a transformer of the Flux family, {_OURS}",
        r"(^|\.)(double_blocks\.\d+\.img_attn\.qkv|single_transformer_blocks\.\d+\.attn\.to_q)\.",
    )
    WAN = (
        f"a Wan transformer, {_OURS}",
        r"(^|\.)blocks\.\d+\.(self_attn|attn1)\.",
        r"(^|\.)patch_embedding\.weight$",
    )
    VAE_15 = (
        "the VAE of HunyuanVideo 1.5, which is not supported (use the VAE of HunyuanVideo 1.0)",
        r"(^|\.)decoder\.conv_in\.conv\.weight \d+ 32 ",
    )
    VAE = (
        "a HunyuanVideo VAE",
        r"(^|\.)decoder\.(up_blocks\.\d+\.resnets|mid_block\.resnets|up\.\d+\.block|mid)\.(block_)?\d+\.conv1\.conv\.weight$",
        r"(^|\.)post_quant_conv\.",
    )
    VAE_TINY = (
        "a tiny VAE for previews (TAEHV), which is not supported (use the full VAE)",
        r"(^|\.)encoder\.\d+\.(weight|bias|conv\.\d+\.weight)$",
        r"(^|\.)decoder\.\d+\.(weight|bias|conv\.\d+\.weight)$",
    )
    VAE_WAN = (f"a Wan VAE, {_OURS}", r"(^|\.)decoder\.(middle\.0\.residual\.0|mid_block\.resnets\.0\.norm1)\.gamma$")
    VAE_OTHER = (f"a VAE of another model, {_OURS}", r"(^|\.)encoder\.conv_in\.", r"(^|\.)decoder\.conv_in\.")
    QWEN = (
        "a Qwen language model, which is not supported (use the Llama of HunyuanVideo 1.0)",
        r"^(?!.*encoder).*\b(layers\.\d+\.self_attn\.(k_proj\.bias|k_norm\.weight)|blk\.\d+\.attn_k(\.bias|_norm\.weight))$",
        r"(^|\.)(embed_tokens|token_embd)\.weight$",
    )
    LLAMA = (
        "a Llama language model",
        r"(^|\.)(layers\.\d+\.self_attn\.q_proj|blk\.\d+\.attn_q)\.weight$",
        r"(^|\.)(embed_tokens|token_embd)\.weight$",
    )
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


# Where a model lies in a folder with a whole pipeline of diffusers, and in one file with several models.
_PARTS = {
    Kind.TRANSFORMER: ("transformer", "model.diffusion_model."),
    Kind.VAE: ("vae", "vae."),
    Kind.LLAMA: ("text_encoder", "text_encoders.llama.transformer."),
    Kind.CLIP_TEXT: ("text_encoder_2", "text_encoders.clip_l.transformer."),
}


def identify(shapes: Mapping[str, tuple[int, ...]]) -> Kind | None:
    """The kind of file that holds tensors of these names and shapes; None if it is none of those known here."""
    with_sizes = (f"{name} {' '.join(map(str, shape))} " for name, shape in shapes.items())
    text = "\n".join((*shapes, *with_sizes))
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
        UserError: names ``flag``, what it needs, and what the file looks like.
    """
    if identify(shapes) is not kind:
        raise UserError(f"{flag} needs {kind.text}, but {path} looks like {describe_shapes(shapes)}. Give the right file.")


def open_checkpoint_of(kind: Kind, path: str | os.PathLike[str], flag: str) -> Checkpoint:
    """Open the model of this ``kind`` in ``path`` and refuse it, naming ``flag``, if it is missing, damaged or something else.

    Of a folder with a pipeline of diffusers, and of a file with several models, the view has the one that is meant. Its scales are
    those in the file.
    """
    folder, prefix = _PARTS[kind]
    if os.path.isfile(os.path.join(path, "model_index.json")):
        path = Path(path, folder)
    checkpoint = open_checkpoint(path, flag)
    if any(name.startswith(prefix) for name in checkpoint.shapes):
        checkpoint = checkpoint.under_prefix(prefix)
    check_is(checkpoint.shapes, kind, path, flag)
    return take_scales(checkpoint)
