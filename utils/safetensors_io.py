"""Reading safetensors headers without the tensors, and saving atomically. Imports nothing of ours but errors and files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from utils.errors import UserError
from utils.files import SIGNATURE_BYTES, atomic_path, foreign_content, is_torch_file, require_file

MOST_TENSORS, MOST_NAME_CHARACTERS = 1 << 16, 1000
MOST_HEADER_BYTES = 32 << 20  # names, shapes and metadata; those of the largest models have less than 1 MB

# The names of dtypes in safetensors files.
SAFETENSORS_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


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


def require_small_header(path: str | os.PathLike[str], what: str) -> None:
    """Refuse a safetensors file whose header, which is read whole, is larger than any is.

    Raises:
        UserError: says ``what`` it is.
    """
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if MOST_HEADER_BYTES < length <= os.fstat(file.fileno()).st_size:
                raise UserError(f"{what} {path} has a header of {length >> 20} MB, and at most {MOST_HEADER_BYTES >> 20} are read.")
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read: {error.strerror or error}.") from error


def require_plausible_names(names: Collection[str], path: str | os.PathLike[str], what: str) -> None:
    """Refuse a file whose tensors have more, or longer, names than those of any model: to look at them would take minutes.

    Raises:
        UserError: says ``what`` it is.
    """
    if len(names) > MOST_TENSORS or max(map(len, names), default=0) > MOST_NAME_CHARACTERS:
        raise UserError(
            f"{what} {path} holds {len(names)} tensors with names of up to {max(map(len, names))} characters; at most "
            f"{MOST_TENSORS} with {MOST_NAME_CHARACTERS} are read."
        )


@contextmanager
def _open(path: Path, framework: str = "pt") -> Iterator[safe_open]:
    """The opened file; what the library says of its header or of a tensor becomes a UserError.

    For numpy the library maps it to be read only, for torch to be written to, which a system may refuse for what is larger than
    its memory.
    """
    require_small_header(path, "safetensors file")
    try:
        with safe_open(str(path), framework=framework, device="cpu") as file:
            require_plausible_names(file.keys(), path, "safetensors file")
            yield file
    except (SafetensorError, OSError, ValueError, AttributeError) as error:  # the last for dtypes that torch lacks
        raise UserError(f"{path} is not a readable safetensors file{_what_is_wrong(path, error)}") from error


def _what_is_wrong(path: Path, error: Exception) -> str:
    """The rest of the sentence: the reason, and what to do."""
    try:
        with open(path, "rb") as file:
            start = file.read(SIGNATURE_BYTES)
    except OSError as unreadable:
        return f" ({unreadable.strerror or unreadable})."
    if is_torch_file(start):
        return ", whatever its name says: torch or another program that pickles wrote it. Save it as safetensors."
    if found := foreign_content(start):
        return f": it {found}"
    return f" ({error}). It may be cut short: copy or make it again."


def read_header(path: str | os.PathLike[str], what: str = "safetensors file") -> SafetensorsHeader:
    """Metadata and shapes of a safetensors file; reads only its header.

    Raises:
        UserError: missing, a folder, or not a whole safetensors file, also what it is instead.
    """
    with _open(require_file(path, what), "numpy") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        return SafetensorsHeader(dict(file.metadata() or {}), shapes)


def read_tensors(
    path: str | os.PathLike[str], what: str = "safetensors file", wanted: Callable[[str], bool] = lambda name: True
) -> SafetensorsFile:
    """Every tensor of a (small) safetensors file, on the CPU, with its metadata. Errors as in ``read_header``.

    Args:
        wanted: whether a tensor is read; the others are on the meta device, and empty where a shape has a zero.
    """
    with _open(require_file(path, what)) as file:
        tensors = {name: file.get_tensor(name) if wanted(name) else _unread(file.get_slice(name)) for name in file.keys()}
        return SafetensorsFile(tensors, dict(file.metadata() or {}))


def _unread(stored: Any) -> torch.Tensor:
    shape = stored.get_shape()  # one with a zero may claim sizes beyond what torch takes
    dtype = SAFETENSORS_DTYPES.get(stored.get_dtype(), torch.uint8)  # no float for those of formats that are not read
    return torch.empty((0,) if 0 in shape else shape, dtype=dtype, device="meta")


def read_tensor(path: str | os.PathLike[str], name: str, what: str = "safetensors file") -> torch.Tensor | None:
    """The tensor called ``name``, on the CPU, or None where there is none; reads no other. Errors as in ``read_header``."""
    with _open(require_file(path, what)) as file:
        return file.get_tensor(name) if name in file.keys() else None


def save_tensors(path: str | os.PathLike[str], tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Save tensors under ``path``, which appears only when whole. Metadata values must be strings.

    Raises:
        UserError: the folder cannot be written to or the disk is full; an earlier file under ``path`` is untouched.
    """
    with atomic_path(path) as temporary:
        try:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, str(temporary), metadata)
        except SafetensorError as error:  # how the library reports an I/O error while writing
            raise UserError(f"cannot write {path}: {error}. Check the folder and the free disk space.") from error


def save_tensor_stream(
    path: str | os.PathLike[str],
    layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    tensors: Iterable[tuple[str, torch.Tensor]],
    metadata: dict[str, str] | None = None,
) -> None:
    """Write a safetensors file tensor by tensor, so that a large file needs memory for one tensor only.

    Args:
        layout: dtype and shape of every tensor, in file order.
        tensors: (name, tensor) in that same order; each must have the dtype and shape that ``layout`` says.

    Raises:
        UserError: the folder cannot be written to or the disk is full; an earlier file under ``path`` is untouched.
    """
    names = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for name, (dtype, shape) in layout.items():
        size = dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header, ensure_ascii=False).encode("utf-8")
    encoded += b" " * (-len(encoded) % 8)  # readers map the data, which must start aligned
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for expected, (name, tensor) in zip(layout, tensors, strict=True):
            if name != expected or (tensor.dtype, tuple(tensor.shape)) != layout[name]:
                raise ValueError(
                    f"tensor {name} is {tensor.dtype} {tuple(tensor.shape)}, the layout expects {expected}: {layout[expected]}"
                )
            file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
