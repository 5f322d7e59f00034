"""GGUF files, in which quantized weights of image models and language models circulate: their tensors as a lazy mapping.

The header is read here, in bounded time whatever it holds; the package gguf, which is optional, knows the quantized formats.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

import torch
from torch import Tensor

from hunyuan_model.checkpoints.mapped_files import MappedFile
from hunyuan_model.checkpoints.stored_tensor import StoredTensor
from utils.errors import UserError, shown

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."  # of tensors that were stored in another shape, before their names

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_PLAIN = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}
_MOST_ENTRIES = 1 << 16  # of metadata, and of tensors
_MOST_TEXTS = 1 << 22  # in all lists, of which the longest are vocabularies
_MOST_DIMENSIONS = 8
_KEPT_NUMBERS = 16  # of a list: a shape is no longer
_DEFAULT_ALIGNMENT = 32
_SLICE_VALUES = 1 << 15  # dequantized at once: they stay in the cache, and torch does not split them between threads, which
# would wait for each other after each of the small steps

Value = str | int | float | bool | list[int | float | bool] | None


@dataclass(frozen=True)
class _Info:
    """What the header says of a tensor: its sizes, the fastest first, the number of its format, where it begins."""

    sizes: tuple[int, ...]
    kind: int
    offset: int


def gguf_entries(path: Path, what: str) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of a GGUF file in file order, quantized ones as the float32 tensors that they mean, and its metadata.

    Shapes are in torch's order. The metadata has every text and number of the header, such as ``general.architecture``.

    Raises:
        UserError: cut short or damaged, tensors in a format that cannot be dequantized, or the package gguf is missing.
    """
    gguf = _package(what, path)
    try:
        with open(path, "rb") as file:
            metadata, infos, data_start = _Header(file).read()
        mapped = MappedFile(path)
        entries = {}
        for name, info in sorted(infos.items(), key=lambda item: item[1].offset):
            original = metadata.get(ORIGINAL_SHAPE + name)
            shape = original if isinstance(original, list) else info.sizes[::-1]
            entries[name] = _entry(gguf, mapped, info, shape, data_start, os.path.getsize(path))
    except _Unreadable as error:
        raise UserError(f"{what} {path} {error}. Use a GGUF file of another quantization, or a .safetensors file.") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{what} {path} is cut short or damaged ({error}). Copy or download it again.") from error
    return entries, {key: str(value) for key, value in metadata.items() if isinstance(value, (str, int, float))}


class _Unreadable(Exception):
    """Completes "the file ..."."""


def _package(what: str, path: Path) -> ModuleType:
    try:
        import gguf
        import gguf.quants
    except ImportError as error:
        raise UserError(f"{what} {path} is a GGUF file, which needs the package gguf: pip install gguf.") from error
    return gguf


