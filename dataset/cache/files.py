"""What is inside cache files: tensors and metadata, written whole or not at all, and checked when read.

``names.py`` has the names of the files, ``records.py`` the part of the metadata that records what made a file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from dataset.media.frames import Window
from utils.devices import dtype_name
from utils.errors import UserError
from utils.safetensors_io import read_header, read_tensor, read_tensors, save_tensors

ARCHITECTURE = "hunyuan_video"
COMMON_METADATA = {"architecture": ARCHITECTURE, "format_version": "1.0.0"}
CAPTION = "caption1"
SPATIAL_FACTOR = 8
TEMPORAL_FACTOR = 4

LATENT_FILE, LATENT_SCRIPT = "latent cache", "cache_latents.py"
TEXT_FILE, TEXT_SCRIPT = "text encoder output cache", "cache_text_encoder_outputs.py"

LatentShape = tuple[int, int, int, int]  # channels, frames, height, width


class NonFiniteError(UserError):
    """A tensor to be cached holds NaN or infinity; one item's trouble, unlike a disk that is full."""


@dataclass(frozen=True)
class TextStates:
    """What both text encoders gave for one caption.

    Attributes:
        llm: (L, D) states of encoder 1; rows where ``llm_mask`` is 0 mean nothing.
        llm_mask: (L,) int64, 1 for the rows of the caption.
        clip: (D2,) pooled output of encoder 2.
        caption: the caption it was made from, None if the file has none.
    """

    llm: torch.Tensor
    llm_mask: torch.Tensor
    clip: torch.Tensor
    caption: str | None


@dataclass(frozen=True)
class CachedItem:
    """One picture or one window of a clip, ready for training."""

    stem: str
    window: Window | None
    latents_path: Path
    text_path: Path
    shape: LatentShape
    prior_preservation: bool = False


def latent_shape_for(bucket: tuple[int, int], frames: int = 1, channels: int = 16) -> LatentShape:
    """Shape of the latents of ``frames`` (4n+1) frames at ``bucket`` (W, H) pixels."""
    width, height = bucket
    return channels, (frames - 1) // TEMPORAL_FACTOR + 1, height // SPATIAL_FACTOR, width // SPATIAL_FACTOR


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
    """Save one sample of the latents, not multiplied by the VAE's scaling factor.

    Args:
        latents: (C, F, H, W), any floating dtype.
        original_size: (W, H) of the source.
        frame_count: frames of the window, for clips.
        record: what made them, see ``records.py``.

    Raises:
        NonFiniteError: the latents hold NaN or infinity.
        UserError: the file cannot be written.
    """
    if not torch.isfinite(latents).all():
        raise NonFiniteError(
            f"the latents for {path.name} hold NaN or infinity and were not saved; the VAE overflowed: "
            "try --vae_dtype bfloat16 or float32."
        )
    _, frames, height, width = latents.shape
    metadata = {"width": str(original_size[0]), "height": str(original_size[1])}
    if frame_count is not None:
        metadata["frame_count"] = str(frame_count)
    name = f"latents_{frames}x{height}x{width}_{dtype_name(latents.dtype)}"
    save_tensors(path, {name: latents}, {**(record or {}), **COMMON_METADATA, **metadata})


def save_text(
    path: Path,
    llm: torch.Tensor,
    llm_mask: torch.Tensor,
    clip: torch.Tensor,
    caption: str,
    record: Mapping[str, str] | None = None,
) -> None:
    """Save the outputs of both text encoders for one caption: llm (L, D), llm_mask (L,), clip (D2,).

    ``record``: what made them, see ``records.py``.

    Raises:
        NonFiniteError: a value is NaN or infinite.
        UserError: the file cannot be written.
    """
    if not (torch.isfinite(llm).all() and torch.isfinite(clip).all()):
        raise NonFiniteError(
            f"the text encoder outputs for {path.name} hold NaN or infinity and were not saved; "
            "try --text_encoder_dtype bfloat16 or float32."
        )
    tensors = {
        f"llm_{dtype_name(llm.dtype)}": llm,
        "llm_mask": llm_mask.to(torch.int64),
        f"clipL_{dtype_name(clip.dtype)}": clip,
    }
    save_tensors(path, tensors, {**(record or {}), **COMMON_METADATA, CAPTION: caption})


def read_latent_header(path: Path) -> tuple[LatentShape, dict[str, str]]:
    """Shape (C, F, H, W) and metadata of a latent cache, from its header alone.

    Raises:
        UserError: unreadable, of another model, or without one such tensor.
    """
    header = read_header(path, LATENT_FILE)
    _check_architecture(path, header.metadata)
    name = _tensor_name(path, header.shapes, "latents_", LATENT_SCRIPT)
    return _check_latent_shape(path, header.shapes[name]), header.metadata


def read_latent_shape(path: Path) -> LatentShape:
    """(C, F, H, W) of the latents in a cache file. As ``read_latent_header``."""
    return read_latent_header(path)[0]


