"""Reading safetensors headers without the tensors, and saving atomically. Imports nothing of ours but errors and files."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from utils.errors import UserError
from utils.files import atomic_path, require_file


@dataclass(frozen=True)
class SafetensorsHeader:
    """What a safetensors file says of itself: metadata, and shape by tensor name."""

    metadata: dict[str, str]
    shapes: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class SafetensorsFile:
    """Tensors with their metadata, as stored."""

    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]


def _open(path: Path):
    try:
        return safe_open(str(path), framework="pt", device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path} is not a readable safetensors file ({error}). It may be cut short: copy or make it again."
        ) from error


def read_header(path: str | os.PathLike[str], what: str = "safetensors file") -> SafetensorsHeader:
    """Metadata and shapes of a safetensors file; reads only its header.

    Raises:
        UserError: missing, a folder, or not a whole safetensors file.
    """
    with _open(require_file(path, what)) as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        return SafetensorsHeader(dict(file.metadata() or {}), shapes)


def read_tensors(path: str | os.PathLike[str], what: str = "safetensors file") -> SafetensorsFile:
    """Every tensor of a (small) safetensors file, on the CPU, with its metadata. Errors as in ``read_header``."""
    with _open(require_file(path, what)) as file:
        return SafetensorsFile({name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {}))


def save_tensors(path: str | os.PathLike[str], tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Save tensors under ``path``, which appears only when whole. Metadata values must be strings."""
    with atomic_path(path) as temporary:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, str(temporary), metadata)
