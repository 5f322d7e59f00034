"""From a path to a transformer ready to run."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

import torch

from hunyuan_model.architecture import TransformerConfig, transformer_config_from_shapes
from hunyuan_model.attention import make_attention
from hunyuan_model.block_swap import SwapSettings, enable_block_swap, on_host
from hunyuan_model.checkpoint import Checkpoint, load_weights
from hunyuan_model.fp8 import FP8_DTYPE, FP8_DTYPES, enable_fp8_linears, is_fp8_target
from hunyuan_model.identify import Kind, open_checkpoint_of
from hunyuan_model.transformer import HYVideoDiffusionTransformer
from utils.errors import UserError

logger = logging.getLogger(__name__)


def load_transformer(
    path: str | os.PathLike[str],
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    attn_mode: str = "torch",
    split_attn: bool = False,
    fp8: bool = False,
    swap: SwapSettings | None = None,
    patch: Callable[[str, torch.Tensor], torch.Tensor] | None = None,
) -> HYVideoDiffusionTransformer:
    """The transformer in ``path``, in eval mode and frozen; its size is read from the shapes in the file.

    Weights stream from disk to their final dtype and device one by one: at the peak the final weights and one tensor are
    in memory.

    Args:
        path: .safetensors, .pt (also wrapped as ``{"module": ...}``), or a folder with one of them or with shards.
        dtype: of the weights, and of the computation outside autocast.
        attn_mode, split_attn: as ``hunyuan_model.attention.make_attention`` takes them.
        fp8: store the Linear weights of the blocks as float8 (see ``hunyuan_model.fp8``). A file that is float8 already
            keeps its bytes then, and is widened to ``dtype`` otherwise.
        swap: what stays in host memory and comes to ``device`` in turn (see ``hunyuan_model.block_swap``); nothing if None.
        patch: ``patch(name, tensor) -> tensor`` changes weights while they load, e.g. merges a LoRA; see ``load_weights``.

    Raises:
        UserError: the file is missing, damaged, incomplete or something else than a transformer; or it has fewer blocks than
            ``swap`` needs.
    """
    checkpoint, config = _open_transformer(path, "--dit")
    swap = swap or SwapSettings()
    attention = make_attention(attn_mode, split=split_attn)
    with torch.device("meta"):
        model = HYVideoDiffusionTransformer(config, attention)
    load_weights(
        model,
        checkpoint,
        device=device,
        dtype_of=lambda name: FP8_DTYPE if fp8 and is_fp8_target(name) else dtype,
        patch=patch,
        on_host=on_host(swap, config),
        progress="loading the transformer",
    )
    if fp8:
        logger.info("%d Linear layers of the transformer are stored as float8", enable_fp8_linears(model, dtype))
    enable_block_swap(model, swap, torch.device(device))
    return model.eval()


def check_transformer_file(path: str | os.PathLike[str], flag: str = "--dit") -> TransformerConfig:
    """The architecture of the transformer in ``path``, read from its header.

    Raises:
        UserError: as ``load_transformer``, with ``flag`` named, but in a moment.
    """
    return _open_transformer(path, flag)[1]


def _open_transformer(path: str | os.PathLike[str], flag: str) -> tuple[Checkpoint, TransformerConfig]:
    """The transformer's tensors under the official names, whatever prefix the file puts before them, and its size."""
    checkpoint = open_checkpoint_of(Kind.TRANSFORMER, path, flag)
    checkpoint = checkpoint.under_prefix(checkpoint.prefix_of("img_in.proj.weight") or "")
    _refuse_scales_beside(checkpoint, flag)
    try:
        return checkpoint, transformer_config_from_shapes(checkpoint.shapes)
    except UserError as error:
        raise UserError(f"{flag} {path}: {error}") from None


def _refuse_scales_beside(checkpoint: Checkpoint, flag: str) -> None:
    """The published float8 file keeps its scales in a second file; without them its weights mean something else."""
    path = checkpoint.path
    scales = path.with_name(f"{path.stem}_map{path.suffix}")
    if os.path.isfile(scales) and any(dtype in FP8_DTYPES for dtype in checkpoint.dtypes.values()):
        raise UserError(
            f"{flag} {path} holds float8 weights whose scales are in {scales.name}; such a pair cannot be read. "
            "Give the bfloat16 file instead; with fp8 switched on its blocks are stored as float8 while loading."
        )
