"""Weights from strangers that could take far more time or memory than their size: each is refused in one sentence."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hunyuan_model.checkpoints import reading
from hunyuan_model.checkpoints.reading import open_checkpoint
from utils import safetensors_io
from utils.errors import UserError
from utils.safetensors_io import read_header, read_tensors

STRANGERS = Path(__file__).resolve().parents[2] / "strangers"
ONE = {"x": torch.ones(4)}


def refused(path: Path, match: str | None = None) -> None:
    with pytest.raises(UserError, match=match) as caught:
        open_checkpoint(path, "model")
    assert len(str(caught.value).splitlines()) == 1 and str(path) in str(caught.value)


def entries_of(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def with_pickle(path: Path, content: bytes) -> None:
    """Put another pickle into a file of torch."""
    torch.save(ONE, path)
    entries = entries_of(path)
    with zipfile.ZipFile(path, "w") as archive:
        for name, stored in entries.items():
            archive.writestr(name, content if name.endswith("data.pkl") else stored)


def test_a_dict_that_is_in_itself() -> None:
    refused(STRANGERS / "self_reference.pt", "holds no state dict")


def test_a_circle_of_wrappers(tmp_path: Path) -> None:
    one, other = {}, {}
    one["module"], other["state_dict"] = other, one
    torch.save(one, tmp_path / "m.pt")
    refused(tmp_path / "m.pt", "holds no state dict")


HOLLOW: dict[str, Callable[[], torch.Tensor]] = {
    "meta": lambda: torch.empty(1 << 20, 1 << 20, device="meta"),
    "one value many times": lambda: torch.ones(1).expand(1 << 20, 1 << 20),
    "sparse": lambda: torch.sparse_coo_tensor(torch.zeros(2, 1, dtype=torch.long), torch.ones(1), (1 << 20, 1 << 20)),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("kind", HOLLOW)
def test_tensors_whose_values_are_not_in_the_file(tmp_path: Path, kind: str, old: bool) -> None:
    torch.save({"y": torch.ones(4), "x": HOLLOW[kind]()}, tmp_path / "m.pt", _use_new_zipfile_serialization=not old)
    refused(tmp_path / "m.pt", "holds no plain values for x|is cut short or damaged")


def test_a_storage_that_claims_more_than_the_file(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    torch.save(ONE, path)
    content = next(stored for name, stored in entries_of(path).items() if name.endswith("data.pkl"))
    four, many = b"K\x04", b"J" + struct.pack("<i", 1 << 30)  # BININT1 and BININT
    assert content.count(four) == 2  # the storage's size and the tensor's
    for changed in (content.replace(four, many), many.join(content.rsplit(four, 1))):
        with_pickle(path, changed)
        refused(path, "cut short or damaged|no plain values")


def test_values_under_many_names(tmp_path: Path) -> None:
    tensor = torch.ones(1 << 16)
    torch.save({f"x{index}": tensor for index in range(100)}, tmp_path / "m.pt")
    refused(tmp_path / "m.pt", "the same values under many names")
    torch.save({"embed": tensor, "head": tensor}, tmp_path / "m.pt")
    assert open_checkpoint(tmp_path / "m.pt", "model").shapes == {"embed": (1 << 16,), "head": (1 << 16,)}


def test_compressed_entries(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(1 << 20)}, tmp_path / "m.pt")
    entries = entries_of(tmp_path / "m.pt")
    with zipfile.ZipFile(tmp_path / "m.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    assert os.path.getsize(tmp_path / "m.pt") < 1 << 16
    refused(tmp_path / "m.pt", "is compressed")


def test_tuples_that_hold_each_other(tmp_path: Path) -> None:
    """To hash the last one would take 2 to the 60."""
    nested: tuple = ()
    for _ in range(60):
        nested = (nested, nested)
    with_pickle(tmp_path / "m.pt", pickle.dumps([nested], protocol=2)[:-2] + b"}" + b"h\x00" + b"K\x01" + b"s.")
    refused(tmp_path / "m.pt", "its values hold each other")
    (tmp_path / "old.pt").write_bytes(pickle.dumps([nested], protocol=2))
    refused(tmp_path / "old.pt", "its values hold each other")


@pytest.mark.parametrize("function", ["builtins\nbytearray", "torch\nFloatTensor"])
def test_calls_that_take_memory(tmp_path: Path, function: str) -> None:
    size = b"\x8a\x05" + (1 << 36).to_bytes(5, "little")  # LONG1
    with_pickle(tmp_path / "m.pt", b"\x80\x02}X\x01\x00\x00\x00xc" + function.encode() + b"\n" + size + b"\x85Rs.")
    refused(tmp_path / "m.pt", "holds no state dict|cut short or damaged|under many names|holds more than tensors")


def test_a_pickle_of_great_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_MOST_PICKLE_BYTES", 1000)
    torch.save({f"x{index}": torch.ones(1) for index in range(100)}, tmp_path / "m.pt")
    refused(tmp_path / "m.pt", "lists more than any model has")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("old", [False, True])
def test_ordinary_files_pass(tmp_path: Path, old: bool) -> None:
    layers = OrderedDict((f"layers.{index}.weight", torch.nn.Parameter(torch.full((2, 3), float(index)))) for index in range(300))
    torch.save({"module": layers, "args": (1, "a", [None])}, tmp_path / "m.pt", _use_new_zipfile_serialization=not old)
    checkpoint = open_checkpoint(tmp_path / "m.pt", "model")
    assert all(torch.equal(checkpoint.get(name), tensor) for name, tensor in layers.items())


def test_a_safetensors_header_of_great_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_io, "MOST_HEADER_BYTES", 1 << 20)
    path = tmp_path / "m.safetensors"
    save_file(ONE, path, {"comment": "x" * (1 << 21)})
    refused(path, "has a header of 2 MB, and at most 1 are read")
    for read in (read_header, read_tensors):
        with pytest.raises(UserError, match="has a header of 2 MB"):
            read(path)


@pytest.mark.parametrize("content", [b"PK\x03\x04", b"\x80\x02.", b"\x80", b"\x80\x02}q\x00.", b""])
def test_files_that_are_hardly_there(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.pt").write_bytes(content)
    refused(tmp_path / "m.pt")


@pytest.mark.parametrize("index", ["[" * 100_000, '{"weight_map": {"x": "/proc/self/status"}}', '{"weight_map": []}', "7"])
def test_indexes_of_shards(tmp_path: Path, index: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    with pytest.raises(UserError, match=r"index|is a view into the system|lacks"):
        open_checkpoint(tmp_path, "model")


@pytest.mark.parametrize("names", [["layers.0." * 1000], [f"x{index}" for index in range((1 << 16) + 1)]])
def test_names_without_end(tmp_path: Path, names: list[str]) -> None:
    path = tmp_path / "m.safetensors"
    header = json.dumps({name: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for name in names}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    refused(path, rf"holds {len(names)} tensors with names of up to \d+ characters")
    for read in (read_header, read_tensors):
        with pytest.raises(UserError, match="tensors with names of up to"):
            read(path)
