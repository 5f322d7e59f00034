"""Rotation tables and rotation against reference values and the closed form."""

from pathlib import Path

import pytest
import torch

from hunyuan_model.transformer.rope import CACHED_SIZES, RotaryTables, apply_rope, rotation_table
from utils.safetensors_io import read_tensors

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def reference():
    return read_tensors(Path(__file__).resolve().parents[2] / "goldens" / "rope.safetensors").tensors


@pytest.mark.parametrize(
    ("name", "size", "dims"),
    [("r0", (1, 4, 6), (4, 14, 14)), ("r1", (3, 4, 4), (4, 14, 14)), ("r2", (2, 3, 5), (16, 56, 56))],
)
def test_tables(reference, name, size, dims):
    cos, sin = rotation_table(size, dims, 256.0, CPU).repeat_interleave(2, dim=1).unbind(-1)
    torch.testing.assert_close(cos, reference[f"{name}.cos"], atol=2e-6, rtol=0)
    torch.testing.assert_close(sin, reference[f"{name}.sin"], atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", ["q", "k"])
@pytest.mark.parametrize("compiled", [False, True])
def test_rotation(reference, name, compiled, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiled)
    rotated = apply_rope(reference[f"r1.{name}"], rotation_table((3, 4, 4), (4, 14, 14), 256.0, CPU))
    torch.testing.assert_close(rotated, reference[f"r1.{name}_rotated"], atol=2e-6, rtol=0)


def test_both_ways_of_rotating_have_the_same_gradient(monkeypatch):
    torch.manual_seed(0)
    table = rotation_table((2, 3, 2), (4, 6, 6), 256.0, CPU)
    x, weight = torch.randn(2, 12, 3, 16), torch.randn(2, 12, 3, 16)
    gradients = []
    for compiled in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda compiled=compiled: compiled)
        leaf = x.clone().requires_grad_()
        (apply_rope(leaf, table) * weight).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[0], gradients[1], atol=2e-6, rtol=0)


def test_float64_closed_form_on_a_long_clip():
    size, dims = (33, 5, 7), (16, 56, 56)
    table = rotation_table(size, dims, 256.0, CPU)
    position = (31, 4, 6)
    row = (position[0] * size[1] + position[1]) * size[2] + position[2]
    angles = torch.cat([p * 256.0 ** (-torch.arange(0, d, 2, dtype=torch.float64) / d) for p, d in zip(position, dims)])
    torch.testing.assert_close(table[row, :, 0].double(), angles.cos(), atol=5e-6, rtol=0)
    torch.testing.assert_close(table[row, :, 1].double(), angles.sin(), atol=5e-6, rtol=0)


def test_text_rows_do_not_rotate():
    torch.manual_seed(0)
    table = RotaryTables((4, 6, 6), 256.0).get((1, 2, 2), 3, CPU)
    x = torch.randn(1, 7, 2, 16)
    rotated = apply_rope(x, table)
    assert torch.equal(rotated[:, 4:], x[:, 4:])
    assert not torch.equal(rotated[:, 1:4], x[:, 1:4])


def test_tables_are_kept_per_size_and_not_for_ever():
    tables = RotaryTables((4, 6, 6), 256.0)
    first = tables.get((1, 2, 2), 5, CPU)
    assert tables.get((1, 2, 2), 9, CPU).data_ptr() == first.data_ptr()
    assert tables.get((2, 2, 1), 5, CPU).data_ptr() != first.data_ptr()
    assert tables.get((1, 2, 2), 300, CPU).shape == (304, 8, 2)
    for frames in range(2, 3 * CACHED_SIZES):
        tables.get((frames, 2, 2), 5, CPU)
    assert len(tables._tables) == CACHED_SIZES


def test_a_table_made_while_sampling_serves_training():
    tables = RotaryTables((4, 6, 6), 256.0)
    with torch.inference_mode():
        tables.get((1, 2, 2), 1, CPU)
    x = torch.ones(1, 5, 1, 16, requires_grad=True)
    apply_rope(x, tables.get((1, 2, 2), 1, CPU)).sum().backward()
    assert x.grad is not None
