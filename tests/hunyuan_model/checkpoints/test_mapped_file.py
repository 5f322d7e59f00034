"""Checkpoints are mapped to be read only: a file larger than the machine's memory opens and loads like a small one."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hunyuan_model.checkpoints.mapped_files import MappedFile, torch_maps_read_only
from hunyuan_model.checkpoints.reading import open_checkpoint
from utils.safetensors_io import read_header


def larger_than_memory(path: Path) -> int:
    """A safetensors file of two tensors, mostly a hole on the disk; returns the values of the first."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    swap = sum(
        int(line.split()[1]) * 1024 for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("SwapTotal")
    )
    values = (memory + swap + (1 << 30)) // 2
    header = {
        "large": {"dtype": "BF16", "shape": [values], "data_offsets": [0, 2 * values]},
        "small": {"dtype": "F32", "shape": [2], "data_offsets": [2 * values, 2 * values + 8]},
    }
    encoded = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.seek(2 * values, os.SEEK_CUR)
        file.write(torch.tensor([1.0, -2.0]).numpy().tobytes())
    return values


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="makes a file with a hole, and reads /proc")
def test_a_file_larger_than_memory_opens(tmp_path):
    path = tmp_path / "model.safetensors"
    values = larger_than_memory(path)
    assert read_header(path).shapes == {"large": (values,), "small": (2,)}
    checkpoint = open_checkpoint(path, "model")
    assert checkpoint.get("small").tolist() == [1.0, -2.0]
    large = checkpoint.get("large")
    assert large.shape == (values,) and large.dtype == torch.bfloat16 and large[values // 2] == 0


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_nothing_is_mapped_to_be_written_to(tmp_path, monkeypatch, suffix):
    path = tmp_path / f"model{suffix}"
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(3, dtype=torch.bfloat16), "none": torch.zeros(0, 4)}
    save_file(tensors, path) if suffix == ".safetensors" else torch.save(tensors, path)

    def refuse(*_arguments):
        raise RuntimeError("unable to mmap: Cannot allocate memory (12)")

    monkeypatch.setattr(torch.UntypedStorage, "from_file", refuse)
    checkpoint = open_checkpoint(path, "model")
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.get(name), tensor) and checkpoint.get(name).dtype == tensor.dtype
    assert torch.UntypedStorage.from_file is refuse  # put back


def test_what_torch_does_otherwise_is_put_back_after_an_error():
    before = torch.UntypedStorage.from_file
    with pytest.raises(KeyError), torch_maps_read_only():
        raise KeyError
    assert torch.UntypedStorage.from_file == before and "from_file" not in vars(torch.UntypedStorage)


def test_tensors_keep_the_mapping_alive_and_may_begin_anywhere(tmp_path):
    path = tmp_path / "bytes"
    path.write_bytes(b"abc" + torch.tensor([3.0, 4.0]).numpy().tobytes())
    mapped = MappedFile(path)
    tensor = mapped.tensor(torch.float32, (2, 1), 3)
    del mapped
    assert tensor.tolist() == [[3.0], [4.0]]
