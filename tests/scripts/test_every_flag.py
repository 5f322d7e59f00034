"""Every flag of hv_train_network.py does what it says: a row for each, with an effect that is measured.

A row is trained twice for two steps, with the flag and without it; rows of distributions and schedules only compute these.
"""

from __future__ import annotations

import shutil
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from conftest import write_caches
from flag_effects import (
    about,
    alphas,
    asked_of_the_hub,
    becomes,
    begins_with_a_dry_step,
    begins_with_the_file,
    blocks,
    both,
    column,
    computes_in,
    differs,
    every_four_cover_the_range,
    half_the_memory,
    is_nowhere,
    keeps_float8,
    keeps_scales,
    largest_update,
    length_of_first_step,
    logged_steps,
    logs,
    lora,
    lora_dtypes,
    narrower,
    numbers,
    offloads,
    prints,
    process_timeout,
    quantile,
    ranks,
    rates,
    refused,
    removes,
    sample,
    seen,
    stays,
    swaps,
    told_to_wandb,
    trains_timesteps_in,
    trains_whole_timesteps,
    writes,
)
from flag_rows import Bench, Row, check_rows, rows_as_parameters, write_lora, write_other_models
from pytest import approx

SCRIPT = "hv_train_network"
BASE = (
    "--dataset_config {data}/dataset.toml --dit {model}/dit.safetensors --output_dir {out} --output_name lora --seed 3 "
    "--max_data_loader_n_workers 0 --max_train_steps 2 --learning_rate 1e-2 --loss_log {out}/loss.csv"
)
EAGER = "--optimizer_type SGD --dataset_config {data}/pictures.toml"  # what is compared with compiled blocks
KEY = "0123456789abcdef0123456789abcdef01234567"


other_lora, same_lora = differs(lora), stays(lora)
other_sample = differs(sample)

SAVES = (
    "--dataset_config {data}/pictures.toml --max_train_steps 4 --save_every_n_steps 1 --save_every_n_epochs 1 --save_state "
    "--network_dim 1"
)
MODELS = "--vae {model}/vae --text_encoder1 {model}/text_encoder --text_encoder2 {model}/text_encoder_2"
PROMPTS = "--dataset_config {data}/pictures.toml --max_train_steps 1 --sample_prompts {data}/prompts.txt " + MODELS
SAMPLES = f"{PROMPTS} --sample_at_first"
TENSORBOARD = "--logging_dir {out}/logs"
WANDB = "--log_with wandb --log_config"
REPOSITORY = "--huggingface_repo_id me/loras"

