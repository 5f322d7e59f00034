"""Cache files: their names, and what is inside.

Latents lie in ``{stem}_{W:04d}x{H:04d}_hv.safetensors`` for a picture and
``{stem}_{start:05d}-{frames:03d}_{W:04d}x{H:04d}_hv.safetensors`` for a window of a clip, W and H being those of the source.
Other tools write the size of the bucket there for clips, so a size is always read from the tensor and never from a name.
Text encoder outputs lie in ``{stem}_hv_te.safetensors``, one per item. A stem may hold anything a file name may, so names
are parsed from their end. What made a file stands in its metadata, see ``records.py``.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dataset.config import DatasetConfig
from dataset.items import Item
from dataset.media.frames import Window
from utils.devices import dtype_name
from utils.errors import UserError, name_some
from utils.files import is_temporary
from utils.safetensors_io import read_header, read_tensor, read_tensors, save_tensors

logger = logging.getLogger(__name__)

ARCHITECTURE = "hunyuan_video"
FORMAT_VERSION = "1.0.0"
SPATIAL_FACTOR = 8
TEMPORAL_FACTOR = 4

CAPTION = "caption1"
TEXT_SUFFIX = "_hv_te.safetensors"
IMAGE_NAME = re.compile(r"(?P<stem>.+)_(\d{4,})x(\d{4,})_hv\.safetensors", re.DOTALL)
VIDEO_NAME = re.compile(r"(?P<stem>.+)_(?P<start>\d{5,})-(?P<frames>\d{3,})_(\d{4,})x(\d{4,})_hv\.safetensors", re.DOTALL)

LatentShape = tuple[int, int, int, int]  # channels, frames, height, width
CacheKey = tuple[str, Window | None]  # stem; window for clips


class NonFiniteError(UserError):
    """A tensor to be cached holds NaN or infinity; one item's trouble, unlike a disk that is full."""


@dataclass(frozen=True)
class TextStates:
    """What both text encoders gave for one caption.

    Attributes:
        llm: (L, D) states of encoder 1; rows where ``llm_mask`` is 0 mean nothing.
        llm_mask: (L,) int64, 1 for the rows of the caption.
        clip: (D2,) pooled output of encoder 2.
        caption: the caption it was made from, None if the file does not say.
    """

    llm: torch.Tensor
    llm_mask: torch.Tensor
    clip: torch.Tensor
    caption: str | None


