"""The flags of the VAE. Parsing alone does not import torch."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from utils.cli.arguments import positive_int
from utils.cli.settings import settings_from

if TYPE_CHECKING:
    import torch

    from hunyuan_model.vae.memory import VAESettings

DEFAULT_TILE_SIZE = 256


def add_vae_arguments(group: argparse._ArgumentGroup, *, required: bool, tiling_switch: bool = True) -> None:
    """--vae and how it runs."""
    group.add_argument("--vae", metavar="PATH", required=required, help="VAE checkpoint: a .pt or .safetensors file, or a folder")
    group.add_argument(
        "--vae_dtype",
        metavar="DTYPE",
        help="precision of the VAE (default: float16 on CUDA, float32 on the CPU, where half is slow)",
    )
    if tiling_switch:
        group.add_argument(
            "--vae_tiling",
            action="store_true",
            help="run the VAE in overlapping spatial tiles: less memory, slower (default: only where memory is short)",
        )
    group.add_argument(
        "--vae_chunk_size",
        type=positive_int,
        metavar="N",
        help="run the VAE's 3D convolutions in chunks of N, with the same result in less memory "
        "(default: whole, or 32 where memory is short)",
    )
    group.add_argument(
        "--vae_spatial_tile_sample_min_size",
        type=positive_int,
        metavar="PIXELS",
        help="side of a spatial tile, a multiple of 32; implies tiling (default: 256 with tiling, else as free memory asks)",
    )


def vae_settings(args: argparse.Namespace, device: torch.device) -> VAESettings:
    """As the flags of ``add_vae_arguments`` say.

    Raises:
        UserError: an unknown dtype, or a tile size that the VAE cannot work with.
    """
    import torch

    from hunyuan_model.vae.memory import VAESettings
    from utils.devices import choose_dtype

    tile_size = args.vae_spatial_tile_sample_min_size or (DEFAULT_TILE_SIZE if getattr(args, "vae_tiling", False) else None)
    dtype = choose_dtype(args.vae_dtype, "--vae_dtype", device, torch.float16)
    return settings_from(VAESettings, args, vae_dtype=dtype, vae_spatial_tile_sample_min_size=tile_size)
