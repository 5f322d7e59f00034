"""GGUF files, written by the package gguf."""

from __future__ import annotations

import builtins
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from hunyuan_model.checkpoints.fingerprint import fingerprint_weights
from hunyuan_model.checkpoints.gguf_files import gguf_entries
from hunyuan_model.checkpoints.reading import Checkpoint, open_checkpoint
from utils.errors import UserError

gguf = pytest.importorskip("gguf")
KINDS = ("Q8_0", "Q4_0", "Q5_1", "BF16")
SOURCE_ONLY = ("Q4_K", "Q6_K", "IQ4_NL")  # which the package reads and does not write


def write(path: Path, tensors: dict[str, tuple[np.ndarray, str]], arch: str | None = "hyvid", **values: list[int]) -> None:
    """Values (or, for a uint8 array, codes) with the name of the format to store them in."""
    writer = gguf.GGUFWriter(path, arch or "")
    if arch is None:
        writer.kv_data[0].clear()
    writer.add_string("general.name", "häß")
    writer.add_uint32("llama.attention.head_count", 32)
    writer.add_array("tokenizer.ggml.tokens", ["a", "bc", ""] * 20)
    writer.add_array("tokenizer.ggml.token_type", list(range(60)))
    for key, value in values.items():
        writer.add_array(f"comfy.gguf.orig_shape.{key}", value)
    for name, (array, kind_name) in tensors.items():
        kind = gguf.GGMLQuantizationType[kind_name]
        if kind_name in ("F32", "F16"):
            writer.add_tensor(name, array.astype(np.float32 if kind_name == "F32" else np.float16))
        else:
            codes = array if array.dtype == np.uint8 else gguf.quants.quantize(array, kind)
            writer.add_tensor(name, codes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).standard_normal(shape, dtype=np.float32)


def as_the_package_reads(path: Path) -> dict[str, np.ndarray]:
    return {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(
            tuple(int(size) for size in tensor.shape[::-1])
        )
        for tensor in gguf.GGUFReader(path).tensors
    }


def opened(path: Path) -> Checkpoint:
    return open_checkpoint(path, "transformer (--dit)")


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_as_the_package_dequantizes_them(tmp_path, kind):
    path = tmp_path / "m.gguf"
    write(
        path,
        {
            "blocks.0.weight": (random(48, 256), kind),
            "blocks.0.stack.weight": (random(3, 5, 64), kind),
            "blocks.0.bias": (random(48), "F32"),
            "norm.weight": (random(7), "F16"),
        },
    )
    checkpoint, expected = opened(path), as_the_package_reads(path)
    assert set(checkpoint.shapes) == set(expected)
    for name, values in expected.items():
        tensor = checkpoint.get(name)
        assert tuple(tensor.shape) == checkpoint.shapes[name] == values.shape and tensor.dtype == checkpoint.dtypes[name]
        assert torch.equal(tensor.float(), torch.from_numpy(values.astype(np.float32)))
        assert checkpoint.is_quantized(name) == (name.endswith("weight") and name != "norm.weight" and kind != "BF16")
    assert checkpoint.dtypes["norm.weight"] == torch.float16
    assert checkpoint.dtypes["blocks.0.weight"] == (torch.bfloat16 if kind == "BF16" else torch.float32)


