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
from hunyuan_model.checkpoints.scales import require_scales, scale_of, scaled_without_scale
from hunyuan_model.quantization.formats import FP8_DTYPES
from utils.errors import UserError

SUFFIXES = (".pt", ".safetensors")
SHARED_NAME = "fp8_map"  # under which the map is handed around alone

_BLOCK = re.compile(r"(double|single)_blocks\.")


def read_scales_beside(checkpoint: Checkpoint, flag: str) -> dict[str, torch.Tensor]:
    """The scales (rows or 1, groups of inputs) float32 of the weights in ``checkpoint``, by official name.

    Those it has already, or those of the map beside its file; none for weights that are full precision or merely cast.

    Raises:
        UserError: the map cannot be read, lacks a scale, or holds one that cannot be its weight's; the weights are meant with
            scales, and there are none.
    """
    quantized = [name for name, dtype in checkpoint.dtypes.items() if dtype in FP8_DTYPES]
    path = None if checkpoint.scales or not quantized else _find_map(checkpoint)
    if path is None:
        require_scales(checkpoint, f"Fetch {_stem(checkpoint.path)}_map.pt into its folder, or {_INSTEAD}.")
        return dict(checkpoint.scales)
    found = open_checkpoint(path, f"the map of scales beside {flag}")
    scales = {}
    for key in found.shapes:
        block = _BLOCK.search(key)  # the map names the layer of a weight, perhaps under a prefix
        name = (key[block.start() :] if block else key).removesuffix(".weight") + ".weight"
        if name not in checkpoint.shapes:
            continue
        scale, shape = scale_of(found.get(key), checkpoint.shapes[name]), checkpoint.shapes[name]
        if scale is None:
            raise UserError(
                f"{path} holds under {key} a tensor of the shape {found.shapes[key]} that is no scale of a weight {shape}: one "
                "finite number is expected, or one for each row. Fetch it again."
            )
        scales[name] = scale
    missing = [name for name in quantized if name not in scales]
    if missing:
        raise UserError(
            f"{path} lacks the scales of {len(missing)} float8 weights in {flag} {checkpoint.path}, such as {missing[0]}. "
            "Fetch the two files again from one source, or move the map away if the weights are meant without scales."
        )
    return scales


_INSTEAD = "use a file in bfloat16, or one that was merely cast to float8"


def _own_maps(path: Path) -> list[Path]:
    """Where the map of the file ``path`` may be; the one of its own format first."""
    suffixes = sorted(SUFFIXES, key=lambda suffix: suffix != path.suffix)
    return [path.with_name(f"{_stem(path)}_map{suffix}") for suffix in suffixes]


def _stem(path: Path) -> str:
    return path.stem if path.suffix in SUFFIXES else path.name


def _find_map(checkpoint: Checkpoint) -> Path | None:
    """The map with the name of the file; else one under the shared name, if the weights are meant with one."""
    path = checkpoint.path
    own = next((map_path for map_path in _own_maps(path) if os.path.isfile(map_path)), None)
    if own is not None or not scaled_without_scale(checkpoint):
        return own
    folder = path if path.is_dir() else path.parent
    shared = (folder / f"{SHARED_NAME}{suffix}" for suffix in SUFFIXES)
    return next((map_path for map_path in shared if os.path.isfile(map_path)), None)
