"""LoRA files of every kind through the scripts: merged or injected in generation, and as base weights of a training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bench import refused
from safetensors.torch import load_file, save_file

import hv_generate_video
from tiny.variants import write_lora_of_every_kind


@pytest.fixture
def lora(tiny_model, tmp_path) -> Path:
    path = tmp_path / "kinds.safetensors"
    write_lora_of_every_kind(tiny_model.dit, path)
    return path


@pytest.fixture
def sampled(bench, tmp_path):
    """``sampled(*flags)`` is the latent that generation makes."""

    def run(*flags: object) -> torch.Tensor:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        ended = bench.generate("--output_type", "latent", "--seed", 1, "--save_path", folder, *flags)
        assert ended.status == 0, ended.stderr
        (path,) = folder.glob("*_latent.safetensors")
        return load_file(path)["latent"]

    return run


def test_merged_and_injected_are_the_same(sampled, lora):
    base, merged = sampled(), sampled("--lora_weight", lora)
    assert (merged - base).norm() > 0.1 * base.norm()
    injected = ("--lora_weight", lora, "--lora_mode", "inject")
    assert (sampled(*injected) - merged).norm() < 1e-4 * merged.norm()
    assert torch.equal(sampled(*injected, "--blocks_to_swap", 1), sampled(*injected))
    assert torch.equal(sampled(*injected, "--lora_multiplier", 0), base)


def test_base_weights_are_the_merged_model(bench, lora, call_script, tiny_model, tmp_path):
    """A training on them equals one on the model that they were merged into."""
    merged = tmp_path / "merged" / "dit.safetensors"
    assert (
        call_script("hv_generate_video", "--dit", tiny_model.dit, "--lora_weight", lora, "--save_merged_model", merged).status == 0
    )
    trained = []
    for flags in ((), ("--base_weights", lora), ("--dit", merged)):
        ended = bench.train(*flags, "--seed", 1, "--learning_rate", 1e-2)
        assert ended.status == 0, ended.stderr
        trained.append(torch.cat([value.flatten() for value in load_file(bench.folder / "out" / "x.safetensors").values()]))
    plain, beside, on_merged = trained
    assert torch.equal(beside, on_merged) and not torch.allclose(beside, plain, atol=1e-4)


def test_what_does_not_fit_is_refused_before_anything_is_loaded(bench, lora, monkeypatch, sampled, caplog):
    monkeypatch.setattr(hv_generate_video, "Batch", lambda *_: pytest.fail("it begins"))
    partly = lora.with_name("partly.safetensors")
    tensors = load_file(lora)
    save_file({**tensors, "diffusion_model.double_blocks.99.img_attn_proj.diff": torch.ones(2, 2)}, partly)
    refused(bench.generate("--lora_weight", lora, partly), "partly.safetensors", "not in it", "--lora_partial")
    refused(bench.train("--base_weights", partly), "partly.safetensors", "not in it", "--lora_partial")
    monkeypatch.undo()
    used = sampled("--lora_weight", partly, "--lora_partial")
    assert caplog.text.count("They are left out") == 1
    assert torch.equal(used, sampled("--lora_weight", lora))


def test_how_to_apply_a_lora_is_without_effect_where_none_is_given(sampled, caplog):
    sampled("--lora_mode", "inject", "--lora_partial")
    assert caplog.text.count("--lora_mode, --lora_partial: no effect with no --lora_weight") == 1
