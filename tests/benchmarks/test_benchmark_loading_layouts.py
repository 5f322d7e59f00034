"""The benchmark of loading other layouts: its files are of the layouts it names, and load."""

import sys

import pytest
import torch

pytest.importorskip("gguf")

from benchmarks.loading_layouts import ROWS, write_file
from hunyuan_model.quantization.formats import WeightFormat
from hunyuan_model.runtime.loading import load_transformer, open_transformer
from hunyuan_model.runtime.settings import RuntimeSettings
from hunyuan_model.transformer.config import TransformerConfig

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="imports what reads /proc")

CONFIG = TransformerConfig(hidden_size=128, heads=1, mlp_size=512, double_depth=1, single_depth=1)


@pytest.mark.parametrize("file", sorted({file for file, _ in ROWS}))
def test_the_files_are_of_their_layouts(tmp_path, file):
    path = tmp_path / ("m.gguf" if "GGUF" in file else "m.safetensors")
    write_file(path, CONFIG, file)
    checkpoint, config = open_transformer(path, "--dit")
    assert config == CONFIG
    name = "single_blocks.0.linear1.weight"
    assert (name in checkpoint.scales) == ("scaled" in file)
    assert checkpoint.entries[name].count == (4 if file == "diffusers" else 1)
    assert checkpoint.is_quantized(name) == ("scaled" in file or "GGUF" in file)
    for kind in (WeightFormat.PLAIN, WeightFormat.FP8):
        model = load_transformer(path, device="cpu", dtype=torch.bfloat16, runtime=RuntimeSettings(kind))
        assert model.config == CONFIG
