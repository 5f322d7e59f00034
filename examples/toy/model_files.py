"""Where the parts of a small model lie in its folder, and writing them in the layouts of the published model."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

import hunyuan_model
from hunyuan_model.vae.model import AutoencoderKLCausal3D
from utils.errors import UserError
from utils.files import atomic_path
from utils.safetensors_io import save_tensors

FOLDER = Path(__file__).resolve().parent
"""That of the shipped model."""


@dataclass(frozen=True)
class ModelFiles:
    """The four parts, as the flags --dit, --vae, --text_encoder1 and --text_encoder2 take them."""

    dit: Path
    vae: Path
    text_encoder1: Path
    text_encoder2: Path


def files_in(folder: Path) -> ModelFiles:
    """The places of the parts in ``folder``, whether they exist or not."""
    return ModelFiles(folder / "dit.safetensors", folder / "vae", folder / "text_encoder", folder / "text_encoder_2")


def require_model(folder: str | os.PathLike[str] = FOLDER) -> ModelFiles:
    """The parts in ``folder``; reads only headers.

    Raises:
        UserError: the folder or a part of it is missing, damaged or something else.
    """
    folder = Path(folder)
    files = files_in(folder)
    missing = [path.name for path in vars(files).values() if not path.exists()]
    if missing:
        raise UserError(
            f"{folder} is not a folder with a toy model: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing. "
            "Give a folder with dit.safetensors, vae, text_encoder and text_encoder_2."
        )
    hunyuan_model.check_transformer_file(files.dit)
    hunyuan_model.check_vae_file(files.vae)
    hunyuan_model.check_text_encoder_files(files.text_encoder1, files.text_encoder2)
    return files


def write_vae(vae: AutoencoderKLCausal3D, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Weights and config.json under the names of the published model; the configuration, written last, completes it."""
    config = {
        "_class_name": type(vae).__name__,
        "act_fn": "silu",
        "block_out_channels": list(vae.config.block_out_channels),
        "in_channels": vae.config.in_channels,
        "latent_channels": vae.config.latent_channels,
        "layers_per_block": vae.config.layers_per_block,
        "norm_num_groups": vae.config.norm_num_groups,
        "out_channels": vae.config.out_channels,
        "scaling_factor": vae.config.scaling_factor,
    }
    weights = {name: value.to(dtype) for name, value in vae.state_dict().items()}
    save_tensors(folder / "diffusion_pytorch_model.safetensors", weights)
    with atomic_path(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_text_encoder(model: PreTrainedModel, folder: Path, prefix: str) -> None:
    """Weights and config.json; every key starts with ``prefix``, as published, whichever release of transformers runs here."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    tensors = {prefix + name.removeprefix(prefix): tensor for name, tensor in model.state_dict().items()}
    save_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
