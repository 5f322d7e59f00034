"""What is in memory while a video is made: one network at a time, and nothing of a LoRA beside the weights it was merged into."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from bench import picture, refused

import hunyuan_model
from hunyuan_model.sampling import decoding, generation
from hunyuan_model.text import encoding as prompt_encoding
from hunyuan_model.text import llm
from hunyuan_model.vae import loading as vae_loading
from networks import merging
from tiny.variants import write_lora


@pytest.fixture
def generate(bench, tmp_path):
    def run(*flags: object) -> None:
        ended = bench.generate("--output_type", "images", *flags)
        assert ended.status == 0, ended.stderr

    return run


def keep_track(
    monkeypatch: pytest.MonkeyPatch, owner: object, name: str, alive: dict[str, weakref.ref], expected: set[str]
) -> None:
    """Add what a loader returns to ``alive``, once it was seen that of those before only ``expected`` are left."""
    plain: Callable = getattr(owner, name)

    def load(*arguments: object, **options: object) -> torch.nn.Module:
        left = {loaded for loaded, model in alive.items() if model() is not None}
        assert left == expected, f"{name} begins while {left} are in memory"
        model = plain(*arguments, **options)
        alive[name] = weakref.ref(next(model.parameters() if isinstance(model, torch.nn.Module) else model.model.parameters()))
        return model

    monkeypatch.setattr(owner, name, load)


def test_one_network_at_a_time(generate, monkeypatch):
    """Its first weight stands for a network."""
    alive: dict[str, weakref.ref] = {}
    for owner, name in (
        (prompt_encoding, "load_text_encoder_2"),
        (prompt_encoding, "load_text_encoder_1"),
        (hunyuan_model, "load_transformer"),
        (decoding, "load_vae"),
    ):
        keep_track(monkeypatch, owner, name, alive, set())
    generate("--step_cache", 0.1, "--infer_steps", 4)
    assert list(alive) == ["load_text_encoder_2", "load_text_encoder_1", "load_transformer", "load_vae"]


def test_a_lora_is_in_the_weights_and_nowhere_else(generate, tiny_model, monkeypatch, tmp_path):
    write_lora(tiny_model.dit, tmp_path / "lora.safetensors")
    read, found = [], []
    plain_read, plain_sample = merging.read_lora, generation.sample_latents

    def read_lora(path, **options):
        lora = plain_read(path, **options)
        read.extend(weakref.ref(tensor) for placed in lora.updates for tensor in (placed.update.down, placed.update.up))
        return lora

    def sample_latents(transformer, *arguments, **options):
        assert read and all(tensor() is None for tensor in read), "the LoRA's own tensors are still in memory"
        assert not any("forward" in vars(module) or module._forward_hooks for module in transformer.modules())
        found.append({name: weight.clone() for name, weight in transformer.state_dict().items()})
        return plain_sample(transformer, *arguments, **options)

    monkeypatch.setattr(merging, "read_lora", read_lora)
    monkeypatch.setattr(generation, "sample_latents", sample_latents)
    generate("--lora_weight", tmp_path / "lora.safetensors")
    base = hunyuan_model.load_transformer(tiny_model.dit, device="cpu", dtype=torch.float32).state_dict()
    changed = {name for name in base if not torch.equal(base[name], found[0][name])}
    assert found[0].keys() == base.keys() and changed
    assert all(name.endswith("weight") for name in changed)


@pytest.mark.parametrize(("model", "loads"), [(llm, "loading text encoder 1"), (vae_loading, "loading the VAE")])
def test_out_of_memory_while_a_model_loads_is_one_sentence(bench, monkeypatch, model, loads):
    def load_weights(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(model, "load_weights", load_weights)
    refused(bench.generate(), f"out of memory while {loads}", "use --fp8_llm" if model is llm else "close other programs")
    if model is vae_loading:
        refused(bench.latents(bench.media("image", a_png=picture())), f"out of memory while {loads}")
