"""GGUF files of a model's weights, written by the package gguf."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor


def write_gguf(
    path: Path, arch: str, tensors: Mapping[str, Tensor], quantized: Collection[str], kind: str, **metadata: float
) -> None:
    """Stores those of ``quantized`` as ``kind``, the others as float32. Keys of ``metadata`` follow ``arch``, with __ for a dot."""
    gguf = pytest.importorskip("gguf")
    writer, code = gguf.GGUFWriter(path, arch), gguf.GGMLQuantizationType[kind]
    for key, value in metadata.items():
        add = writer.add_uint32 if isinstance(value, int) else writer.add_float32
        add(f"{arch}.{key.replace('__', '.')}", value)
    for name, tensor in tensors.items():
        if name in quantized:
            writer.add_tensor(name, gguf.quants.quantize(tensor.numpy(), code), raw_dtype=code)
        else:
            writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def as_stored(tensor: Tensor, kind: str) -> Tensor:
    """The float32 values that a tensor has after it was stored as ``kind``, row by row."""
    gguf = pytest.importorskip("gguf")
    code = gguf.GGMLQuantizationType[kind]
    return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(tensor.numpy(), code), code))
