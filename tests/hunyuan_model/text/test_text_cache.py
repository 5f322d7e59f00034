"""--text_cache: known prompts need no encoder, and what the states depend on decides what is known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hunyuan_model.text import encoding
from hunyuan_model.text.arguments import TextEncoderSettings
from hunyuan_model.text.encoding import encode_prompts

CPU = torch.device("cpu")
PROMPTS = ["a red ball", "", "a red ball", "赤い玉 🔴"]


@pytest.fixture
def settings(tiny_model, tmp_path) -> TextEncoderSettings:
    cache = tmp_path / "texts"
    cache.mkdir()
    return TextEncoderSettings(tiny_model.text_encoder1, tiny_model.text_encoder2, torch.float32, text_cache=str(cache))


@pytest.fixture
def loaded(monkeypatch) -> list[str]:
    """The names of the encoders that were loaded."""
    names: list[str] = []
    for name in ("load_text_encoder_1", "load_text_encoder_2"):
        plain = getattr(encoding, name)
        monkeypatch.setattr(encoding, name, lambda *a, _name=name, _plain=plain, **k: names.append(_name) or _plain(*a, **k))
    return names


def files(settings: TextEncoderSettings) -> set[str]:
    return {path.name for path in Path(settings.text_cache).iterdir()}


def same(first: list, second: list) -> bool:
    return all(torch.equal(a, b) for one, other in zip(first, second, strict=True) for a, b in zip(one, other, strict=True))


def test_known_prompts_load_no_encoder_and_are_equal_to_the_bit(settings, loaded):
    plain = encode_prompts(PROMPTS, replace(settings, text_cache=None), CPU)
    assert same(encode_prompts(PROMPTS, settings, CPU), plain) and len(files(settings)) == 3
    loaded.clear()
    assert same(encode_prompts(PROMPTS, settings, CPU), plain) and not loaded
    encode_prompts([*PROMPTS, "another"], settings, CPU)
    assert loaded == ["load_text_encoder_2", "load_text_encoder_1"] and len(files(settings)) == 4


def test_known_states_lie_as_new_ones_do(settings):
    """Products of a tensor that begins anywhere in a mapped file differ in the last bits."""
    encode_prompts(PROMPTS, settings, CPU)
    assert {tensor.data_ptr() % 64 for conditions in encode_prompts(PROMPTS, settings, CPU) for tensor in conditions} == {0}


def test_other_encoders_and_precisions_are_not_mixed_up(settings, loaded):
    for changed in (settings, replace(settings, text_encoder_dtype=torch.bfloat16), replace(settings, fp8_llm=True)):
        loaded.clear()
        known = files(settings)
        plain = encode_prompts(PROMPTS[:1], replace(changed, text_cache=None), CPU)
        loaded.clear()
        assert same(encode_prompts(PROMPTS[:1], changed, CPU), plain) and loaded and len(files(settings) - known) == 1


def test_a_damaged_file_is_made_again(settings, loaded, caplog):
    plain = encode_prompts(PROMPTS[:1], settings, CPU)
    (path,) = Path(settings.text_cache).iterdir()
    path.write_bytes(path.read_bytes()[:100])
    loaded.clear()
    assert same(encode_prompts(PROMPTS[:1], settings, CPU), plain) and loaded and "is encoded again" in caplog.text
    loaded.clear()
    encode_prompts(PROMPTS[:1], settings, CPU)
    assert not loaded
