"""The size of a transformer, and how to read it off the shapes in a checkpoint. Nothing else fixes a size."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from utils.errors import UserError

# What the architecture is read from, with the number of dimensions.
_NEEDED = {
    "img_in.proj.weight": 5,
    "time_in.mlp.0.weight": 2,
    "vector_in.in_layer.weight": 2,
    "txt_in.input_embedder.weight": 2,
    "txt_in.individual_token_refiner.blocks.0.mlp.fc1.weight": 2,
    "double_blocks.0.img_attn_q_norm.weight": 1,
    "double_blocks.0.img_mlp.fc1.weight": 2,
    "single_blocks.0.linear1.weight": 2,
    "final_layer.linear.weight": 2,
}


@dataclass(frozen=True)
class TransformerConfig:
    """Everything that decides the shapes of ``HYVideoDiffusionTransformer``. The defaults are the published model."""

    hidden_size: int = 3072
    heads: int = 24
    head_dim: int = 128
    double_depth: int = 20
    single_depth: int = 40
    refiner_depth: int = 2
    mlp_size: int = 12288
    text_dim: int = 4096
    pooled_dim: int = 768
    in_channels: int = 16
    out_channels: int = 16
    patch_size: tuple[int, int, int] = (1, 2, 2)
    rope_dims: tuple[int, int, int] = (16, 56, 56)
    rope_theta: float = 256.0
    frequency_dim: int = 256
    guidance: bool = True


def rope_dims_for(head_dim: int) -> tuple[int, int, int]:
    """How a head of ``head_dim`` (even) is shared out to the rotations of (time, row, column): 128 -> (16, 56, 56)."""
    spatial = 2 * (head_dim * 7 // 32)
    return head_dim - 2 * spatial, spatial, spatial


def transformer_config_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> TransformerConfig:
    """The architecture behind a state dict in the official layout, from its tensor shapes alone.

    Args:
        shapes: tensor name -> shape, as read from a checkpoint header.

    Raises:
        UserError: names that the architecture is read from are missing, or the shapes contradict each other.
    """
    missing = [name for name in _NEEDED if name not in shapes]
    if missing:
        raise UserError(
            f"this is not a whole HunyuanVideo transformer: it has no {', '.join(missing)}. "
            "Copy or download it again, or give the right file."
        )
    for name, dimensions in _NEEDED.items():
        if len(shapes[name]) != dimensions or 0 in shapes[name]:
            raise UserError(
                f"{name} of this transformer has the shape {tuple(shapes[name])}. The file is damaged or of another model."
            )
    hidden_size, in_channels, *patch_size = shapes["img_in.proj.weight"]
    (head_dim,) = shapes["double_blocks.0.img_attn_q_norm.weight"]
    rows_out = shapes["final_layer.linear.weight"][0]
    if hidden_size % head_dim or head_dim % 2 or rows_out % math.prod(patch_size):
        raise UserError(
            f"the shapes of this transformer contradict each other: its hidden size is {hidden_size}, the head size is {head_dim}, "
            f"final_layer.linear.weight has {rows_out} rows. The file is damaged or of another model."
        )
    return TransformerConfig(
        hidden_size=hidden_size,
        heads=hidden_size // head_dim,
        head_dim=head_dim,
        double_depth=_depth(shapes, "double_blocks"),
        single_depth=_depth(shapes, "single_blocks"),
        refiner_depth=_depth(shapes, "txt_in.individual_token_refiner.blocks"),
        mlp_size=shapes["double_blocks.0.img_mlp.fc1.weight"][0],
        text_dim=shapes["txt_in.input_embedder.weight"][1],
        pooled_dim=shapes["vector_in.in_layer.weight"][1],
        in_channels=in_channels,
        out_channels=rows_out // math.prod(patch_size),
        patch_size=tuple(patch_size),
        rope_dims=rope_dims_for(head_dim),
        frequency_dim=shapes["time_in.mlp.0.weight"][1],
        guidance=any(name.startswith("guidance_in.") for name in shapes),
    )


def _depth(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> int:
    """Number of blocks called ``prefix.N``; the loading of weights names those that are missing between them."""
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    return len({match[1] for match in map(pattern.match, shapes) if match})