ROWS = (
    # Input
    Row("--config_file {data}/flags.toml", becomes(ranks, {2})),
    Row("--dataset_config {data}/pictures.toml", becomes(about("ss_num_train_items"), "2")),
    Row("--dit {data}/other.safetensors", both(becomes(about("ss_sd_model_name"), "other.safetensors"), other_lora)),
    Row("--dit_dtype bfloat16", both(computes_in(torch.bfloat16, "transformer"), other_lora)),
    # Attention
    Row("--sdpa", same_lora),  # what is used anyway
    Row("--flash_attn", refused("--flash_attn needs a CUDA device")),
    Row("--sage_attn", refused("--sage_attn cannot train")),
    Row("--xformers", refused("--xformers needs a CUDA device")),
    Row("--split_attn", both(stays(lora, within=1e-4), becomes(seen("attended"), 8 + 3))),  # of the clip, and not of two pictures
    # Memory
    Row("--fp8_base", both(keeps_float8("transformer"), other_lora)),
    Row("--fp8_scaled", both(keeps_scales("transformer"), other_lora), beside="--fp8_base"),
    Row("--fp8_fast", refused("--fp8_fast multiplies in float8"), beside="--fp8_base"),
    Row("--gradient_checkpointing", both(stays(lora, within=1e-4), half_the_memory)),
    Row(
        "--gradient_checkpointing_cpu_offload",
        both(same_lora, offloads),
        beside="--gradient_checkpointing",
    ),
    Row("--blocks_to_swap 1", both(same_lora, swaps("single_blocks.0", "single_blocks.1", "single_blocks.3"))),  # 1 + two slots
    Row("--img_in_txt_in_offloading", both(same_lora, swaps("img_in", "txt_in"))),
    Row("--no_pinned_swap_memory", both(same_lora, becomes(seen("pinned"), {False})), beside="--blocks_to_swap 1"),
    Row("--dry_step always", both(same_lora, begins_with_a_dry_step)),
    # Speed
    Row("--compile", both(becomes(seen("compiled"), {"default"}), stays(lora, within=1e-4)), beside=EAGER),
    Row(
        "--compile_mode max-autotune-no-cudagraphs",
        becomes(seen("compiled"), {"max-autotune-no-cudagraphs"}),
        beside="--compile --max_train_steps 1",
    ),
    Row("--tf32", both(logs("--tf32: no effect on cpu"), same_lora)),
    Row("--cudnn_benchmark", both(logs("--cudnn_benchmark: no effect on cpu"), same_lora)),
    # Training loop; two batches make an epoch
    Row("--max_train_steps 3", becomes(column("step"), ["1", "2", "3"])),
    Row("--max_train_epochs 2", becomes(column("step"), ["1", "2", "3", "4"])),
    Row("--gradient_accumulation_steps 2", becomes(column("epoch"), ["1", "2"])),
    Row("--mixed_precision bf16", both(becomes(about("ss_mixed_precision"), "bf16"), becomes(lora_dtypes, {torch.bfloat16}))),
    Row("--mixed_precision fp16", refused("--mixed_precision fp16 needs a CUDA device")),
    Row("--validation_split 0.5", becomes(column("validation_loss", bool), [False, True])),
    Row("--validate_every_n_steps 1", becomes(column("validation_loss", bool), [True, True]), beside="--validation_split 0.5"),
    Row("--seed 4", both(becomes(about("ss_seed"), "4"), other_lora)),
    Row("--max_data_loader_n_workers 1", both(becomes(seen("processes"), 1), same_lora)),
    Row(
        "--persistent_data_loader_workers",
        both(becomes(seen("processes"), 1), same_lora),
        beside="--max_data_loader_n_workers 1 --max_train_steps 3",
    ),
    # Optimiser and learning rate
    Row("--optimizer_type SGD", both(becomes(about("ss_optimizer"), "torch.optim.sgd.SGD"), other_lora)),
    Row(
        "--optimizer_args weight_decay=0.5",
        both(becomes(about("ss_optimizer"), "torch.optim.adamw.AdamW(weight_decay=0.5)"), other_lora),
    ),
    Row("--learning_rate 2e-3", both(becomes(column("learning_rate", float), [0.002, 0.002]), other_lora)),
    Row(
        "--max_grad_norm 1e-3",
        becomes(length_of_first_step, approx(1e-3, rel=1e-3)),
        beside="--optimizer_type SGD --learning_rate 1 --max_train_steps 1",
    ),
    Row("--lr_scheduler linear", becomes(column("learning_rate", float), [0.01, 0.005])),
    Row("--lr_warmup_steps 2", becomes(rates, [0.0, 0.005]), beside="--lr_scheduler constant_with_warmup"),
    Row("--lr_decay_steps 2", becomes(rates, approx([0.01, 0.005])), beside="--lr_scheduler warmup_stable_decay"),
    Row("--lr_scheduler_num_cycles 2", becomes(rates, approx([0.01, 0.01])), beside="--lr_scheduler cosine_with_restarts"),
    Row("--lr_scheduler_power 2", becomes(rates, approx([0.01, 0.0025], rel=1e-3)), beside="--lr_scheduler polynomial"),
    Row("--lr_scheduler_timescale 3", becomes(rates, approx([0.01, 0.01 * 0.75**0.5])), beside="--lr_scheduler inverse_sqrt"),
    Row("--lr_scheduler_min_lr_ratio 0.5", becomes(rates, approx([0.01, 0.0075])), beside="--lr_scheduler cosine_with_min_lr"),
    Row("--lr_scheduler_type torch.optim.lr_scheduler.LinearLR", becomes(rates, approx([0.01 / 3, 0.014 / 3]))),
    Row(
        "--lr_scheduler_args start_factor=0.5",
        becomes(rates, approx([0.005, 0.006])),
        beside="--lr_scheduler_type torch.optim.lr_scheduler.LinearLR",
    ),
    # Flow matching
    Row("--guidance_scale 6", both(becomes(seen("guidance"), {6000.0}), other_lora)),
    Row("--timestep_sampling uniform", becomes(trains_whole_timesteps, False)),
    Row("--discrete_flow_shift 7", quantile(0.5, 0.875), beside="--timestep_sampling shift"),
    Row("--sigmoid_scale 3", quantile(0.75, 0.883), beside="--timestep_sampling sigmoid"),
    Row("--weighting_scheme logit_normal", quantile(0.75, 0.662)),
    Row("--logit_mean 1", quantile(0.5, 0.269), beside="--weighting_scheme logit_normal"),
    Row("--logit_std 2", quantile(0.75, 0.794), beside="--weighting_scheme logit_normal"),
    Row("--mode_scale 0.5", quantile(0.25, 0.302), beside="--weighting_scheme mode"),
    Row("--show_timesteps console", both(prints("0-50"), removes("lora.safetensors"))),
    Row("--min_timestep 990", trains_timesteps_in(990, 1000)),
    Row("--max_timestep 10", trains_timesteps_in(0, 10)),
    Row("--preserve_distribution_shape", quantile(0.5, 0.662), beside="--timestep_sampling sigmoid --min_timestep 500"),
    Row("--num_timestep_buckets 4", becomes(every_four_cover_the_range, True), beside="--timestep_sampling uniform"),
    # Network
    Row("--network_module network_of_rank_3", both(becomes(about("ss_network_module"), "network_of_rank_3"), becomes(ranks, {3}))),
    Row(
        "--network_weights {data}/rank3.safetensors",
        begins_with_the_file,
        beside="--network_dim 3 --learning_rate 1e-9",
    ),
    Row("--network_dim 2", becomes(ranks, {2})),
    Row("--network_alpha 2", both(becomes(alphas, {2.0}), other_lora)),
    Row("--network_dropout 0.5", both(becomes(about("ss_network_dropout"), "0.5"), other_lora)),
    Row("--network_args exclude_patterns=['.*single.*']", becomes(blocks, {"double_blocks"})),
    Row(
        "--dim_from_weights",  # refused without it: the ranks differ
        both(becomes(ranks, {3}), becomes(alphas, {3.0})),
        beside="--network_weights {data}/rank3.safetensors",
    ),
    Row("--scale_weight_norms 0.01", becomes(lambda run: largest_update(run) <= 0.0101, True), beside="--learning_rate 0.1"),
    Row("--base_weights {data}/rank3.safetensors", other_lora),
    Row("--base_weights_multiplier 0 --base_weights {data}/rank3.safetensors", same_lora),  # as without any
    # Output
    Row("--output_dir {out}/elsewhere", writes("elsewhere/lora.safetensors")),
    Row("--output_name other", both(writes("other.safetensors"), removes("lora.safetensors"))),
    Row("--save_every_n_epochs 1", writes("lora-000001.safetensors"), beside="--max_train_steps 3"),
    Row("--save_every_n_steps 1", writes("lora-step00000001.safetensors")),
    Row("--save_last_n_epochs 1", becomes(numbers("lora-??????.safetensors"), [3]), beside=SAVES),
    Row("--save_last_n_epochs_state 1", becomes(numbers("lora-??????-state"), [3]), beside=SAVES),
    Row("--save_last_n_steps 1", becomes(numbers("lora-step*.safetensors"), [2, 3]), beside=SAVES),
    Row("--save_last_n_steps_state 1", becomes(numbers("lora-step*-state"), [2, 3]), beside=SAVES),
    Row("--save_state", both(writes("lora-state"), writes("lora-step00000001-state")), beside="--save_every_n_steps 1"),
    Row("--save_state_on_train_end", writes("lora-state")),
    Row("--resume {data}/state", both(becomes(column("step"), ["3"]), same_lora), beside="--max_train_steps 3"),
    Row("--save_precision bf16", becomes(lora_dtypes, {torch.bfloat16})),
    Row("--loss_log {out}/other.csv", writes("other.csv")),
    # Samples while training
    Row("--sample_prompts {data}/prompts.txt", writes("sample/lora_000000_00_*_7.png"), beside=f"{MODELS} --sample_at_first"),
    Row("--sample_at_first", writes("sample/lora_000000_00_*_7.png"), beside=PROMPTS),
    Row("--sample_every_n_steps 1", writes("sample/lora_000001_00_*_7.png"), beside=PROMPTS),
    Row("--sample_every_n_epochs 1", writes("sample/lora_e000001_00_*_7.png"), beside=PROMPTS),
    Row("--vae {data}/other_vae", other_sample, beside=SAMPLES),
    Row("--vae_dtype bfloat16", both(computes_in(torch.bfloat16, "vae"), other_sample), beside=SAMPLES),
    Row("--vae_tiling", other_sample, beside=f"{SAMPLES} --sample_prompts {{data}}/wide.txt"),  # wider than a tile of 256
    Row("--vae_chunk_size 8", both(stays(sample, within=1), narrower), beside=SAMPLES),
    Row("--vae_spatial_tile_sample_min_size 32", other_sample, beside=SAMPLES),
    Row("--text_encoder1 {data}/other_text_encoder", other_sample, beside=SAMPLES),
    Row("--text_encoder2 {data}/other_text_encoder_2", other_sample, beside=SAMPLES),
    Row("--tokenizer1 {data}/tokenizer1", other_sample, beside=SAMPLES),
    Row("--tokenizer2 {data}/tokenizer2", other_sample, beside=SAMPLES),
    Row("--text_encoder_dtype bfloat16", computes_in(torch.bfloat16, "text encoder 1", "text encoder 2"), beside=SAMPLES),
    Row("--fp8_llm", keeps_float8("text encoder 1"), beside=SAMPLES),
    # Logs
    Row("--logging_dir {out}/logs", becomes(logged_steps, [1, 2])),
    Row("--log_with wandb", becomes(told_to_wandb("steps"), [1, 2])),
    Row("--log_prefix night-", writes("logs/night-*/network_train"), beside=TENSORBOARD),
    Row("--log_tracker_name zorp", writes("logs/*/zorp"), beside=TENSORBOARD),
    Row(
        "--log_tracker_config {data}/trackers.toml",
        becomes(lambda run: run.done.seen.writers[0].options.get("max_queue"), 1),
        beside=TENSORBOARD,
    ),
    Row("--wandb_run_name night", becomes(told_to_wandb("name"), "night"), beside="--log_with wandb"),
    Row(
        f"--wandb_api_key {KEY}", both(becomes(told_to_wandb("key"), KEY), is_nowhere(KEY)), beside="--log_with wandb --log_config"
    ),
    Row("--log_config", becomes(lambda run: "| seed | 3 |" in str(run.done.seen.writers[0].texts), True), beside=TENSORBOARD),
    # Metadata of the saved file
    Row("--training_comment Über_Nacht", becomes(about("ss_training_comment"), "Über_Nacht")),
    Row("--no_metadata", becomes(about("ss_learning_rate"), None)),
    Row("--metadata_title Zorp", becomes(about("modelspec.title"), "Zorp")),
    Row("--metadata_author Ada", becomes(about("modelspec.author"), "Ada")),
    Row("--metadata_description round", becomes(about("modelspec.description"), "round")),
    Row("--metadata_license CC0", becomes(about("modelspec.license"), "CC0")),
    Row("--metadata_tags red,round", becomes(about("modelspec.tags"), "red,round")),
    # Hugging Face hub
    Row("--huggingface_repo_id me/loras", becomes(asked_of_the_hub("upload_file", "repo_id"), ["me/loras"])),
    Row("--huggingface_repo_type dataset", becomes(asked_of_the_hub("upload_file", "repo_type"), ["dataset"]), beside=REPOSITORY),
    Row(
        "--huggingface_path_in_repo faces",
        becomes(asked_of_the_hub("upload_file", "path_in_repo"), ["faces/lora.safetensors"]),
        beside=REPOSITORY,
    ),
    Row(
        "--huggingface_token hf_secret",
        both(becomes(asked_of_the_hub("log in", "token"), ["hf_secret"]), is_nowhere("hf_secret")),
        beside=f"{REPOSITORY} {TENSORBOARD} --log_config --save_state",
    ),
    Row("--huggingface_repo_visibility public", becomes(asked_of_the_hub("create_repo", "private"), [False]), beside=REPOSITORY),
    Row(
        "--save_state_to_huggingface",
        becomes(asked_of_the_hub("upload_folder", "path_in_repo"), ["lora-state"]),
        beside=f"{REPOSITORY} --save_state",
    ),
    Row(
        "--resume_from_huggingface",
        both(becomes(column("step"), ["3"]), becomes(asked_of_the_hub("snapshot_download", "allow_patterns"), ["state/*"])),
        beside="--resume me/loras/state --max_train_steps 3",
    ),
    Row("--async_upload", logs("waiting for 1 uploads"), beside=REPOSITORY),
    # Several processes
    Row("--ddp_timeout 7", becomes(process_timeout, timedelta(minutes=7))),
    Row("--ddp_gradient_as_bucket_view", same_lora),  # accepted, without effect
    Row("--ddp_static_graph", same_lora),  # accepted, without effect
)