@pytest.mark.parametrize("kind", SOURCE_ONLY)
def test_formats_that_only_llama_cpp_writes(tmp_path, kind):
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    codes = np.random.default_rng(0).integers(0, 60, (6, 512 // block * size), dtype=np.uint8)
    write(tmp_path / "m.gguf", {"a.weight": (codes, kind)})
    checkpoint = opened(tmp_path / "m.gguf")
    assert checkpoint.shapes == {"a.weight": (6, 512)}
    expected = as_the_package_reads(tmp_path / "m.gguf")["a.weight"]
    assert np.array_equal(checkpoint.get("a.weight").numpy(), expected, equal_nan=True)


def test_large_tensors_are_dequantized_slice_by_slice(tmp_path, monkeypatch):
    write(tmp_path / "m.gguf", {"a.weight": (random(40, 64), "Q8_0")})
    monkeypatch.setattr("hunyuan_model.checkpoints.gguf_files._SLICE_VALUES", 192)
    expected = as_the_package_reads(tmp_path / "m.gguf")["a.weight"]
    assert np.array_equal(opened(tmp_path / "m.gguf").get("a.weight").numpy(), expected)


def test_shapes_of_more_than_four_dimensions(tmp_path):
    path = tmp_path / "m.gguf"
    write(
        path,
        {"img_in.proj.weight": (random(8, 16, 1, 2, 2), "F32"), "reshaped": (random(64, 32), "Q8_0")},
        reshaped=[8, 8, 1, 4, 8],
    )
    checkpoint = opened(path)
    assert checkpoint.shapes == {"img_in.proj.weight": (8, 16, 1, 2, 2), "reshaped": (8, 8, 1, 4, 8)}
    assert torch.equal(checkpoint.get("img_in.proj.weight"), torch.from_numpy(random(8, 16, 1, 2, 2)))
    assert checkpoint.get("reshaped").shape == (8, 8, 1, 4, 8)
    write(path, {"reshaped": (random(64, 32), "Q8_0")}, reshaped=[8, 8, 1, 4, 9])
    with pytest.raises(UserError, match="damaged"):
        opened(path)


def test_metadata(tmp_path):
    write(tmp_path / "m.gguf", {"a": (random(2), "F32")}, arch="llama")
    metadata = opened(tmp_path / "m.gguf").metadata
    assert metadata["general.architecture"] == "llama" and metadata["general.name"] == "häß"
    assert metadata["llama.attention.head_count"] == "32"
    assert not any("tokens" in key for key in metadata)
    write(tmp_path / "m.gguf", {"a": (random(2), "F32")}, arch=None)
    assert "general.architecture" not in opened(tmp_path / "m.gguf").metadata


def test_a_fingerprint_dequantizes_nothing(tmp_path, monkeypatch):
    for name, seed_shape in (("a", (4, 64)), ("b", (4, 1, 64))):
        write(tmp_path / f"{name}.gguf", {"a.weight": (random(*seed_shape).reshape(4, 64), "Q8_0")})
    monkeypatch.setattr(gguf.quants, "dequantize", None)
    monkeypatch.setattr("hunyuan_model.checkpoints.gguf_files._require_dequantizable", lambda *_: None)
    first, other = (fingerprint_weights(opened(tmp_path / f"{name}.gguf")) for name in "ab")
    assert first == fingerprint_weights(opened(tmp_path / "a.gguf")) != other


def test_the_package_is_named_where_it_is_missing(tmp_path, monkeypatch):
    write(tmp_path / "m.gguf", {"a": (random(2), "F32")})
    real = builtins.__import__

    def refuse(name: str, *arguments: object, **named: object) -> object:
        if name.split(".")[0] == "gguf":
            raise ImportError("no module named gguf")
        return real(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UserError, match=r"transformer \(--dit\) .*m\.gguf is a GGUF file, which needs .*: pip install gguf\."):
        opened(tmp_path / "m.gguf")


def header(*, tensors: int = 0, values: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, values)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def tensor_info(sizes: tuple[int, ...], kind: int, offset: int = 0) -> bytes:
    return text(b"a") + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


HOSTILE = {
    "nothing": header(),
    "version": header(version=1),
    "other byte order": b"GGUF" + struct.pack(">IQQ", 3, 1, 1),
    "many tensors": header(tensors=1 << 60),
    "many values": header(values=1 << 60),
    "long name": header(values=1) + struct.pack("<Q", 1 << 63),
    "long list": header(values=1) + text(b"k") + struct.pack("<IIQ", 9, 4, 1 << 61) + bytes(64),
    "long list of texts": header(values=1) + text(b"k") + struct.pack("<IIQ", 9, 8, 1 << 61) + bytes(1 << 20),
    "list of lists": header(values=1) + text(b"k") + struct.pack("<IIQ", 9, 9, 1) + bytes(64),
    "unknown value": header(values=1) + text(b"k") + struct.pack("<I", 13) + bytes(64),
    "no text": header(values=1) + text(b"\xff\xfe") + struct.pack("<I", 4) + bytes(64),
    "alignment of zero": header(tensors=1, values=1) + text(b"general.alignment") + bytes([4, 0, 0, 0] * 2) + tensor_info((4,), 0),
    "alignment is a text": header(tensors=1, values=1) + text(b"general.alignment") + bytes([8, 0, 0, 0]) + text(b"x") + bytes(64),
    "many dimensions": header(tensors=1) + text(b"a") + struct.pack("<I", 1 << 31) + bytes(64),
    "huge": header(tensors=1) + tensor_info((1 << 62, 1 << 62), 0) + bytes(64),
    "far away": header(tensors=1) + tensor_info((4,), 0, 1 << 62) + bytes(64),
    "no values": header(tensors=1) + tensor_info((4, 0), 0) + bytes(64),
    "half a block": header(tensors=1) + tensor_info((16, 2), 8) + bytes(640),
    "twice": header(tensors=2) + tensor_info((4,), 0) + tensor_info((4,), 0) + bytes(64),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_damaged_and_hostile_headers(tmp_path, case):
    (tmp_path / "m.gguf").write_bytes(HOSTILE[case])
    start = time.monotonic()
    with pytest.raises(UserError, match=r"m\.gguf is cut short or damaged \([^(]+.*\)\. Copy or download it again\.$"):
        opened(tmp_path / "m.gguf")
    assert time.monotonic() - start < 5


def test_every_cut_is_noticed(tmp_path):
    path = tmp_path / "m.gguf"
    write(path, {"a.weight": (random(2, 64), "Q8_0"), "b": (random(8), "F32")})
    content = path.read_bytes()
    end = max(int(tensor.data_offset + tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors)
    for length in range(4, end, 7):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match="damaged"):
            gguf_entries(path, "model")


@pytest.mark.parametrize(
    ("kind", "says"), [(999, "of the number 999, which"), (int(gguf.GGMLQuantizationType.Q8_1), "as Q8_1, which")]
)
def test_formats_that_are_not_read_are_named(tmp_path, kind, says):
    (tmp_path / "m.gguf").write_bytes(header(tensors=1) + tensor_info((64,), kind) + bytes(2048))
    with pytest.raises(UserError, match=rf"--dit.*m\.gguf stores tensors .*{says}.*Use a GGUF file of another"):
        opened(tmp_path / "m.gguf")