class _Header:
    """Reads the header from the beginning of a file. A ValueError says what is wrong."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._size = os.fstat(file.fileno()).st_size
        self._texts = 0

    def read(self) -> tuple[dict[str, Value], dict[str, _Info], int]:
        """The metadata, lists of texts and long ones as None; the tensors; and at which byte their data begins."""
        if self._bytes(4) != MAGIC:
            raise ValueError("it is no GGUF file")
        version = self._number("I")
        if version not in VERSIONS:
            raise ValueError(f"its version is {version}, and {' and '.join(map(str, VERSIONS))} are known")
        tensors, values = self._number("Q"), self._number("Q")
        if max(tensors, values) > _MOST_ENTRIES:
            raise ValueError(f"its header counts {tensors} tensors and {values} values")
        metadata = {self._text(): self._value(self._number("I")) for _ in range(values)}
        infos: dict[str, _Info] = {}
        for _ in range(tensors):
            name = self._text()
            if name in infos:
                raise ValueError(f"it holds {shown(name)} twice")
            infos[name] = self._info()
        if not infos:
            raise ValueError("it holds no tensors")
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or not 0 < alignment <= self._size:
            raise ValueError(f"its alignment is {shown(alignment)}")
        return metadata, infos, math.ceil(self._file.tell() / alignment) * alignment

    def _bytes(self, count: int) -> bytes:
        if count > self._size - self._file.tell():
            raise ValueError("it ends within its header")
        return self._file.read(count)

    def _number(self, code: str) -> int:
        return struct.unpack(f"<{code}", self._bytes(struct.calcsize(f"<{code}")))[0]

    def _text(self) -> str:
        return self._bytes(self._number("Q")).decode("utf-8")

    def _info(self) -> _Info:
        dimensions = self._number("I")
        if dimensions > _MOST_DIMENSIONS:
            raise ValueError(f"it holds a tensor of {dimensions} dimensions")
        sizes = tuple(self._number("Q") for _ in range(dimensions))
        return _Info(sizes, self._number("I"), self._number("Q"))

    def _value(self, kind: int) -> Value:
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            return self._text()
        if kind == _ARRAY:
            return self._list(self._number("I"), self._number("Q"))
        raise ValueError(f"it holds a value of the unknown type {kind}")

    def _list(self, kind: int, count: int) -> Value:
        if kind in _SCALARS:
            content = self._skipped_or_read(count * struct.calcsize(f"<{_SCALARS[kind]}"), keep=count <= _KEPT_NUMBERS)
            return None if content is None else list(struct.unpack(f"<{count}{_SCALARS[kind]}", content))
        self._texts += count
        if kind != _STRING or self._texts > _MOST_TEXTS:
            raise ValueError(f"it holds a list of {count} values of the type {kind}")
        for _ in range(count):
            self._bytes(self._number("Q"))
        return None

    def _skipped_or_read(self, count: int, keep: bool) -> bytes | None:
        if keep:
            return self._bytes(count)
        if count > self._size - self._file.tell():
            raise ValueError("it ends within its header")
        self._file.seek(count, os.SEEK_CUR)
        return None


def _entry(
    gguf: ModuleType, mapped: MappedFile, info: _Info, shape: Sequence[int], data_start: int, file_size: int
) -> StoredTensor:
    try:
        kind = gguf.GGMLQuantizationType(info.kind)
    except ValueError:
        raise _Unreadable(f"stores tensors in a format of the number {info.kind}, which the package gguf does not know") from None
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    count, row = math.prod(info.sizes), info.sizes[0] if info.sizes else 1
    if not count or row % block or math.prod(shape) != count or not all(isinstance(size, int) and size > 0 for size in shape):
        raise ValueError(f"it holds a tensor of the sizes {info.sizes} and the shape {list(shape)} as {kind.name}")
    size, start = count // block * block_bytes, data_start + info.offset
    if start + size > file_size:
        raise ValueError(f"its tensors reach to byte {start + size}, and it has {file_size}")
    shape = tuple(shape)
    if kind.name in _PLAIN:
        dtype = _PLAIN[kind.name]
        return StoredTensor(shape, dtype, partial(mapped.pieces, dtype, shape, start))
    _require_dequantizable(gguf, kind)
    pieces = partial(mapped.pieces, torch.uint8, (count // row, row // block * block_bytes), start)
    dequantize = _write_q8_0 if kind.name == "Q8_0" else partial(_write_dequantized, gguf, kind)
    return StoredTensor(shape, torch.float32, pieces, dequantize, quantized=True)


def _require_dequantizable(gguf: ModuleType, kind: object) -> None:
    block_bytes = gguf.GGML_QUANT_SIZES[kind][1]
    try:
        gguf.quants.dequantize(torch.zeros(1, block_bytes, dtype=torch.uint8).numpy(), kind)
    except NotImplementedError:
        raise _Unreadable(f"stores tensors as {kind.name}, which the package gguf cannot dequantize") from None


def _write_dequantized(gguf: ModuleType, kind: object, pieces: Sequence[Tensor], out: Tensor) -> None:
    """The values of the codes (rows, bytes of a row)."""
    codes = pieces[0]
    values = out.view(len(codes), -1)
    count = max(1, _SLICE_VALUES // values.shape[1])
    for start in range(0, len(codes), count):
        rows = slice(start, start + count)
        values[rows] = torch.from_numpy(gguf.quants.dequantize(codes[rows].numpy(), kind))


def _write_q8_0(pieces: Sequence[Tensor], out: Tensor) -> None:
    """As ``_write_dequantized``, ten times as fast: blocks of a float16 scale and 32 int8 codes."""
    blocks, values = pieces[0].view(-1, 34), out.view(-1, 32)
    count = max(1, _SLICE_VALUES // 32)
    exact = torch.empty(min(count, len(blocks)), 32)  # in one place for all slices: new memory takes longer than the arithmetic
    for start in range(0, len(blocks), count):
        some = blocks[start : start + count]
        scales = some[:, :2].clone(memory_format=torch.contiguous_format).view(torch.float16).float()
        part = exact[: len(some)].copy_(some[:, 2:].view(torch.int8)).mul_(scales)
        values[start : start + count] = part
