"""hunyuan_model.text.placement: the device where text encoder 1 fits, else the CPU, else a sentence."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

from hunyuan_model.text import encoding, placement
from hunyuan_model.text.arguments import TextEncoderSettings
from hunyuan_model.text.placement import MARGIN, place_beside_others
from utils.errors import UserError

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def settings(tiny_model) -> TextEncoderSettings:
    return TextEncoderSettings(str(tiny_model.text_encoder1), str(tiny_model.text_encoder2), torch.float16)


@pytest.fixture
def numbers(tiny_model) -> int:
    """In the weights of text encoder 1."""
    (path,) = tiny_model.text_encoder1.glob("*.safetensors")
    with safe_open(path, "pt") as file:
        return sum(file.get_tensor(name).numel() for name in file.keys())


@pytest.mark.parametrize(
    ("on_gpu", "on_host", "place"),
    [
        (2.5, 0, (GPU, torch.float16)),
        (1.5, 4.5, (CPU, torch.float32)),
        (1.5, 2.5, (CPU, torch.bfloat16)),
    ],
)
def test_where_it_fits(settings, numbers, monkeypatch, on_gpu, on_host, place):
    """Free are so many bytes for each number."""
    monkeypatch.setattr(placement, "free_device_memory", lambda device: int(on_gpu * MARGIN * numbers))
    monkeypatch.setattr(placement, "free_host_memory", lambda: int(on_host * MARGIN * numbers))
    found, device = place_beside_others(settings, GPU)
    assert (device, found.text_encoder_dtype) == place


def test_nowhere_and_the_cpu_itself(settings, monkeypatch):
    monkeypatch.setattr(placement, "free_device_memory", lambda device: 0)
    monkeypatch.setattr(placement, "free_host_memory", lambda: 0)
    with pytest.raises(UserError, match=r"text encoder 1 takes .* are free; use --fp8_llm\."):
        place_beside_others(settings, GPU)
    assert place_beside_others(settings, CPU) == (settings, CPU)


def test_what_another_place_gives_is_not_cached(settings, monkeypatch, tmp_path):
    cached = replace(settings, text_encoder_dtype=torch.float32, text_cache=str(tmp_path / "texts"))
    monkeypatch.setattr(encoding, "place_beside_others", lambda settings, device: (settings, torch.device("cpu", 0)))
    encoding.encode_prompts(["a cat"], cached, CPU, beside_others=True)
    assert not (tmp_path / "texts").exists()
    encoding.encode_prompts(["a cat"], cached, CPU)
    assert len(list((tmp_path / "texts").iterdir())) == 1
