"""Checkpoints are mapped to be read only: a file larger than the machine's memory opens and loads like a small one."""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hunyuan_model.checkpoints import mapped_files
from hunyuan_model.checkpoints.mapped_files import MappedFile, read_ahead
from hunyuan_model.checkpoints.reading import open_checkpoint
from utils.safetensors_io import read_header

SIZE = 1000  # bytes of each tensor


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


def test_tensors_keep_the_mapping_alive_and_may_begin_anywhere(tmp_path):
    path = tmp_path / "bytes"
    path.write_bytes(b"abc" + torch.tensor([3.0, 4.0]).numpy().tobytes())
    mapped = MappedFile(path)
    tensor = mapped.tensor(torch.float32, (2, 1), 3)
    del mapped
    assert tensor.tolist() == [[3.0], [4.0]]


def tensors(count: int) -> dict[str, torch.Tensor]:
    return {f"t{index}": torch.full((SIZE,), index, dtype=torch.uint8) for index in range(count)}


def test_all_come_in_order_and_no_more_than_asked_for_is_held():
    stored, asked, came = tensors(20), [], []

    def get(name: str) -> tuple[torch.Tensor, ...]:
        assert threading.current_thread() is threading.main_thread()
        asked.append(name)
        return stored[name].chunk(2)

    with read_ahead(stored, get, ahead_bytes=3 * SIZE) as coming:
        for name, pieces in coming:
            assert torch.equal(torch.cat(pieces), stored[name])
            came.append(name)
            assert len(asked) == min(len(came) + 3, 20)
    assert came == list(stored)


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="where the system says what is mapped")
@pytest.mark.parametrize("system", ["this", "an older one"])
def test_the_pages_of_what_follows_are_read_meanwhile(tmp_path, monkeypatch, system):
    if system == "an older one":
        monkeypatch.setattr(mapped_files, "_madvise", lambda: None)
    file = tmp_path / "weights"
    file.write_bytes(bytes(64 << 20))
    mapped = MappedFile(file).tensor(torch.bfloat16, ((32 << 20) - 5,), 6)

    def resident() -> int:
        return int(re.search(rf"{file}\n.*?Rss: *(\d+) kB", Path("/proc/self/smaps").read_text(), re.S)[1])

    assert resident() < 1024
    with read_ahead(["a"], lambda name: mapped.chunk(2)) as coming:
        assert next(coming)[0] == "a"
        deadline = time.monotonic() + 30
        while resident() < 64 << 10 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert resident() == 64 << 10


@pytest.mark.parametrize(
    "tensor", [torch.zeros(0), torch.tensor(1.0), torch.zeros(4, 6).t(), torch.zeros(3).to(torch.float8_e4m3fn)]
)
def test_any_tensor_may_come(tensor):
    with read_ahead(["a", "b"], lambda name: (tensor,)) as coming:
        assert [entry[1][0] is tensor for entry in coming] == [True, True]


def test_the_thread_ends_with_the_context_also_after_an_error():
    before, stored = threading.active_count(), tensors(5)
    with pytest.raises(RuntimeError, match="no room"), read_ahead(stored, lambda name: (stored[name],)) as coming:
        next(coming)
        raise RuntimeError("no room")
    assert threading.active_count() == before
