"""Scales beside the float8 weights in a file: in the spellings of the programs that write such files, and what gives away
that they are missing.

    <layer>.fp8_scale                      HunyuanVideo's own, put into the file
    <layer>.scale_weight                   ComfyUI, with a marker ``scaled_fp8``; musubi-tuner, also for each 64 inputs of a row
    <layer>.weight_scale                   newer ComfyUI, with the format in <layer>.comfy_quant or in the file's metadata
    <layer>.scale_input, .input_scale      of activations, which are not rounded here
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from hunyuan_model.checkpoints.reading import Checkpoint
from hunyuan_model.quantization.formats import FP8_DTYPES
from utils.errors import UserError

_SCALES = ("fp8_scale", "scale_weight", "weight_scale")
_BESIDE = ("scale_input", "input_scale", "comfy_quant", "scaled_fp8")  # of no use here
_FORMAT = "comfy_quant"
_SECOND_SCALE = "weight_scale_2"
_FORMATS_OF_LAYERS = "_quantization_metadata"
_MOST_FORMAT_BYTES = 4096

# Scaled codes fill float8's range, up to 448 or 57344. Weights are mostly below 1, a few of trained models reach 4.
_SCALED_FROM = 16.0
_SAMPLED_TENSORS = 48
_SAMPLES = 4  # of each tensor
_SAMPLE_VALUES = 2048


def take_scales(checkpoint: Checkpoint) -> Checkpoint:
    """A view of the weights alone, with their scales in ``scales``; the same view where the file has none.

    Raises:
        UserError: weights are stored in a format that is not read (nvfp4, mxfp8, int8), which it names; a scale has no weight or
            cannot be its weight's.
    """
    last = {name: name.rpartition(".")[2] for name in checkpoint.shapes}
    _require_float8(checkpoint, last)
    scale_names = {name: None for name in last if last[name] in _SCALES}
    beside = {name for name in last if last[name] in _BESIDE}
    metadata = {key: text for key, text in checkpoint.metadata.items() if key != _FORMATS_OF_LAYERS}
    if not scale_names and not beside:
        return checkpoint.view(checkpoint.entries, checkpoint.scales, metadata)
    scales: dict[str, Tensor] = {}
    for name in scale_names:
        weight = name.removesuffix(last[name]) + "weight"
        if weight not in checkpoint.shapes:
            raise UserError(f"{checkpoint.what} {checkpoint.path} holds {name} without a weight that it belongs to. {_COPY_AGAIN}")
        if weight in scales:
            raise UserError(f"{checkpoint.what} {checkpoint.path} holds two scales of {weight}, one as {name}. {_COPY_AGAIN}")
        scales[weight] = _scale(checkpoint, name, weight)
    entries = {name: entry for name, entry in checkpoint.entries.items() if name not in scale_names and name not in beside}
    return checkpoint.view(entries, scales, metadata)


_COPY_AGAIN = "Copy or download it again."


def _scale(checkpoint: Checkpoint, name: str, weight: str) -> Tensor:
    shape, dtype = checkpoint.shapes[weight], checkpoint.dtypes[weight]
    scale = scale_of(checkpoint.get(name), shape)
    if scale is None or not dtype.is_floating_point:
        raise UserError(
            f"{checkpoint.what} {checkpoint.path} holds {name} {checkpoint.shapes[name]}, which is no scale of {weight} {shape} "
            f"({str(dtype).removeprefix('torch.')}): positive numbers are expected, one for float8 weights, for each row, or for "
            "each of equal groups of a row's inputs."
        )
    return scale


def scale_of(stored: Tensor, shape: Sequence[int]) -> Tensor | None:
    """A stored scale as float32 (rows or 1, groups of inputs) for a weight of ``shape``; None if it cannot be its scale."""
    if len(shape) != 2 or not stored.is_floating_point():
        return None
    rows, inputs = shape
    scale, sizes = stored.float(), tuple(stored.shape)
    if not torch.isfinite(scale).all() or (scale < 0).any() or not scale.any():
        return None
    if scale.numel() in (1, rows):
        return scale.reshape(-1, 1)
    if len(sizes) in (2, 3) and sizes[0] == rows and sizes[2:] in ((), (1,)) and sizes[1] and inputs % sizes[1] == 0:
        return scale.reshape(rows, sizes[1])
    return None


def _require_float8(checkpoint: Checkpoint, last: Mapping[str, str]) -> None:
    """Refuse the other formats of newer ComfyUI."""
    read = {str(dtype).removeprefix("torch.") for dtype in FP8_DTYPES}
    for layer, kind in _formats(checkpoint, last):
        if kind not in read:
            raise UserError(
                f"{checkpoint.what} {checkpoint.path} stores {layer} in the format {kind}, which is not read. "
                "Use a file of the model in float8, bfloat16, float16 or GGUF."
            )


def _formats(checkpoint: Checkpoint, last: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """(layer, format) as the file says it, beside the layers or in its metadata."""
    for name in (name for name in last if last[name] == _FORMAT):
        small = len(checkpoint.shapes[name]) == 1 and checkpoint.shapes[name][0] <= _MOST_FORMAT_BYTES
        content = bytes(checkpoint.get(name).tolist()) if small and checkpoint.dtypes[name] == torch.uint8 else b""
        yield name.removesuffix(f".{_FORMAT}"), _format(_from_json(content))
    layers = _from_json(checkpoint.metadata.get(_FORMATS_OF_LAYERS, "")).get("layers")
    for layer, described in layers.items() if isinstance(layers, dict) else ():
        yield layer, _format(described)
    if name := next((name for name in last if last[name] == _SECOND_SCALE), None):
        yield name.removesuffix(f".{_SECOND_SCALE}"), "nvfp4"


def _format(described: object) -> str:
    kind = described.get("format") if isinstance(described, dict) else None
    return kind if isinstance(kind, str) and kind.isprintable() else "unknown"


def _from_json(text: str | bytes) -> dict[str, object]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def require_scales(checkpoint: Checkpoint, advice: str) -> None:
    """Refuse float8 weights that are meant with scales where these are missing: read as they are they would be noise.

    Reads a few KB of some weights, or of those without scales where others have them.

    Args:
        advice: what to do about a file without any, a sentence.
    """
    found = scaled_without_scale(checkpoint)
    if found is None:
        return
    file = f"{checkpoint.what} {checkpoint.path}"
    if checkpoint.scales:
        raise UserError(f"{file} lacks the scale of {found}, with which its float8 values are to be multiplied. {_COPY_AGAIN}")
    raise UserError(f"{file} holds float8 weights that mean something only with scales, such as {found}, and has none. {advice}")


def scaled_without_scale(checkpoint: Checkpoint) -> str | None:
    """A float8 weight that has no scale and is meant with one, judged by a sample of the values; None if there is none.

    In a file without scales one with large values does not count: most must have them.
    """
    names = [name for name, dtype in checkpoint.dtypes.items() if dtype in FP8_DTYPES and len(checkpoint.shapes[name]) == 2]
    names = [name for name in names if name not in checkpoint.scales]
    sampled = names[:: max(1, len(names) // _SAMPLED_TENSORS)]
    scaled = [name for name in sampled if _largest_in_sample(checkpoint.pieces(name)) >= _SCALED_FROM]
    enough = bool(scaled) if checkpoint.scales else len(scaled) > len(sampled) / 2
    return scaled[0] if enough else None


def _largest_in_sample(pieces: Sequence[Tensor]) -> float:
    largest = 0.0
    for piece in pieces:
        values = piece.reshape(-1)
        for start in range(0, len(values), max(_SAMPLE_VALUES, len(values) // _SAMPLES)):
            sample = values[start : start + _SAMPLE_VALUES].float()
            largest = max(largest, sample.nan_to_num_().abs_().max().item())
    return largest
