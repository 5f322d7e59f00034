"""The benchmark of loading, at a size that takes a moment: its files are real checkpoints, and its tables are printed."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.loading import seconds_to_read, stored_layout, write_checkpoint
from hunyuan_model.checkpoints.reading import open_checkpoint
from hunyuan_model.quantization.formats import WeightFormat
from hunyuan_model.runtime.loading import load_transformer
from hunyuan_model.runtime.settings import RuntimeSettings
from hunyuan_model.transformer.config import TransformerConfig

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "loading.py"
CONFIG = TransformerConfig(hidden_size=128, heads=1, mlp_size=512, double_depth=1, single_depth=1)
SMALL = ("--hidden_size", "128", "--double_blocks", "1", "--single_blocks", "1", "--rounds", "1", "--threads", "1")


@pytest.mark.parametrize("name", ["m.safetensors", "m.pt"])
@pytest.mark.parametrize("stored", ["bfloat16", "float8"])
def test_the_file_is_a_checkpoint_with_the_official_names(tmp_path, name, stored):
    path = tmp_path / name
    write_checkpoint(path, CONFIG, stored)
    checkpoint = open_checkpoint(path, "m")
    assert {key: (checkpoint.dtypes[key], shape) for key, shape in checkpoint.shapes.items()} == stored_layout(CONFIG, stored)
    values = checkpoint.get("single_blocks.0.linear1.weight").float()
    assert 0.015 < values.std() < 0.025
    model = load_transformer(path, device="cpu", dtype=torch.bfloat16, runtime=RuntimeSettings(WeightFormat.FP8))
    assert model.config == CONFIG
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert seconds_to_read(path) > 0


def test_the_published_size():
    layout = stored_layout(TransformerConfig(), "bfloat16")
    assert sum(torch.Size(shape).numel() for _, shape in layout.values()) == 12_821_012_544
    quantized = stored_layout(TransformerConfig(), "float8").values()
    assert 12.8e9 < sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in quantized) < 13.3e9


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *SMALL, "--folder", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8")


@pytest.mark.slow
def test_the_table_of_loading(tmp_path):
    ended = run(tmp_path, "--formats", ".pt", "--kinds", "fp8_scaled")
    assert ended.returncode == 0, ended.stderr
    rows = [line for line in ended.stdout.splitlines() if line.startswith("| bfloat16 .pt")]
    cells = [cell.strip() for cell in rows[0].split("|")[2:-1]]
    assert len(rows) == 1 and cells[0] == "bfloat16, fp8_scaled" and float(cells[-1]) > 0
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_table_of_generation(tmp_path):
    ended = run(tmp_path, "--generate", "--side", "32", "--steps", "1", "--dtype", "float32")
    assert ended.returncode == 0, ended.stderr
    assert "| float8 .safetensors" in ended.stdout and "32x32, 1 steps, float32" in ended.stdout
    assert not list(tmp_path.iterdir())