def read_latents(path: Path) -> torch.Tensor:
    """The latents (C, F, H, W) of a cache file, in the dtype stored.

    Raises:
        UserError: unreadable, of another model, without latents, or with NaN or infinity in them.
    """
    file = read_tensors(path, LATENT_FILE)
    _check_architecture(path, file.metadata)
    latents = file.tensors[_tensor_name(path, file.tensors, "latents_", LATENT_SCRIPT)]
    _check_latent_shape(path, tuple(latents.shape))
    _check_values(path, latents, LATENT_SCRIPT)
    return latents


def read_text(path: Path) -> TextStates:
    """The text encoder outputs in a cache file, in the dtypes stored.

    Raises:
        UserError: unreadable, of another model, incomplete, or with NaN or infinity in rows that count.
    """
    file = read_tensors(path, TEXT_FILE)
    _check_architecture(path, file.metadata)
    _check_text_shapes(path, {name: tuple(tensor.shape) for name, tensor in file.tensors.items()})
    llm, clip = (file.tensors[_tensor_name(path, file.tensors, prefix, TEXT_SCRIPT)] for prefix in ("llm_", "clipL_"))
    mask = file.tensors["llm_mask"].to(torch.int64)
    _check_values(path, llm[mask.bool()], TEXT_SCRIPT)
    _check_values(path, clip, TEXT_SCRIPT)
    return TextStates(llm, mask, clip, file.metadata.get(CAPTION))


def read_text_widths(path: Path) -> tuple[int, int]:
    """Widths (D, D2) of the token states and of the pooled output in a cache file, from its header alone.

    Raises:
        UserError: unreadable, of another model, or incomplete.
    """
    header = read_header(path, TEXT_FILE)
    _check_architecture(path, header.metadata)
    return _check_text_shapes(path, header.shapes)


def read_text_length(path: Path) -> int:
    """Number of rows of the token states that belong to the caption; reads the mask alone.

    Raises:
        UserError: unreadable, or without a mask.
    """
    mask = read_tensor(path, "llm_mask", TEXT_FILE)
    if mask is None:
        raise UserError(f"{path} has no llm_mask. {_make_again(TEXT_SCRIPT)}")
    return int(mask.bool().sum())


def read_text_metadata(path: Path) -> dict[str, str]:
    """The metadata of a text cache, from its header alone.

    Raises:
        UserError: as ``read_text_widths``.
    """
    header = read_header(path, TEXT_FILE)
    _check_architecture(path, header.metadata)
    _check_text_shapes(path, header.shapes)
    return header.metadata


def _make_again(script: str) -> str:
    return f"Delete it and run {script} again."


def _check_architecture(path: Path, metadata: Mapping[str, str]) -> None:
    found = metadata.get("architecture", ARCHITECTURE)
    if found != ARCHITECTURE:
        raise UserError(f"{path} is a cache for {found!r}, not for {ARCHITECTURE!r}; use another cache_directory for this model.")


def _tensor_name(path: Path, names: Iterable[str], prefix: str, script: str) -> str:
    found = [name for name in names if name.startswith(prefix) and not name.endswith("_mask")]
    if len(found) != 1:
        raise UserError(
            f"{path} holds {len(found)} tensors called {prefix}*, expected one (it has: {', '.join(names) or 'none'}). "
            f"{_make_again(script)}"
        )
    return found[0]


def _check_latent_shape(path: Path, shape: tuple[int, ...]) -> LatentShape:
    if len(shape) != 4 or 0 in shape or shape[2] % 2 or shape[3] % 2:
        raise UserError(
            f"{path} holds latents of shape {shape}; expected (16, F, H, W) with even H and W. {_make_again(LATENT_SCRIPT)}"
        )
    return shape


def _check_text_shapes(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    """Refuse text encoder outputs that do not fit together; returns their widths (D, D2)."""
    llm, clip = (shapes[_tensor_name(path, shapes, prefix, TEXT_SCRIPT)] for prefix in ("llm_", "clipL_"))
    mask = shapes.get("llm_mask")
    if len(llm) != 2 or len(clip) != 1:
        wrong = f"holds text states of shapes {llm} and {clip}; expected (L, D) and (D,)"
    elif mask is None:
        wrong = "has no llm_mask"
    elif mask != llm[:1]:
        wrong = f"has a mask with {'x'.join(map(str, mask)) or 'no'} entries for {llm[0]} rows"
    else:
        return llm[1], clip[0]
    raise UserError(f"{path} {wrong}. {_make_again(TEXT_SCRIPT)}")


def _check_values(path: Path, tensor: torch.Tensor, script: str) -> None:
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise UserError(f"{path} holds {dtype_name(tensor.dtype)} values, expected floats. {_make_again(script)}")
    if not torch.isfinite(tensor).all():
        raise UserError(f"{path} holds NaN or infinity. Delete it and run {script} again; if it comes back, with float32.")