@pytest.fixture(scope="module")
def bench(tiny_model, tmp_path_factory) -> Bench:
    data = tmp_path_factory.mktemp("data")
    write_data(data, tiny_model)
    bench = Bench(SCRIPT, BASE, tmp_path_factory.mktemp("runs"), data=data, model=tiny_model.dit.parent)
    shutil.copytree(bench.run("--save_every_n_steps 1 --save_state").file("lora-state"), data / "state")
    return bench


def write_data(data: Path, model) -> None:
    """Caches of two pictures in one batch and of a clip, and every file that a row names."""
    write_caches(data / "pictures", {"a": (1, 4, 4), "b": (1, 4, 4)})
    shutil.copy(data / "pictures" / "a_hv_te.safetensors", data / "pictures" / "b_hv_te.safetensors")  # of one length
    write_caches(data / "clips", {"clip": (2, 4, 4)}, seed=1)
    pictures = (
        f"[[datasets]]\nresolution = 32\nimage_directory = '{data}/gone'\ncache_directory = '{data}/pictures'\nbatch_size = 2\n"
    )
    clips = (
        f"[[datasets]]\nresolution = 32\nvideo_directory = '{data}/too'\ncache_directory = '{data}/clips'\ntarget_frames = [5]\n"
    )
    texts = {
        "pictures.toml": pictures,
        "dataset.toml": pictures + clips,
        "flags.toml": "network_dim = 2\n",
        "trackers.toml": "[tensorboard]\nmax_queue = 1\n",
        "prompts.txt": "a red ball --w 48 --h 32 --s 1 --d 7\n",
        "wide.txt": "a red ball --w 272 --h 16 --s 1 --d 7\n",
        "network_of_rank_3.py": "from networks import lora\n\n\ndef create_network(multiplier, dim, *rest, **options):\n"
        "    return lora.create_network(multiplier, 3, *rest, **options)\n",
    }
    for name, text in texts.items():
        (data / name).write_text(text, encoding="utf-8")
    write_lora(model.dit, data / "rank3.safetensors")
    write_other_models(model, data)


def test_every_flag_has_a_row_and_every_row_a_flag() -> None:
    check_rows(SCRIPT, ROWS)


@pytest.mark.parametrize("row", rows_as_parameters(ROWS))
def test_effect(bench: Bench, row: Row) -> None:
    bench.check(row)
