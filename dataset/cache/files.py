"""What is inside cache files: tensors and metadata, written whole or not at all, and checked when read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from utils.checksums import is_changed, tensors_checksum
from utils.devices import dtype_name
from utils.errors import UserError
from utils.safetensors_io import SafetensorsFile, read_header, read_tensor, read_tensors, save_tensors

ARCHITECTURE = "hunyuan_video"
COMMON_METADATA = {"architecture": ARCHITECTURE, "format_version": "1.0.0"}
CAPTION = "caption1"
CHECKSUM = "checksum"  # of the tensors; files of other tools and earlier versions have none
SPATIAL_FACTOR = 8
TEMPORAL_FACTOR = 4

LATENT_FILE, LATENT_SCRIPT = "latent cache", "cache_latents.py"
TEXT_FILE, TEXT_SCRIPT = "text encoder output cache", "cache_text_encoder_outputs.py"

LatentShape = tuple[int, int, int, int]  # channels, frames, height, width
Shapes = Mapping[str, tuple[int, ...]]


class NonFiniteError(UserError):
    """A tensor to be cached holds NaN or infinity; one item's trouble, unlike a disk that is full."""


@dataclass(frozen=True)
class TextStates:
    """What both text encoders gave for one caption, in the dtypes stored."""

    llm: torch.Tensor  # (L, D) states of encoder 1; rows where the mask is 0 mean nothing
    llm_mask: torch.Tensor  # (L,) int64, 1 for the rows of the caption
    clip: torch.Tensor  # (D2,) pooled output of encoder 2


def bucket_of(shape: LatentShape) -> tuple[int, int, int]:
    """(W, H, frames) in pixels of latents of ``shape``."""
    _, frames, height, width = shape
    return width * SPATIAL_FACTOR, height * SPATIAL_FACTOR, (frames - 1) * TEMPORAL_FACTOR + 1


def save_latents(
    path: Path,
    latents: torch.Tensor,
    original_size: tuple[int, int],
    frame_count: int | None = None,
    record: Mapping[str, str] | None = None,
) -> None:
    """Save one sample (C, F, H, W) of the latents, not multiplied by the VAE's scaling factor.

    Args:
        original_size: (W, H) of the source.
        frame_count: frames of the window, for clips.
        record: what made them, see ``records.py``.

    Raises:
        UserError: NaN or infinity in them (``NonFiniteError``), or the file cannot be written.
    """
    _require_finite(latents, f"the latents for {path.name}", "--vae_dtype")
    _, frames, height, width = latents.shape
    metadata = {"width": str(original_size[0]), "height": str(original_size[1])}
    if frame_count is not None:
        metadata["frame_count"] = str(frame_count)
    name = f"latents_{frames}x{height}x{width}_{dtype_name(latents.dtype)}"
    _save(path, {name: latents}, {**(record or {}), **metadata})


def save_text(
    path: Path,
    llm: torch.Tensor,
    llm_mask: torch.Tensor,
    clip: torch.Tensor,
    caption: str,
    record: Mapping[str, str] | None = None,
) -> None:
    """Save the outputs of both text encoders for one caption: llm (L, D), llm_mask (L,), clip (D2,). Errors as above."""
    for states in (llm, clip):
        _require_finite(states, f"the text encoder outputs for {path.name}", "--text_encoder_dtype")
    tensors = {
        f"llm_{dtype_name(llm.dtype)}": llm,
        "llm_mask": llm_mask.to(torch.int64),
        f"clipL_{dtype_name(clip.dtype)}": clip,
    }
    _save(path, tensors, {**(record or {}), CAPTION: caption})


