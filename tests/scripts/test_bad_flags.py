"""Flags that cannot work: every script answers in one sentence that names the flag, with status 2, before anything is loaded."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from bench import picture, refused

import hunyuan_model

GOLDENS = Path(__file__).resolve().parents[1] / "goldens"
LORA = GOLDENS / "lora.safetensors"
BEYOND = "9" * 20
NOT_UTF8 = os.fsdecode(b"caf\xe9") if sys.platform == "linux" else None

LATENTS, TEXTS, TRAIN, GENERATE, CONVERT = (
    "cache_latents",
    "cache_text_encoder_outputs",
    "hv_train_network",
    "hv_generate_video",
    "convert_lora",
)

# script, flags that follow a command line without fault, what the answer holds
ROWS = [
    (LATENTS, ["--batch_size", 0], ["--batch_size", "not a whole number of at least 1"]),
    (LATENTS, ["--vae_chunk_size", BEYOND], ["--vae_chunk_size", "too large for a whole number"]),
    (LATENTS, ["--debug_mode", "console", "--console_width", 2000], ["--console_width", "from 1 to 1000"]),
    (LATENTS, ["--preview_latents"], ["--preview_latents", "--debug_mode html"]),
    (LATENTS, ["--debug_mode", "console", "--console_back", "pink"], ["--console_back", "invalid choice: 'PINK'"]),
    (LATENTS, ["--vae_dtype", "float64"], ["--vae_dtype", "'float64'; use float32"]),
    (LATENTS, ["--device", "cuda:x"], ["--device", "'cuda:x'; use cpu"]),
    (LATENTS, ["--vae_tilin"], ["unrecognized arguments: --vae_tilin"]),
    (LATENTS, ["--dataset_config", "y" * 300], ["dataset config not found"]),
    (LATENTS, ["--config_file", "nowhere.toml"], ["--config_file not found", "nowhere.toml"]),
    (TEXTS, ["--text_encoder_dtype", "8"], ["--text_encoder_dtype", "use float32"]),
    (TEXTS, ["--tokenizer1", "no/such/folder"], ["--tokenizer1 no/such/folder", "Give a folder"]),
    (TEXTS, ["--text_encoder2", "/dev/null"], ["--text_encoder2", "not a regular file"]),
    (TRAIN, ["--max_train_steps", "1e3"], ["--max_train_steps", "'1e3' is not a whole number"]),
    (TRAIN, ["--learning_rate", "fast"], ["--learning_rate", "'fast' is not a finite number"]),
    (TRAIN, ["--fp8_scaled"], ["--fp8_scaled says how --fp8_base is done; give --fp8_base"]),
    (TRAIN, ["--fp8_base", "--fp8_fast"], ["--fp8_fast", "compute capability 8.9", "runs on cpu"]),
    (TRAIN, ["--blocks_to_swap", "most"], ["--blocks_to_swap", "'most' is not a whole number"]),
    (TRAIN, ["--timestep_sampling", "logit"], ["--timestep_sampling", "'logit'", "sigmoid"]),
    (TRAIN, ["--lr_warmup_steps", "soon"], ["--lr_warmup_steps", "'soon'", "percentage"]),
    (TRAIN, ["--lr_scheduler", "cosine", "--lr_warmup_steps", "150%"], ["--lr_warmup_steps 150%", "the training has 4"]),
    (TRAIN, ["--lr_scheduler", "polynomial", "--lr_scheduler_power", -1], ["--lr_scheduler_power", "at least 0"]),
    (TRAIN, ["--lr_scheduler_args", "x"], ["--lr_scheduler_args", "key=value"]),
    (TRAIN, ["--optimizer_args", "eps=1e-8", "eps=1e-7"], ["--optimizer_args", "'eps' twice"]),
    (TRAIN, ["--optimizer_args", "betas=0.9"], ["the optimizer adamw", "betas=0.9"]),
    (TRAIN, ["--network_args", "exclude_patterns=['a{99999999999}']"], ["--network_args", "list of regular expressions"]),
    (TRAIN, ["--network_args", "module_dropout=1.0"], ["module_dropout", "below 1"]),
    (TRAIN, ["--network_args", "exclude_patterns=['.*']"], ["no linear layer is left", "exclude_patterns"]),
    (TRAIN, ["--training_comment", NOT_UTF8], ["--training_comment", "not UTF-8"]),
    (GENERATE, ["--video_size", 250, 256], ["use 256 x 256"]),
    (GENERATE, ["--video_length", 4], ["not 4n + 1"]),
    (GENERATE, ["--dit", "nowhere.safetensors"], ["does not exist"]),
    (GENERATE, ["--lora_weight", "nowhere.safetensors"], ["nowhere.safetensors"]),
    (GENERATE, ["--lora_multiplier", 0.5, 0.7], ["more values (2) than --lora_weight"]),
    (GENERATE, ["--vae_spatial_tile_sample_min_size", 100], ["multiple of 32"]),
    (GENERATE, ["--embedded_cfg_scale", "1e38"], ["--embedded_cfg_scale", "too large"]),
    (GENERATE, ["--flow_shift", 0], ["not a finite number above 0"]),
    (GENERATE, ["--device", "mps"], ["does not know 'mps'"]),
    (GENERATE, ["--video_size", 256], ["--video_size", "expected 2 arguments"]),
    (GENERATE, ["--video_size", 0, 0], ["0 x 0", "use 16 x 16"]),
    (GENERATE, ["--video_length", 400_000_001], ["400000001 frames", "smaller or shorter"]),
    (GENERATE, ["--infer_steps", 20_000], ["--infer_steps", "from 1 to 10000"]),
    (GENERATE, ["--blocks_to_swap", 99], ["--blocks_to_swap 99 is more than", "Use at most 4"]),
    (GENERATE, ["--fp8_fast"], ["--fp8_fast says how --fp8 is done; give --fp8 as well"]),
    (GENERATE, ["--latent_path", "none.safetensors"], ["--latent_path not found", "none.safetensors"]),
    (GENERATE, ["--latent_path", LORA], ["--latent_path", "holds no tensor named latent"]),
    (GENERATE, ["--save_merged_model", "x.safetensors"], ["--save_merged_model needs --lora_weight"]),
    (GENERATE, ["--lora_weight", LORA, "--save_merged_model", "x.pt"], [".safetensors file", "x.pt"]),
    (CONVERT, ["--target", "comfi"], ["--target", "'comfi'", "other"]),
    (CONVERT, ["--input", GOLDENS], ["must be a file", "is a folder"]),
    (CONVERT, ["--input", GOLDENS / "dit.pt"], ["dit.pt is not a readable safetensors file", "Save it as safetensors"]),
]


@pytest.mark.parametrize(
    ("script", "flags", "says"), ROWS, ids=[f"{script} {' '.join(map(str, flags))}"[:70] for script, flags, _ in ROWS]
)
def test_a_flag_that_cannot_work_is_named(bench, monkeypatch, script, flags, says):
    for name in ("load_transformer", "load_vae", "load_text_encoder_1", "load_text_encoder_2"):
        monkeypatch.setattr(hunyuan_model, name, lambda *_a, **_k: pytest.fail("a model was loaded before the flags were checked"))
    if None in flags or ("/dev/null" in flags and not os.path.exists("/dev/null")):
        pytest.skip("other systems have no such bytes and devices")
    run = {
        LATENTS: lambda: bench.latents(bench.media("image", a_png=picture()), *flags),
        TEXTS: lambda: bench.texts(bench.media("image", a_png=picture()), *flags),
        TRAIN: lambda: bench.train(*flags),
        GENERATE: lambda: bench.generate(*flags),
        CONVERT: lambda: bench.convert(LORA, bench.folder / "out" / "x.safetensors", *flags),
    }
    ended = run[script]()
    refused(ended, *says)
    assert len(ended.stderr.splitlines()[-1]) < 600
    assert not any((bench.folder / name).exists() for name in ("out", "cache"))


@pytest.mark.parametrize(
    ("script", "flag"), [(LATENTS, "--dataset_config"), (TEXTS, "--text_encoder1"), (CONVERT, "--input"), (CONVERT, "--target")]
)
def test_a_required_flag_that_is_missing_is_named(call_script, script, flag):
    given = {LATENTS: ["--vae", "x"], TEXTS: ["--dataset_config", "x"], CONVERT: ["--output", "x.safetensors"]}
    ended = call_script(script, *given[script])
    assert ended.status == 2 and "required" in ended.stderr.splitlines()[-1] and flag in ended.stderr.splitlines()[-1]
