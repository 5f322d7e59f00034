"""From a path to a VAE ready to run: the published .pt, a .safetensors, or a folder; any sizes."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from hunyuan_model.checkpoints.identify import Kind, open_checkpoint_of
from hunyuan_model.checkpoints.loading import load_weights, require_same_tensors
from hunyuan_model.checkpoints.reading import Checkpoint
from hunyuan_model.vae.model import (
    SCALING_FACTOR,
    SPATIAL_COMPRESSION,
    TIME_COMPRESSION,
    AutoencoderKLCausal3D,
    VAEConfig,
)
from utils.errors import UserError

logger = logging.getLogger(__name__)

LARGEST_NORM_GROUPS = 32
FIRST_KEY = "encoder.conv_in.conv.weight"


def load_vae(
    path: str | os.PathLike[str], *, device: torch.device | str, dtype: torch.dtype, flag: str = "--vae"
) -> AutoencoderKLCausal3D:
    """The VAE in ``path``, in eval mode, frozen, and for inference: it reuses its buffers (``vae.reuse_buffers(False)`` for
    gradients with respect to inputs). Tiling and chunks are off.

    Args:
        path: .safetensors, .pt (also inside ``state_dict`` and under a prefix such as ``vae.``), or a folder with one of
            them. Sizes come from the shapes; the number of norm groups and the scaling factor, which shapes do not tell,
            from a ``config.json`` beside the weights if it describes this VAE, else the published values are assumed.
        dtype: of the weights and the computation; inputs of ``encode`` and ``decode`` must have it too.
        flag: how messages call the path.

    Raises:
        UserError: the file is missing, damaged, incomplete or something else than a HunyuanVideo VAE.
    """
    checkpoint, vae = _open_vae(path, flag)
    load_weights(vae, checkpoint, device=device, dtype_of=lambda name: dtype, progress="loading the VAE")
    vae.reuse_buffers()
    return vae.eval()


def _open_vae(path: str | os.PathLike[str], flag: str) -> tuple[Checkpoint, AutoencoderKLCausal3D]:
    """The tensors under their official names, and the network that they fill exactly, on the meta device."""
    checkpoint = open_checkpoint_of(Kind.VAE, path, flag)
    prefix = checkpoint.prefix_of(FIRST_KEY)
    if prefix is None:
        raise UserError(f"{flag} {path} lacks {FIRST_KEY} of a HunyuanVideo VAE. Fetch the file again.")
    checkpoint = checkpoint.under_prefix(prefix)
    config = config_beside(path, vae_config_from_shapes(checkpoint.shapes, f"{flag} {path}"))
    with torch.device("meta"):
        vae = AutoencoderKLCausal3D(config)
    require_same_tensors(vae, checkpoint)
    return checkpoint, vae


def vae_config_from_shapes(shapes: Mapping[str, tuple[int, ...]], where: str = "the VAE") -> VAEConfig:
    """The sizes of a VAE from the shapes of its weights.

    Shapes do not tell the number of norm groups: it is assumed to be the published 32, or the largest power of two that
    divides every width where 32 does not.

    Raises:
        UserError: names ``where``; a key is missing, or there are not the four blocks that 8x and 4x compression need.
    """

    def shape(name: str) -> tuple[int, ...]:
        if name not in shapes:
            raise UserError(f"{where} lacks {name} of a HunyuanVideo VAE. Fetch the file again, or give the right one.")
        if len(shapes[name]) != 5 or 0 in shapes[name]:
            raise UserError(f"{where}: {name} has the shape {shapes[name]}, which no convolution has. Fetch the file again.")
        return shapes[name]

    blocks = _count(shapes, r"encoder\.down_blocks\.(\d+)\.")
    if blocks != len(VAEConfig.block_out_channels):
        raise UserError(f"{where} has {blocks} encoder blocks; a HunyuanVideo VAE has {len(VAEConfig.block_out_channels)}.")
    widths = tuple(shape(f"encoder.down_blocks.{i}.resnets.0.conv1.conv.weight")[0] for i in range(blocks))
    return VAEConfig(
        block_out_channels=widths,
        layers_per_block=_count(shapes, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        norm_num_groups=_assumed_norm_groups(widths),
        latent_channels=shape("post_quant_conv.weight")[0],
        in_channels=shape(FIRST_KEY)[1],
        out_channels=shape("decoder.conv_out.conv.weight")[0],
    )


def _count(shapes: Mapping[str, tuple[int, ...]], pattern: str) -> int:
    return len({match.group(1) for name in shapes if (match := re.match(pattern, name))})


def _assumed_norm_groups(widths: tuple[int, ...]) -> int:
    groups = LARGEST_NORM_GROUPS
    while any(width % groups for width in widths):
        groups //= 2
    return groups


def config_beside(path: str | os.PathLike[str], inferred: VAEConfig) -> VAEConfig:
    """``inferred`` with the norm groups of the ``config.json`` in or beside ``path``.

    A ``config.json`` that describes something else than a VAE of these sizes is passed over, and that is logged.

    Raises:
        UserError: the file is not readable JSON, or asks for what this VAE cannot do.
    """
    root = Path(path)
    file = (root if root.is_dir() else root.parent) / "config.json"
    if not file.is_file():
        return inferred
    try:
        entries = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is not readable JSON ({error}). Fetch it again, or move it away from the VAE.") from error
    if not isinstance(entries, dict) or not _describes(entries, inferred):
        logger.warning("%s does not describe the VAE in %s and is not used; %s is assumed", file, path, inferred)
        return inferred
    compression = (
        entries.get("spatial_compression_ratio", SPATIAL_COMPRESSION),
        entries.get("time_compression_ratio", entries.get("temporal_compression_ratio", TIME_COMPRESSION)),
    )
    if compression != (SPATIAL_COMPRESSION, TIME_COMPRESSION):
        raise UserError(f"{file} asks for compression {compression} in space and time; a HunyuanVideo VAE has (8, 4).")
    groups = entries.get("norm_num_groups", inferred.norm_num_groups)
    if not isinstance(groups, int) or groups < 1 or any(width % groups for width in inferred.block_out_channels):
        raise UserError(f"{file}: norm_num_groups {groups!r} does not divide the widths {inferred.block_out_channels}.")
    scaling_factor = entries.get("scaling_factor", inferred.scaling_factor)
    if not isinstance(scaling_factor, int | float) or abs(scaling_factor - SCALING_FACTOR) > 1e-9:
        raise UserError(
            f"{file}: the scaling_factor is {scaling_factor!r}, but latents are cached unscaled and every later stage "
            f"multiplies them by {SCALING_FACTOR}. Scale the weights of the VAE instead."
        )
    return replace(inferred, norm_num_groups=groups)


def _describes(entries: dict, inferred: VAEConfig) -> bool:
    widths = entries.get("block_out_channels")
    return (
        isinstance(widths, list)
        and tuple(widths) == inferred.block_out_channels
        and entries.get("layers_per_block") == inferred.layers_per_block
        and entries.get("latent_channels") == inferred.latent_channels
    )


def check_vae_file(path: str | os.PathLike[str], flag: str = "--vae") -> None:
    """Refuse a file or folder that is no whole VAE; reads only headers.

    Raises:
        UserError: as ``load_vae``.
    """
    _open_vae(path, flag)


def configure_vae(vae: AutoencoderKLCausal3D, *, chunk_size: int | None = None, tile_size: int | None = None) -> None:
    """Apply --vae_chunk_size and --vae_spatial_tile_sample_min_size; None leaves chunks or tiling off.

    Only space is tiled, as the caches and videos of existing tools were made; a clip's frames stay together.
    """
    vae.set_chunk_size(chunk_size)
    vae.disable_tiling()
    if tile_size is not None:
        vae.enable_spatial_tiling(tile_size)