@dataclass(frozen=True)
class CacheListing:
    """The cache files of one dataset.

    Attributes:
        latents: by (stem, window), window None for pictures; several files where tools or runs named one thing differently.
        texts: by stem.
    """

    latents: dict[CacheKey, list[Path]] = field(default_factory=dict)
    texts: dict[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class CachedItem:
    """One picture or one window of a clip, ready for training."""

    stem: str
    window: Window | None
    latents_path: Path
    text_path: Path
    shape: LatentShape
    prior_preservation: bool = False


def latent_cache_path(item: Item, original_size: tuple[int, int], window: Window | None = None) -> Path:
    """Where the latents of a picture (``window`` None) or of a window (start, frames) go. ``original_size``: (W, H)."""
    width, height = original_size
    frames = "" if window is None else f"_{window[0]:05d}-{window[1]:03d}"
    return item.dataset.cache_directory / f"{item.stem}{frames}_{width:04d}x{height:04d}_hv.safetensors"


def text_cache_path(item: Item) -> Path:
    """Where the text encoder outputs of an item go: one file for a clip, however many windows are cut from it."""
    return item.dataset.cache_directory / f"{item.stem}{TEXT_SUFFIX}"


def latent_shape_for(bucket: tuple[int, int], frames: int = 1, channels: int = 16) -> LatentShape:
    """Shape of the latents of ``frames`` (4n+1) frames at ``bucket`` (W, H) pixels."""
    width, height = bucket
    return channels, (frames - 1) // TEMPORAL_FACTOR + 1, height // SPATIAL_FACTOR, width // SPATIAL_FACTOR


def bucket_of(shape: LatentShape) -> tuple[int, int, int]:
    """(W, H, frames) in pixels of latents of ``shape``."""
    _, frames, height, width = shape
    return width * SPATIAL_FACTOR, height * SPATIAL_FACTOR, (frames - 1) * TEMPORAL_FACTOR + 1


def list_caches(dataset: DatasetConfig) -> CacheListing:
    """The cache files in a dataset's cache directory, sorted; empty if the directory does not exist."""
    listing = CacheListing()
    for path in _safetensors_files(dataset.cache_directory):
        if path.name.endswith(TEXT_SUFFIX):
            listing.texts[path.name.removesuffix(TEXT_SUFFIX)] = path
        elif dataset.kind == "image" and (match := IMAGE_NAME.fullmatch(path.name)):
            listing.latents.setdefault((match["stem"], None), []).append(path)
        elif dataset.kind == "video" and (match := VIDEO_NAME.fullmatch(path.name)):
            key = (match["stem"], (int(match["start"]), int(match["frames"])))
            listing.latents.setdefault(key, []).append(path)
    return listing


def _safetensors_files(directory: Path) -> Iterator[Path]:
    if os.path.isdir(directory):
        try:
            names = {path.name for path in directory.iterdir() if path.suffix == ".safetensors" and not is_temporary(path)}
        except OSError as error:
            raise UserError(f"cannot list the cache_directory {directory}: {error.strerror or error}.") from error
        # macOS leaves a "._x" beside an x that it copies to a foreign disk
        yield from (directory / name for name in sorted(names) if not (name.startswith("._") and name[2:] in names))


def newest(paths: Collection[Path]) -> Path:
    """Of several caches of one thing, the one that training uses."""
    return max(paths, key=lambda path: (_modified(path), path.name))


def newest_latents(listing: CacheListing) -> dict[CacheKey, Path]:
    """The latent cache of each (stem, window), sorted. Where several files stand for one, the newest is taken, with a warning.

    That happens when a source was replaced by one of another size, or when another tool named its files by the bucket.
    """
    chosen = {}
    for key, paths in sorted(listing.latents.items(), key=lambda entry: (entry[0][0], entry[0][1] or (0, 0))):
        chosen[key] = newest(paths)
        if len(paths) > 1:
            others = name_some(path.name for path in paths if path != chosen[key])
            logger.warning("%s is the newest of its kind and is used; delete %s beside it.", chosen[key], others)
    return chosen


def _modified(path: Path) -> int:
    """Nanoseconds; -1 for a link that leads nowhere, which whoever reads the file will name."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return -1


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
    save_tensors(path, {name: latents}, {**(record or {}), **_common_metadata(), **metadata})


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
    save_tensors(path, tensors, {**(record or {}), **_common_metadata(), CAPTION: caption})


def _common_metadata() -> dict[str, str]:
    return {"architecture": ARCHITECTURE, "format_version": FORMAT_VERSION}


def read_latent_shape(path: Path) -> LatentShape:
    """(C, F, H, W) of the latents in a cache file, from its header alone. Errors as in ``read_latent_header``."""
    return read_latent_header(path)[0]


def read_latent_header(path: Path) -> tuple[LatentShape, dict[str, str]]:
    """Shape (C, F, H, W) and metadata of a latent cache, from its header alone.

    Raises:
        UserError: unreadable, of another model, or without one such tensor.
    """
    header = read_header(path, "latent cache")
    _check_architecture(path, header.metadata)
    name = _tensor_name(path, header.shapes, "latents_", "cache_latents.py")
    return _check_latent_shape(path, header.shapes[name]), header.metadata


def read_latents(path: Path) -> torch.Tensor:
    """The latents (C, F, H, W) of a cache file, in the dtype stored.

    Raises:
        UserError: unreadable, of another model, without latents, or with NaN or infinity in them.
    """
    file = read_tensors(path, "latent cache")
    _check_architecture(path, file.metadata)
    latents = file.tensors[_tensor_name(path, file.tensors, "latents_", "cache_latents.py")]
    _check_latent_shape(path, tuple(latents.shape))
    _refuse_other_than_floats(path, latents, "cache_latents.py")
    _refuse_non_finite(path, latents, "cache_latents.py")
    return latents


def read_text(path: Path) -> TextStates:
    """The text encoder outputs in a cache file, in the dtypes stored.

    Raises:
        UserError: unreadable, of another model, incomplete, or with NaN or infinity in rows that count.
    """
    script = "cache_text_encoder_outputs.py"
    file = read_tensors(path, "text encoder output cache")
    _check_architecture(path, file.metadata)
    llm = file.tensors[_tensor_name(path, file.tensors, "llm_", script)]
    clip = file.tensors[_tensor_name(path, file.tensors, "clipL_", script)]
    _check_text_shapes(path, {name: tuple(tensor.shape) for name, tensor in file.tensors.items()})
    mask = file.tensors["llm_mask"].to(torch.int64)
    for states in (llm[mask.bool()], clip):
        _refuse_other_than_floats(path, states, script)
        _refuse_non_finite(path, states, script)
    return TextStates(llm, mask, clip, file.metadata.get(CAPTION))


def read_text_widths(path: Path) -> tuple[int, int]:
    """Widths (D, D2) of the token states and of the pooled output in a cache file, from its header alone.

    Raises:
        UserError: unreadable, of another model, or incomplete.
    """
    header = read_header(path, "text encoder output cache")
    _check_architecture(path, header.metadata)
    return _check_text_shapes(path, header.shapes)


def read_text_length(path: Path) -> int:
    """How many rows of the token states in a cache file count; reads its mask alone.

    Raises:
        UserError: unreadable, or without a mask.
    """
    mask = read_tensor(path, "llm_mask", "text encoder output cache")
    if mask is None:
        raise UserError(
            f"{path} has no llm_mask, which tells the rows of the caption from padding. Delete it and run "
            "cache_text_encoder_outputs.py again."
        )
    return int(mask.bool().sum())


def read_text_metadata(path: Path) -> dict[str, str]:
    """The metadata of a text cache, from its header alone; ``CAPTION`` is what it was made from. UserError if unreadable."""
    return read_header(path, "text encoder output cache").metadata


def _check_latent_shape(path: Path, shape: tuple[int, ...]) -> LatentShape:
    if len(shape) != 4 or 0 in shape or shape[2] % 2 or shape[3] % 2:
        raise UserError(
            f"{path} holds latents of shape {shape}; expected (16, F, H, W) with even H and W. "
            "Delete it and run cache_latents.py again."
        )
    return shape


def _check_text_shapes(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    """Refuse text encoder outputs that do not fit together; returns their widths (D, D2)."""
    script = "cache_text_encoder_outputs.py"
    llm = shapes[_tensor_name(path, shapes, "llm_", script)]
    clip = shapes[_tensor_name(path, shapes, "clipL_", script)]
    mask = shapes.get("llm_mask")
    if len(llm) != 2 or len(clip) != 1:
        raise UserError(
            f"{path} holds text states of shapes {llm} and {clip}; expected (L, D) and (D,). Delete it and run {script} again."
        )
    if mask is None:
        raise UserError(
            f"{path} has no llm_mask, which tells the rows of the caption from padding. Delete it and run {script} again."
        )
    if mask != llm[:1]:
        entries = "x".join(map(str, mask)) or "no"
        raise UserError(f"{path}: llm_mask has {entries} entries for {llm[0]} rows. Delete it and run {script} again.")
    return llm[1], clip[0]


def _check_architecture(path: Path, metadata: dict[str, str]) -> None:
    found = metadata.get("architecture", ARCHITECTURE)
    if found != ARCHITECTURE:
        raise UserError(f"{path} is a cache for {found!r}, not for {ARCHITECTURE!r}; use another cache_directory for this model.")


def _tensor_name(path: Path, names: Collection[str], prefix: str, script: str) -> str:
    found = [name for name in names if name.startswith(prefix) and not name.endswith("_mask")]
    if len(found) != 1:
        raise UserError(
            f"{path} holds {len(found)} tensors called {prefix}*, expected one (it has: {', '.join(names) or 'none'}). "
            f"Delete it and run {script} again."
        )
    return found[0]


def _refuse_other_than_floats(path: Path, tensor: torch.Tensor, script: str) -> None:
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise UserError(
            f"{path} holds {dtype_name(tensor.dtype)} values, which are neither latents nor text states. "
            f"Delete it and run {script} again."
        )


def _refuse_non_finite(path: Path, tensor: torch.Tensor, script: str) -> None:
    if not torch.isfinite(tensor).all():
        raise UserError(f"{path} holds NaN or infinity. Delete it and run {script} again, with a wider dtype if it comes back.")
