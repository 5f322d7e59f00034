"""From a path to a transformer ready to run."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence

import torch

from hunyuan_model.checkpoints.identify import Kind, open_checkpoint_of
from hunyuan_model.checkpoints.layouts import TRANSFORMER_LAYOUTS
from hunyuan_model.checkpoints.loading import load_weights, require_same_tensors
from hunyuan_model.checkpoints.official import official_names
from hunyuan_model.checkpoints.reading import Checkpoint
from hunyuan_model.checkpoints.scale_map import read_scales_beside
from hunyuan_model.quantization.formats import FP8_DTYPE, Quantizer, WeightFormat, is_quantized_name, quantize_channels
from hunyuan_model.quantization.linear import enable_quantized_linears
from hunyuan_model.quantization.scaled_mm import Float8Matmuls, find_float8_matmuls
from hunyuan_model.runtime.compilation import enable_compile
from hunyuan_model.runtime.device_split import enable_device_split
from hunyuan_model.runtime.gradient_checkpointing import enable_gradient_checkpointing
from hunyuan_model.runtime.offload.activation_offload import make_offloader
from hunyuan_model.runtime.offload.block_swap import SwappedParts, enable_block_swap
from hunyuan_model.runtime.offload.shared_weights import SharedWeights
from hunyuan_model.runtime.sequence_parallel import enable_sequence_parallel
from hunyuan_model.runtime.settings import RuntimeSettings
from hunyuan_model.runtime.sharding import ShardedWeights, enable_sharding
from hunyuan_model.transformer.attention import make_attention
from hunyuan_model.transformer.config import TransformerConfig, transformer_config_from_shapes
from hunyuan_model.transformer.model import HYVideoDiffusionTransformer
from utils.errors import UserError
from utils.processes.ranks import ALONE, Ranks

logger = logging.getLogger(__name__)


def load_transformer(
    path: str | os.PathLike[str],
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    attn_mode: str = "torch",
    split_attn: bool = False,
    runtime: RuntimeSettings | None = None,
    ranks: Ranks = ALONE,
    patch: Callable[[str, torch.Tensor], torch.Tensor] | None = None,
) -> HYVideoDiffusionTransformer:
    """The transformer in ``path``, in eval mode and frozen; its size is read from the shapes in the file.

    Weights stream from disk to their final dtype and device one by one: at the peak the final weights and one tensor are
    in memory.

    Args:
        path: .safetensors or .pt (also wrapped as ``{"module": ...}``), in the names of Tencent, ComfyUI or diffusers, also beside
            other models in one file; or a folder with one of them, with shards, or with a whole pipeline of diffusers.
        dtype: of the weights, and of the computation outside autocast.
        attn_mode, split_attn: short form of a ``runtime`` that sets only these; not beside one.
        runtime: everything that is put on the transformer. A file that holds float8 weights keeps them, with their scales if it
            has such, in every quantized format; with PLAIN they are dequantized to ``dtype``.
        ranks: the processes that load this together, those of a machine one copy of the swapped weights; by default this alone.
        patch: ``patch(name, tensor) -> tensor`` changes weights while they load, e.g. merges a LoRA; see ``load_weights``.

    Raises:
        UserError: the file is missing, damaged, incomplete or something else than a transformer; ``runtime`` asks for what
            the transformer or ``device`` cannot do.
    """
    if runtime is None:
        runtime = RuntimeSettings(attn_mode=attn_mode, split_attn=split_attn)
    elif attn_mode != "torch" or split_attn:
        raise UserError("load_transformer takes attn_mode and split_attn, or a runtime that has them; set them in the runtime.")
    checkpoint, config = open_transformer(path, "--dit")
    return transformer_from(checkpoint, config, device=torch.device(device), dtype=dtype, runtime=runtime, ranks=ranks, patch=patch)


def transformer_from(
    checkpoint: Checkpoint,
    config: TransformerConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    runtime: RuntimeSettings,
    ranks: Ranks = ALONE,
    patch: Callable[[str, torch.Tensor], torch.Tensor] | None = None,
) -> HYVideoDiffusionTransformer:
    """``load_transformer`` of a checkpoint that is open already, as ``open_transformer`` returns it.

    Everything that happens to the plain network stands here, in the one order that works. What a network module hooks into the
    Linear layers comes after all of it.
    """
    runtime.check(device, config=config)
    split = runtime.split(device, config)
    # 1. The network itself, which only knows how it attends.
    with torch.device("meta"):
        model = HYVideoDiffusionTransformer(config, make_attention(runtime.attn_mode, split=runtime.split_attn))
    # 2. Its weights, each quantized and put where it computes, into host memory, or cut, as soon as it is read: none is held twice.
    shared = SharedWeights(ranks) if runtime.swaps and ranks.count > 1 else None
    swapped = SwappedParts(model, runtime.swap, split, shared)
    sharded = ShardedWeights(runtime.sharding, device) if runtime.sharding is not None else None
    load_weights(
        model,
        checkpoint,
        device=split.device_of,
        dtype_of=lambda name: FP8_DTYPE if runtime.quantized and is_quantized_name(name) else dtype,
        quantize=quantizer_for(runtime.weights, checkpoint),
        patch=patch,
        host=sharded or swapped,
        progress="loading the transformer",
    )
    swapped.complete()
    # 3. Forwards that dequantize. Before block swap and sharding, for which the scales are among a block's weights.
    if runtime.quantized:
        count = enable_quantized_linears(model, dtype, _float8_matmuls(split.devices) if runtime.fp8_fast else None)
        logger.info("%d Linear layers of the transformer are stored in one byte per weight", count)
    # 4. Block swap or sharding. Before compiling: a compiled block does not see where its weights come from.
    if sharded is None:
        enable_block_swap(model, runtime.swap, split, swapped)
    else:
        enable_sharding(model, sharded, device, pinned=runtime.pinned_swap_memory)
    # 5. Processes that compute together change how blocks attend. Before compiling, which leaves that as it is then.
    if runtime.sequence_parallel > 1:
        enable_sequence_parallel(model, runtime.sequence_parallel)
    # 6. Compiling wraps the blocks' own computation. Before checkpointing, which calls what is compiled once more.
    if runtime.compile is not None:
        enable_compile(model, runtime.compile)
    # 7. Checkpointing: it holds the inputs of whatever computes a block.
    if runtime.gradient_checkpointing:
        offloaders = []
        if runtime.gradient_checkpointing_cpu_offload:
            offloaders = [
                make_offloader(len(share.blocks), own_device, pinned=runtime.pinned_swap_memory)
                for own_device, share in zip(split.devices, split.shares)
            ]
        enable_gradient_checkpointing(model, *offloaders, keep_attention=runtime.keeps_attention)
    # 8. Several devices last: tokens arrive before anything holds them.
    enable_device_split(model, split)
    return model.eval()


def _float8_matmuls(devices: Sequence[torch.device]) -> Float8Matmuls:
    """As all devices can."""
    return Float8Matmuls(per_row=all(find_float8_matmuls(device).per_row for device in devices))


def check_transformer_file(path: str | os.PathLike[str], flag: str = "--dit") -> TransformerConfig:
    """The architecture of the transformer in ``path``, read from its header.

    Raises:
        UserError: as ``load_transformer``, with ``flag`` named, but in a moment.
    """
    checkpoint, config = open_transformer(path, flag)
    with torch.device("meta"):
        require_same_tensors(HYVideoDiffusionTransformer(config), checkpoint)
    return config


def open_transformer(path: str | os.PathLike[str], flag: str) -> tuple[Checkpoint, TransformerConfig]:
    """The transformer's tensors under the official names, whatever layout and prefix the file has, and its size.

    Raises:
        UserError: as ``check_transformer_file``.
    """
    checkpoint = open_checkpoint_of(Kind.TRANSFORMER, path, flag)
    checkpoint, _ = official_names(checkpoint, TRANSFORMER_LAYOUTS, "img_in.proj.weight")
    checkpoint = checkpoint.with_scales(read_scales_beside(checkpoint, flag))
    try:
        config = transformer_config_from_shapes(checkpoint.shapes)
    except UserError as error:
        raise UserError(f"{flag} {path}: {error}") from None
    if config.in_channels != config.out_channels:
        raise UserError(
            f"{flag} {path} takes {config.in_channels} channels and predicts {config.out_channels}; models that are given more "
            "than noise and text are not supported. Use the text-to-video model."
        )
    return checkpoint, config


def quantizer_for(weights: WeightFormat, checkpoint: Checkpoint) -> Quantizer:
    """How weights that are not float8 in ``checkpoint`` become so. A file with scales gets scales for what is changed in it."""
    stored = [name for name, dtype in checkpoint.dtypes.items() if dtype == FP8_DTYPE and is_quantized_name(name)]
    if stored and weights in (WeightFormat.FP8_SCALED, WeightFormat.INT8):
        logger.warning("%s holds float8 weights already: they stay as they are in the file.", checkpoint.path)
    if weights is WeightFormat.FP8 and checkpoint.scales:
        return quantize_channels
    return weights.quantizer
