"""A transformer without guidance embedding, as of models that are not distilled: trained, sampled and generated with."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file

from hunyuan_model import check_transformer_file


@pytest.fixture
def plain(bench):
    def drop_guidance(tensors):
        for name in [name for name in tensors if name.startswith("guidance_in.")]:
            del tensors[name]

    return bench.changed(bench.model.dit, drop_guidance, "plain.safetensors")


def test_a_model_without_guidance_embedding(bench, plain, caplog):
    assert not check_transformer_file(plain).guidance
    prompts = bench.write("prompts.txt", "a cat --w 32 --h 32 --s 1 --g 4")
    samples = ["--sample_prompts", prompts, "--sample_at_first", "--vae", bench.model.vae, *bench.encoders]
    trained = bench.train("--dit", plain, "--network_dim", 2, "--guidance_scale", 3, *samples)
    assert trained.status == 0, trained.stderr
    says = "--guidance_scale and the guidance of sample prompts: no effect, as the transformer in --dit has no guidance embedding."
    assert caplog.text.count("no effect") == caplog.text.count(says) == 1
    lora = bench.folder / "out" / "x.safetensors"
    assert not any("guidance" in name for name in load_file(lora))
    generated = bench.generate("--dit", plain, "--lora_weight", lora, "--embedded_cfg_scale", 2, "--output_type", "latent")
    assert generated.status == 0, generated.stderr
    guided = bench.generate("--dit", plain, "--guidance_scale", 3, "--negative_prompt", "blue", "--output_type", "latent")
    assert guided.status == 0, guided.stderr
    assert caplog.text.count("--embedded_cfg_scale: no effect, as the transformer in --dit has no guidance embedding.") == 1


def test_a_guidance_that_is_not_set_is_no_subject(bench, plain, caplog):
    generated = bench.generate("--dit", plain, "--output_type", "latent")
    assert generated.status == 0 and "no effect" not in caplog.text, generated.stderr
