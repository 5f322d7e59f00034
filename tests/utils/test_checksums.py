"""Checksums notice what disks and systems do to bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from utils.checksums import PAGE_BYTES, PIECE_BYTES, content_checksum, file_checksum, is_changed, tensors_checksum

SIZE = 3 * (1 << 20) + PAGE_BYTES + 13


def exchange(content: np.ndarray, first: int, second: int) -> None:
    one, other = (slice(page * PAGE_BYTES, (page + 1) * PAGE_BYTES) for page in (first, second))
    content[one], content[other] = content[other].copy(), content[one].copy()


CHANGES: dict[str, Callable[[np.ndarray], None]] = {
    "a bit at the beginning": lambda content: content.__setitem__(0, content[0] ^ 1),
    "a bit of the last byte": lambda content: content.__setitem__(-1, content[-1] ^ 128),
    "a page of zeros": lambda content: content.__setitem__(slice(PAGE_BYTES, 2 * PAGE_BYTES), 0),
    "pages side by side exchanged": lambda content: exchange(content, 4, 5),
    "pages far apart exchanged": lambda content: exchange(content, 1, 700),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_noticed(change: str) -> None:
    content = np.random.default_rng(0).integers(0, 256, SIZE, np.uint8)
    before = content_checksum(content.tobytes())
    CHANGES[change](content)
    assert is_changed(before, content_checksum(content.tobytes()))


def test_the_number_of_zeros_counts() -> None:
    assert len({content_checksum(bytes(size)) for size in (0, 1, 8, 9, PAGE_BYTES, PAGE_BYTES + 1, 2 * PAGE_BYTES)}) == 7


@pytest.mark.parametrize("size", [0, 5, PAGE_BYTES, PIECE_BYTES + 12345])
def test_a_file_has_the_checksum_of_its_content(tmp_path: Path, size: int) -> None:
    content = np.random.default_rng(1).integers(0, 256, size, np.uint8).tobytes()
    (tmp_path / "file").write_bytes(content)
    assert file_checksum(tmp_path / "file") == content_checksum(memoryview(content))


def test_the_names_of_tensors_give_their_order() -> None:
    one, two = torch.tensor([1.0]), torch.tensor([2.0])
    found = tensors_checksum({"a": one, "b": two})
    assert found == tensors_checksum({"b": two, "a": one}) and found != tensors_checksum({"a": two, "b": one})


def test_checksums_of_an_earlier_kind_and_files_without_are_taken_as_they_are() -> None:
    found = content_checksum(b"x")
    assert not is_changed(None, found) and not is_changed("0123456789abcdef", found) and not is_changed(found, found)
