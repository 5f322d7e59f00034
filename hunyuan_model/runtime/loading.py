"""From a path to a transformer ready to run."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

import torch

from hunyuan_model.checkpoints.identify import Kind, open_checkpoint_of
from hunyuan_model.checkpoints.reading import Checkpoint, load_weights
from hunyuan_model.checkpoints.scale_map import read_scales_beside
from hunyuan_model.quantization.linear import (
    FP8_DTYPE,
    Quantiser,
    enable_fp8_linears,
    is_fp8_target,
    quantise_blocks,
    quantise_channels,
    quantise_plainly,
)
from hunyuan_model.quantization.scaled_mm import check_fp8_products, find_products
from hunyuan_model.runtime.block_swap import PartsOnHost, SwapSettings, enable_block_swap
from hunyuan_model.transformer.attention import make_attention
from hunyuan_model.transformer.config import TransformerConfig, transformer_config_from_shapes
from hunyuan_model.transformer.model import HYVideoDiffusionTransformer
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
    fp8_scaled: bool = False,
    fp8_fast: bool = False,
    swap: SwapSettings | None = None,
    patch: Callable[[str, torch.Tensor], torch.Tensor] | None = None,
) -> HYVideoDiffusionTransformer:
    """The transformer in ``path``, in eval mode and frozen; its size is read from the shapes in the file.

    Weights stream from disk to their final dtype and device one by one: at the peak the final weights and one tensor are
    in memory.

    Args:
        path: .safetensors, .pt (also wrapped as ``{"module": ...}``), or a folder with one of them or with shards.
        dtype: of the weights, and of the computation outside autocast.
        attn_mode, split_attn: as ``hunyuan_model.transformer.attention.make_attention`` takes them.
        fp8: store the Linear weights of the blocks as float8 (see ``quantization.linear``). A file that is float8 already
            keeps its bytes then, with their scales if it has such, and is widened to ``dtype`` otherwise.
        fp8_scaled: with ``fp8``, give the weights scales: far closer to the weights of the file, in one byte as well.
        fp8_fast: with ``fp8``, multiply float8 by float8 on cards that can; the scales of ``fp8_scaled`` are then those that
            the cards take.
        swap: what stays in host memory and comes to ``device`` in turn (see ``hunyuan_model.runtime.block_swap``); nothing if None.
        patch: ``patch(name, tensor) -> tensor`` changes weights while they load, e.g. merges a LoRA; see ``load_weights``.

    Raises:
        UserError: the file is missing, damaged, incomplete or something else than a transformer; it has fewer blocks than
            ``swap`` needs; ``fp8_fast`` on a device that cannot.
    """
    device = torch.device(device)
    if (fp8_scaled or fp8_fast) and not fp8:
        raise ValueError("fp8_scaled and fp8_fast say how fp8 is done; give fp8 as well")
    if fp8_fast:
        check_fp8_products(device, "fp8_fast")
    checkpoint, config = open_transformer(path, "--dit")
    if fp8_scaled and any(dtype == FP8_DTYPE for name, dtype in checkpoint.dtypes.items() if is_fp8_target(name)):
        logger.warning("%s holds float8 weights already: they stay as they are, and fp8_scaled changes nothing of them.", path)
    return transformer_from(
        checkpoint,
        config,
        device=device,
        dtype=dtype,
        attn_mode=attn_mode,
        split_attn=split_attn,
        fp8=fp8,
        fp8_scaled=fp8_scaled,
        fp8_fast=fp8_fast,
        swap=swap,
        patch=patch,
    )


def transformer_from(
    checkpoint: Checkpoint,
    config: TransformerConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    attn_mode: str = "torch",
    split_attn: bool = False,
    fp8: bool = False,
    fp8_scaled: bool = False,
    fp8_fast: bool = False,
    swap: SwapSettings | None = None,
    patch: Callable[[str, torch.Tensor], torch.Tensor] | None = None,
) -> HYVideoDiffusionTransformer:
    """``load_transformer`` of a checkpoint that is open already, as ``open_transformer`` returns it."""
    swap = swap or SwapSettings()
    attention = make_attention(attn_mode, split=split_attn)
    with torch.device("meta"):
        model = HYVideoDiffusionTransformer(config, attention)
    parts = PartsOnHost(model, swap, device)
    load_weights(
        model,
        checkpoint,
        device=device,
        dtype_of=lambda name: FP8_DTYPE if fp8 and is_fp8_target(name) else dtype,
        quantise=_quantiser(checkpoint, fp8_scaled, fp8_fast),
        patch=patch,
        on_host=parts.wants,
        loaded=parts.loaded,
        progress="loading the transformer",
    )
    if fp8:
        count = enable_fp8_linears(model, dtype, find_products(device) if fp8_fast else None)
        logger.info("%d Linear layers of the transformer are stored in one byte per weight", count)
    enable_block_swap(model, swap, device, parts)
    return model.eval()


def check_transformer_file(path: str | os.PathLike[str], flag: str = "--dit") -> TransformerConfig:
    """The architecture of the transformer in ``path``, read from its header.

    Raises:
        UserError: as ``load_transformer``, with ``flag`` named, but in a moment.
    """
    return open_transformer(path, flag)[1]


def open_transformer(path: str | os.PathLike[str], flag: str) -> tuple[Checkpoint, TransformerConfig]:
    """The transformer's tensors under the official names, whatever prefix the file puts before them, and its size.

    Raises:
        UserError: as ``check_transformer_file``.
    """
    checkpoint = open_checkpoint_of(Kind.TRANSFORMER, path, flag)
    checkpoint = checkpoint.under_prefix(checkpoint.prefix_of("img_in.proj.weight") or "")
    checkpoint = checkpoint.with_scales(read_scales_beside(checkpoint, flag))
    try:
        return checkpoint, transformer_config_from_shapes(checkpoint.shapes)
    except UserError as error:
        raise UserError(f"{flag} {path}: {error}") from None


def _quantiser(checkpoint: Checkpoint, scaled: bool, fast: bool) -> Quantiser:
    if scaled and not fast:
        return quantise_blocks
    return quantise_channels if scaled or checkpoint.scales else quantise_plainly
