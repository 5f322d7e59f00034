"""The scales of the published float8 transformer, which stand in a second file beside it.

``mp_rank_00_model_states_fp8.pt`` comes with ``mp_rank_00_model_states_fp8_map.pt``: the scale of a Linear layer under the
layer's name, one number, by which what is stored of its weight is multiplied. Without them the weights mean something else.
"""

from __future__ import annotations

import os
import re

import torch

from hunyuan_model.checkpoints.reading import Checkpoint, open_checkpoint
from hunyuan_model.quantization.formats import FP8_DTYPES
from utils.errors import UserError

_BLOCK = re.compile(r"(double|single)_blocks\.")


def read_scales_beside(checkpoint: Checkpoint, flag: str) -> dict[str, torch.Tensor]:
    """The scales (rows or 1, 1) float32 of the weights in ``checkpoint``, by name; none where it is not such a pair of files.

    float8 weights without a second file are taken for what they are: plainly cast ones.

    Raises:
        UserError: the second file cannot be read, lacks a scale, or holds one that cannot be its weight's.
    """
    path = checkpoint.path.with_name(f"{checkpoint.path.stem}_map{checkpoint.path.suffix}")
    quantized = [name for name, dtype in checkpoint.dtypes.items() if dtype in FP8_DTYPES]
    if not quantized or not os.path.isfile(path):
        return {}
    found = open_checkpoint(path, f"the map of scales beside {flag}")
    scales = {}
    for key in found.shapes:
        block = _BLOCK.search(key)  # the map names the layer of a weight, perhaps under a prefix
        name = (key[block.start() :] if block else key).removesuffix(".weight") + ".weight"
        if name not in checkpoint.shapes:
            continue
        scale, shape = found.get(key).float(), checkpoint.shapes[name]
        if scale.numel() not in (1, shape[0]) or len(shape) != 2 or not torch.isfinite(scale).all():
            raise UserError(
                f"{path} holds under {key} a tensor of the shape {tuple(scale.shape)} that is no scale of a weight {shape}: one "
                "finite number is expected, or one for each row. Fetch it again."
            )
        scales[name] = scale.reshape(-1, 1)
    missing = [name for name in quantized if name not in scales]
    if missing:
        raise UserError(
            f"{path} lacks the scales of {len(missing)} float8 weights in {flag} {checkpoint.path}, such as {missing[0]}. "
            "Fetch the two files again from one source, or move the map away if the weights are meant without scales."
        )
    return scales
