"""A folder with a whole pipeline of diffusers, given to every flag: the same caches, LoRA and latents as with single files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.diffusers_twins import diffusers_transformer
from hunyuan_model import load_transformer


@pytest.fixture
def pipeline(bench) -> Path:
    folder, model = bench.folder / "HunyuanVideo", bench.model
    ours = load_transformer(model.dit, device="cpu", dtype=torch.float32)
    diffusers_transformer(ours).save_pretrained(folder / "transformer", max_shard_size="500KB")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "HunyuanVideoPipeline"}), encoding="utf-8")
    for part, source in {"vae": model.vae, "text_encoder": model.text_encoder1, "text_encoder_2": model.text_encoder2}.items():
        shutil.copytree(source, folder / part)
    return folder


def test_training_and_generation(bench, pipeline):
    flags = ["--vae", pipeline, "--text_encoder1", pipeline, "--text_encoder2", pipeline]
    found = []
    for dit, others, name in ((bench.model.dit, [], "single"), (pipeline, flags, "folder")):
        trained = bench.train("--dit", dit, "--network_dim", 2, "--seed", 5, "--output_name", name, "--learning_rate", 1e-2)
        assert trained.status == 0, trained.stderr
        lora = bench.folder / "out" / f"{name}.safetensors"
        generated = bench.generate(
            "--dit", dit, *others, "--lora_weight", lora, "--seed", 1, "--output_type", "latent", "--save_path", bench.folder / name
        )
        assert generated.status == 0, generated.stderr
        found.append((load_file(lora), load_file(next((bench.folder / name).glob("*.safetensors")))))
    (lora, latents), (lora_of_folder, latents_of_folder) = found
    assert all(torch.equal(lora[name], lora_of_folder[name]) for name in lora)
    assert torch.equal(latents["latent"], latents_of_folder["latent"])


def test_caches(bench, pipeline, tiny_dataset):
    """With the fingerprints of the same weights as single files: caches made with these are kept."""
    first = bench.latents(tiny_dataset)
    assert first.status == 0, first.stderr
    bench.texts(tiny_dataset)
    bench.model = type(bench.model)(bench.model.dit, pipeline, pipeline, pipeline)
    bench.encoders = ["--text_encoder1", pipeline, "--text_encoder2", pipeline]
    before = {path: path.stat().st_mtime_ns for path in tiny_dataset.parent.rglob("*_hv*.safetensors")}
    assert before
    for again in (bench.latents(tiny_dataset, "--skip_existing"), bench.texts(tiny_dataset, "--skip_existing")):
        assert again.status == 0, again.stderr
    assert before == {path: path.stat().st_mtime_ns for path in tiny_dataset.parent.rglob("*_hv*.safetensors")}
