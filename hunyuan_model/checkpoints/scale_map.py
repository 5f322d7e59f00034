"""The scales of the published float8 transformer, which stand in a second file beside it.

``mp_rank_00_model_states_fp8.pt`` comes with ``mp_rank_00_model_states_fp8_map.pt``: the scale of a Linear layer under the
layer's name, one number, by which what is stored of its weight is multiplied. Without them the weights mean something else.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

from hunyuan_model.checkpoints.reading import Checkpoint, open_checkpoint
from hunyuan_model.quantization.formats import FP8_DTYPES
from utils.errors import UserError

_BLOCK = re.compile(r"(double|single)_blocks\.")


def scale_map_path(path: Path) -> Path:
    """Where the scales of the weights in ``path`` would stand."""
    return path.with_name(f"{path.stem}_map{path.suffix}")


def read_scales_beside(checkpoint: Checkpoint, flag: str) -> dict[str, torch.Tensor]:
    """The scales (rows or 1, 1) float32 of the weights in ``checkpoint``, by name; none where it is not such a pair of files.

    float8 weights without a second file are taken for what they are: plainly cast ones.

    Raises:
        UserError: the second file cannot be read, lacks a scale, or holds one that cannot be its weight's.
    """
    path = scale_map_path(checkpoint.path)
    quantized = [name for name, dtype in checkpoint.dtypes.items() if dtype in FP8_DTYPES]
    if not quantized or not os.path.isfile(path):
        return {}
    found = open_checkpoint(path, f"the map of scales beside {flag}")
    scales = {}
    for key in found.shapes:
        name = _weight_name(key)
        if name in checkpoint.shapes:
            scales[name] = _as_scale(found.get(key), key, checkpoint.shapes[name], path)
    missing = [name for name in quantized if name not in scales]
    if missing:
        raise UserError(
            f"{path} lacks the scales of {len(missing)} float8 weights in {flag} {checkpoint.path}, such as {missing[0]}. "
            "Fetch the two files again from one source, or move the map away if the weights are meant without scales."
        )
    return scales


def _weight_name(key: str) -> str:
    """The weight that an entry of the map belongs to: the map names its layer, perhaps under a prefix."""
    block = _BLOCK.search(key)
    layer = key[block.start() :] if block else key
    return layer if layer.endswith(".weight") else f"{layer}.weight"


def _as_scale(scale: torch.Tensor, key: str, shape: tuple[int, ...], path: Path) -> torch.Tensor:
    scale = scale.float()
    if scale.numel() not in (1, shape[0]) or len(shape) != 2 or not torch.isfinite(scale).all():
        raise UserError(
            f"{path} holds under {key} a tensor of the shape {tuple(scale.shape)} that is no scale of a weight {shape}: one finite "
            "number is expected, or one for each row. Fetch it again."
        )
    return scale.reshape(-1, 1)
