"""Fingerprints tell checkpoints and tokenizers apart, wherever and in whatever format they lie."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from hunyuan_model import load_tokenizers
from hunyuan_model.checkpoints.fingerprint import fingerprint_weights
from hunyuan_model.checkpoints.reading import open_checkpoint
from hunyuan_model.text.arguments import TextEncoderSettings
from hunyuan_model.text.tokenizers import fingerprint_tokenizer


def fingerprint_of(path: Path) -> str:
    return fingerprint_weights(open_checkpoint(path, "--vae"))


def test_weights_are_told_by_their_values_and_not_by_path_or_format(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {"a": torch.randn(40, 30, generator=generator), "b": torch.randn(3, generator=generator), "c": torch.zeros(0)}
    tensors["d"] = torch.randn(4, 5, generator=generator).bfloat16()
    save_file(tensors, tmp_path / "one.safetensors")
    first = fingerprint_of(tmp_path / "one.safetensors")
    (tmp_path / "folder").mkdir()
    shutil.move(tmp_path / "one.safetensors", tmp_path / "folder" / "model.safetensors")
    torch.save({"state_dict": tensors}, tmp_path / "one.pt")
    assert fingerprint_of(tmp_path / "folder") == fingerprint_of(tmp_path / "one.pt") == first
    others = [
        tensors | {"a": tensors["a"] * 1.01},
        tensors | {"b": tensors["b"].half()},
        tensors | {"c": torch.zeros(0, 1)},
        {("e" if name == "d" else name): tensor for name, tensor in tensors.items()},
    ]
    for other in others:
        save_file(other, tmp_path / "other.safetensors")
        assert fingerprint_of(tmp_path / "other.safetensors") != first


def test_tokenizers_are_told_by_what_they_do(tiny_model, tmp_path):
    one, two = load_tokenizers(TextEncoderSettings(tiny_model.text_encoder1, tiny_model.text_encoder2, torch.float32))
    assert fingerprint_tokenizer(one) != fingerprint_tokenizer(two)
    first = fingerprint_tokenizer(one)
    one(["a cat", "a dog that runs"], truncation=True, max_length=2)  # which the library remembers
    assert fingerprint_tokenizer(one) == first
    one.add_tokens(["zorp"])
    assert fingerprint_tokenizer(one) != first
