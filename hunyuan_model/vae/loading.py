"""From a path to a VAE ready to run, whatever its layout and sizes."""

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
from hunyuan_model.checkpoints.layouts_vae import VAE_LAYOUTS
from hunyuan_model.checkpoints.loading import load_weights, require_same_tensors
from hunyuan_model.checkpoints.official import official_names
from hunyuan_model.checkpoints.reading import Checkpoint
from hunyuan_model.vae.model import SCALING_FACTOR, AutoencoderKLCausal3D, VAEConfig
from utils.devices import explain_out_of_memory
from utils.errors import UserError
from utils.files import read_text

logger = logging.getLogger(__name__)

LARGEST_NORM_GROUPS = 32


def load_vae(
    path: str | os.PathLike[str], *, device: torch.device | str, dtype: torch.dtype, flag: str = "--vae"
) -> AutoencoderKLCausal3D:
    """The VAE in ``path``, in eval mode, frozen, and for inference: it reuses its buffers (``vae.reuse_buffers(False)`` for
    gradients with respect to inputs).

    Args:
        path: .safetensors or .pt (also inside ``state_dict`` and under a prefix such as ``vae.``), in the official names or
            those that ComfyUI saves, also beside other models; or a folder with one of them or with a pipeline of diffusers.
        dtype: of the weights and the computation; inputs of ``encode`` and ``decode`` must have it too.
        flag: how messages call the path.

    Raises:
        UserError: the file is missing, damaged, incomplete or something else than a HunyuanVideo VAE; memory does not suffice.
    """
    checkpoint, vae = _open_vae(path, flag)
    with explain_out_of_memory("loading the VAE", "close other programs that use this memory", torch.device(device)):
        load_weights(vae, checkpoint, device=device, dtype_of=lambda name: dtype, progress="loading the VAE")
    vae.reuse_buffers()
    return vae.eval()


def check_vae_file(path: str | os.PathLike[str], flag: str = "--vae") -> VAEConfig:
    """The sizes of a VAE; a file or folder that is no whole one is refused. Reads only headers.

    Raises:
        UserError: as ``load_vae``.
    """
    return _open_vae(path, flag)[1].config


def _open_vae(path: str | os.PathLike[str], flag: str) -> tuple[Checkpoint, AutoencoderKLCausal3D]:
    """The tensors under their official names, and the network that they fill exactly, on the meta device."""
    checkpoint = open_checkpoint_of(Kind.VAE, path, flag)
    checkpoint, _ = official_names(checkpoint, VAE_LAYOUTS, "encoder.conv_in.conv.weight")
    config = _config_beside(checkpoint.path, vae_config_from_shapes(checkpoint.shapes, f"{flag} {path}"))
    with torch.device("meta"):
        vae = AutoencoderKLCausal3D(config)
    require_same_tensors(vae, checkpoint)
    return checkpoint, vae


def vae_config_from_shapes(shapes: Mapping[str, tuple[int, ...]], where: str = "the VAE") -> VAEConfig:
    """The sizes of a VAE from the shapes of its weights.

    Shapes do not tell the number of norm groups: it is assumed to be the published 32, or the largest power of two that
    divides every width where 32 does not.

    Raises:
        UserError: names ``where``; there are not the four blocks that 8x and 4x compression need.
    """
    names = [f"encoder.down_blocks.{index}.resnets.0.conv1.conv.weight" for index in range(4)]
    widths = [next(iter(shapes.get(name, ())), 0) for name in names]
    if 0 in widths:
        raise UserError(
            f"{where} lacks the four encoder blocks of a HunyuanVideo VAE. Fetch the file again, or give the right one."
        )
    layers = {match[1] for name in shapes if (match := re.match(r"encoder\.down_blocks\.0\.resnets\.(\d+)\.", name))}
    groups = LARGEST_NORM_GROUPS
    while any(width % groups for width in widths):
        groups //= 2
    return VAEConfig(block_out_channels=tuple(widths), layers_per_block=len(layers), norm_num_groups=groups)


def _config_beside(path: Path, inferred: VAEConfig) -> VAEConfig:
    """``inferred`` with the norm groups of the ``config.json`` in or beside ``path``.

    A ``config.json`` that describes something else than a VAE of these sizes is passed over, and that is logged.

    Raises:
        UserError: the file is not readable JSON, or asks for what this VAE cannot do.
    """
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not file.is_file():
        return inferred
    try:
        entries = json.loads(read_text(file, "the VAE's configuration"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not readable JSON ({error}). Fetch it again, or move it away from the VAE.") from error
    sizes = {"block_out_channels": list(inferred.block_out_channels), "layers_per_block": inferred.layers_per_block}
    if not isinstance(entries, dict) or any(entries.get(name) != size for name, size in sizes.items()):
        logger.warning("%s does not describe the VAE in %s and is not used; %s is assumed", file, path, inferred)
        return inferred
    if (factor := entries.get("scaling_factor", SCALING_FACTOR)) != SCALING_FACTOR:
        raise UserError(f"{file}: scaling_factor is {factor!r}, but latents are multiplied by {SCALING_FACTOR} everywhere.")
    groups = entries.get("norm_num_groups", inferred.norm_num_groups)
    if not isinstance(groups, int) or groups < 1 or any(width % groups for width in inferred.block_out_channels):
        raise UserError(f"{file}: norm_num_groups {groups!r} does not divide the widths {inferred.block_out_channels}.")
    return replace(inferred, norm_num_groups=groups)
