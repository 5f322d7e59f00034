"""Rotation tables and rotation against reference values and the closed form."""

from pathlib import Path

import pytest
import torch

from hunyuan_model.transformer import cpu_kernels
from hunyuan_model.transformer.rope import apply_rope, rotate_pairs, rotation_table
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


@pytest.mark.parametrize("way", ["eager", "compiled", "compiled for a GPU"])
def test_rotation_and_its_gradient(reference, way, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: way != "eager")
    if way == "compiled for a GPU":
        monkeypatch.setattr(cpu_kernels, "rotate_pairs", rotate_pairs)
    table = rotation_table((3, 4, 4), (4, 14, 14), 256.0, CPU)
    for name in ("q", "k"):
        x, expected = reference[f"r1.{name}"].clone().requires_grad_(), reference[f"r1.{name}_rotated"]
        rotated = apply_rope(x, table)
        torch.testing.assert_close(rotated, expected, atol=2e-6, rtol=0)
        (gradient,) = torch.autograd.grad(rotated, x, expected)  # of a rotation: the other way round
        torch.testing.assert_close(gradient, reference[f"r1.{name}"], atol=4e-6, rtol=0)
        torch.testing.assert_close(apply_rope(expected, table, back=True), reference[f"r1.{name}"], atol=4e-6, rtol=0)


def test_float64_closed_form_on_a_long_clip():
    size, dims = (33, 5, 7), (16, 56, 56)
    table = rotation_table(size, dims, 256.0, CPU)
    position = (31, 4, 6)
    row = (position[0] * size[1] + position[1]) * size[2] + position[2]
    angles = torch.cat([p * 256.0 ** (-torch.arange(0, d, 2, dtype=torch.float64) / d) for p, d in zip(position, dims)])
    torch.testing.assert_close(table[row, :, 0].double(), angles.cos(), atol=5e-6, rtol=0)
    torch.testing.assert_close(table[row, :, 1].double(), angles.sin(), atol=5e-6, rtol=0)


def test_text_rows_do_not_rotate():
    x = torch.randn(1, 7, 2, 16, generator=torch.Generator().manual_seed(0))
    rotated = apply_rope(x, rotation_table((1, 2, 2), (4, 6, 6), 256.0, CPU, text_rows=3))
    assert torch.equal(rotated[:, 4:], x[:, 4:])
    assert not torch.equal(rotated[:, 1:4], x[:, 1:4])