def _save(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    tensors = {name: tensor.cpu() for name, tensor in tensors.items()}
    save_tensors(path, tensors, {**metadata, **COMMON_METADATA, CHECKSUM: tensors_checksum(tensors)})


def _read(path: Path, what: str, script: str) -> SafetensorsFile:
    """All of a file, which must hold what was saved."""
    file = read_tensors(path, what)
    if is_changed(file.metadata.get(CHECKSUM), tensors_checksum(file.tensors)):
        raise _wrong(path, "is damaged: it does not hold what was saved", script)
    return file


def _require_finite(tensor: torch.Tensor, what: str, flag: str) -> None:
    if not torch.isfinite(tensor).all():
        raise NonFiniteError(f"{what} hold NaN or infinity and were not saved; try {flag} bfloat16 or float32.")


def read_latent_header(path: Path) -> tuple[LatentShape, dict[str, str]]:
    """Shape (C, F, H, W) and metadata, from the header alone; a UserError where the file is not such a cache."""
    header = read_header(path, LATENT_FILE)
    return header.shapes[_latents_name(path, header.shapes, header.metadata)], header.metadata


def read_latents(path: Path) -> torch.Tensor:
    """The latents (C, F, H, W), in the dtype stored; a UserError also for NaN or infinity in them."""
    file = _read(path, LATENT_FILE, LATENT_SCRIPT)
    latents = file.tensors[_latents_name(path, _shapes(file.tensors), file.metadata)]
    _check_values(path, latents, LATENT_SCRIPT)
    return latents


def read_text_header(path: Path) -> tuple[tuple[int, int], dict[str, str]]:
    """Widths (D, D2) and metadata, from the header alone; a UserError where the file is not such a cache."""
    header = read_header(path, TEXT_FILE)
    llm, clip = _text_names(path, header.shapes, header.metadata)
    return (header.shapes[llm][1], header.shapes[clip][0]), header.metadata


def read_text(path: Path) -> TextStates:
    """The outputs of both text encoders; a UserError also for NaN or infinity in rows that count."""
    file = _read(path, TEXT_FILE, TEXT_SCRIPT)
    llm, clip = (file.tensors[name] for name in _text_names(path, _shapes(file.tensors), file.metadata))
    mask = file.tensors["llm_mask"].to(torch.int64)
    _check_values(path, llm[mask.bool()], TEXT_SCRIPT)
    _check_values(path, clip, TEXT_SCRIPT)
    return TextStates(llm, mask, clip)


def read_text_length(path: Path) -> int:
    """Number of rows of the token states that belong to the caption; reads the mask alone."""
    mask = read_tensor(path, "llm_mask", TEXT_FILE)
    if mask is None:
        raise _wrong(path, "has no llm_mask", TEXT_SCRIPT)
    return int(mask.bool().sum())


def _shapes(tensors: Mapping[str, torch.Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _wrong(path: Path, what: str, script: str) -> UserError:
    return UserError(f"{path} {what}. Delete it and run {script} again.")


def _latents_name(path: Path, shapes: Shapes, metadata: Mapping[str, str]) -> str:
    """The name of the latents in a file; a UserError where it is no cache of latents for this model."""
    name = _tensor_name(path, shapes, metadata, "latents_", LATENT_SCRIPT)
    shape = shapes[name]
    if len(shape) != 4 or 0 in shape or shape[2] % 2 or shape[3] % 2:
        raise _wrong(path, f"holds latents of shape {shape}; expected (16, F, H, W) with even H and W", LATENT_SCRIPT)
    return name


def _text_names(path: Path, shapes: Shapes, metadata: Mapping[str, str]) -> tuple[str, str]:
    """The names of the token states and of the pooled output; a UserError where they and the mask do not fit together."""
    names = [_tensor_name(path, shapes, metadata, prefix, TEXT_SCRIPT) for prefix in ("llm_", "clipL_")]
    llm, clip = (shapes[name] for name in names)
    if len(llm) != 2 or len(clip) != 1:
        raise _wrong(path, f"holds text states of shapes {llm} and {clip}; expected (L, D) and (D,)", TEXT_SCRIPT)
    if shapes.get("llm_mask") != llm[:1]:
        raise _wrong(path, f"has an llm_mask of shape {shapes.get('llm_mask')} for {llm[0]} rows", TEXT_SCRIPT)
    return names[0], names[1]


def _tensor_name(path: Path, shapes: Shapes, metadata: Mapping[str, str], prefix: str, script: str) -> str:
    model = metadata.get("architecture", ARCHITECTURE)
    if model != ARCHITECTURE:
        raise UserError(f"{path} is a cache for {model!r}, not for {ARCHITECTURE!r}; use another cache_directory for this model.")
    found = [name for name in shapes if name.startswith(prefix) and not name.endswith("_mask")]
    if len(found) != 1:
        has = ", ".join(shapes) or "none"
        raise _wrong(path, f"holds {len(found)} tensors called {prefix}*, expected one (it has: {has})", script)
    return found[0]


def _check_values(path: Path, tensor: torch.Tensor, script: str) -> None:
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise _wrong(path, f"holds {dtype_name(tensor.dtype)} values, expected floats", script)
    if not torch.isfinite(tensor).all():
        raise _wrong(path, "holds NaN or infinity", script)
