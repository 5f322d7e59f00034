"""Every flag of every script in a row, with an effect that is measured: two runs of the script, with the flag and without it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
from flag_effects import (
    about,
    alphas,
    as_without_any,
    asked_of_the_hub,
    becomes,
    begins_with_a_dry_step,
    begins_with_the_file,
    blocks,
    both,
    column,
    columns,
    computed_steps,
    computes_in,
    counts_other_tokens,
    differs,
    dtypes,
    every_four_cover_the_range,
    frame,
    frames_per_second,
    half_the_memory,
    holds_prompt,
    is_nowhere,
    keeps_float8,
    keeps_int8,
    keeps_scaled_float8,
    largest_update,
    latent,
    latents,
    length_of_first_step,
    logged_steps,
    logs,
    lora,
    lora_dtypes,
    lora_layout,
    narrower,
    numbers,
    offloads,
    pooled,
    prints,
    process_timeout,
    quantile,
    ranks,
    rates,
    refused,
    removes,
    sample,
    samples_nothing_more,
    seen,
    setting,
    shape,
    splits,
    states,
    stays,
    swaps,
    told_to_wandb,
    trains_timesteps_in,
    trains_whole_timesteps,
    warns_of_the_cpu,
    works,
    writes,
)
from flag_runs import Row
from pytest import approx

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

TRAINING = (
    # Input
    Row("--config_file {data}/flags.toml", becomes(ranks, {2})),
    Row("--dataset_config {data}/pictures.toml", becomes(about("ss_num_train_items"), "2")),
    Row("--dit {data}/other.safetensors", both(becomes(about("ss_sd_model_name"), "other.safetensors"), other_lora)),
    Row("--dit_dtype bfloat16", both(computes_in(torch.bfloat16, "transformer"), other_lora)),
    # Attention
    Row("--sdpa", refused("exclude each other"), beside="--flash_attn"),  # it is the default: only this shows it
    Row("--flash_attn", refused("attention mode flash needs a CUDA device")),
    Row("--sage_attn", refused("--sage_attn cannot train")),
    Row("--xformers", refused("attention mode xformers needs a CUDA device")),
    Row("--split_attn", both(stays(lora, within=1e-4), becomes(seen("attended"), 8 + 3))),  # of the clip, and not of two pictures
    # Memory
    Row("--fp8_base", both(keeps_float8("transformer"), other_lora)),
    Row("--int8_base", both(keeps_int8("transformer"), other_lora)),
    Row("--fp8_scaled", both(keeps_scaled_float8("transformer"), other_lora), beside="--fp8_base"),
    Row("--fp8_fast", refused("--fp8_fast multiplies in float8"), beside="--fp8_base"),
    Row("--gradient_checkpointing", both(stays(lora, within=1e-4), half_the_memory)),
    Row(
        "--gradient_checkpointing_cpu_offload",
        both(same_lora, offloads),
        beside="--gradient_checkpointing --keep_attention off",  # whose results nobody counts on the device
    ),
    Row("--keep_attention off", both(same_lora, becomes(seen("kept_attention"), {False})), beside="--gradient_checkpointing"),
    Row("--blocks_to_swap 1", both(same_lora, swaps("single_blocks.0", "single_blocks.1", "single_blocks.3"))),  # 1 + two slots
    Row("--split_blocks 2,4", refused("--split_blocks 2,4 spreads the blocks over several GPUs, but this runs on cpu")),
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
    Row("--gpu_memory_fraction 0.5", both(logs("--gpu_memory_fraction: no effect on cpu"), same_lora)),
    Row("--no_fused_kernels", both(logs("--no_fused_kernels: no effect on cpu"), same_lora)),
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
        beside="--max_data_loader_n_workers 1 --max_train_steps 3 --no_persistent_data_loader_workers",
    ),
    Row(
        "--no_persistent_data_loader_workers",
        both(becomes(seen("processes"), 2), same_lora),
        beside="--max_data_loader_n_workers 1 --max_train_steps 3",
    ),
    # Optimizer and learning rate
    Row("--optimizer_type SGD", both(becomes(about("ss_optimizer"), "torch.optim.sgd.SGD"), other_lora)),
    Row(
        "--optimizer_args weight_decay=0.5",
        both(becomes(about("ss_optimizer"), "torch.optim.adamw.AdamW(weight_decay=0.5)"), other_lora),
    ),
    Row("--learning_rate 2e-3", both(rates(0.002, 0.002), other_lora)),
    Row(
        "--max_grad_norm 1e-3",
        becomes(length_of_first_step, approx(1e-3, rel=1e-3)),
        beside="--optimizer_type SGD --learning_rate 1 --max_train_steps 1",
    ),
    Row("--lr_scheduler linear", rates(0.01, 0.005)),
    Row("--lr_warmup_steps 2", rates(0.0, 0.005), beside="--lr_scheduler constant_with_warmup"),
    Row("--lr_decay_steps 2", rates(0.01, 0.005), beside="--lr_scheduler warmup_stable_decay"),
    Row("--lr_scheduler_num_cycles 2", rates(0.01, 0.01), beside="--lr_scheduler cosine_with_restarts"),
    Row("--lr_scheduler_power 2", rates(0.01, 0.0025), beside="--lr_scheduler polynomial"),
    Row("--lr_scheduler_timescale 3", rates(0.01, 0.01 * 0.75**0.5), beside="--lr_scheduler inverse_sqrt"),
    Row("--lr_scheduler_min_lr_ratio 0.5", rates(0.01, 0.0075), beside="--lr_scheduler cosine_with_min_lr"),
    Row("--lr_scheduler_type torch.optim.lr_scheduler.LinearLR", rates(0.01 / 3, 0.014 / 3)),
    Row(
        "--lr_scheduler_args start_factor=0.5",
        rates(0.005, 0.006),
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
    Row("--base_weights_multiplier 0", as_without_any(lora), beside="--base_weights {data}/rank3.safetensors"),
    Row("--lora_partial", both(works, logs("is used in part")), beside="--base_weights {data}/partly.safetensors"),
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
    Row("--save_format other diffusers", both(becomes(lora_layout, "other"), writes("lora_diffusers.safetensors"))),
    Row("--no_comfyui", removes("lora_comfyui.safetensors")),
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
    Row("--text_cache {out}/texts", writes("texts/*.safetensors"), beside=SAMPLES),
    # Logs
    Row("--logging_dir {out}/logs", becomes(logged_steps, [1, 2])),
    Row("--log_with wandb", becomes(told_to_wandb("steps"), [1, 2, 2])),  # the size of the updates is logged with the last
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
    Row("--huggingface_repo_id me/loras", becomes(asked_of_the_hub("upload_file", "repo_id"), ["me/loras"] * 2)),
    Row(
        "--huggingface_repo_type dataset", becomes(asked_of_the_hub("upload_file", "repo_type"), ["dataset"] * 2), beside=REPOSITORY
    ),
    Row(
        "--huggingface_path_in_repo faces",
        becomes(asked_of_the_hub("upload_file", "path_in_repo"), ["faces/lora.safetensors", "faces/lora_comfyui.safetensors"]),
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
    Row("--async_upload", logs("waiting for 1 uploads"), beside=f"{REPOSITORY} --no_comfyui"),
    # Several processes
    Row("--ddp_timeout 7", becomes(process_timeout, [timedelta(minutes=7)])),
    Row("--ddp_gradient_as_bucket_view", logs("--ddp_gradient_as_bucket_view: no effect")),
    Row("--ddp_static_graph", logs("--ddp_static_graph: no effect")),
)


CONSOLE = "--debug_mode console"
COUNTS = "--debug_mode html --text_encoder1 {model}/text_encoder --text_encoder2 {model}/text_encoder_2"
UNCAPTIONED = "--dataset_config {out}/uncaptioned.toml"

LATENTS = (
    Row("--config_file {data}/batch_size.toml", becomes(seen("encoded"), [1, 1])),
    Row("--dataset_config {out}/other.toml", writes("other/a_0288x0064_hv.safetensors")),
    Row("--batch_size 1", becomes(seen("encoded"), [1, 1])),
    Row("--num_workers 3", both(becomes(seen("threads"), [3]), stays(latents))),
    Row("--skip_existing", becomes(seen("encoded"), [])),
    Row("--missing_caption empty", writes("cache/c_0288x0064_hv.safetensors"), beside=UNCAPTIONED),
    Row("--remove_orphans", removes("cache/gone_0032x0032_hv.safetensors")),
    Row("--vae {data}/other_vae", differs(latents)),
    Row("--vae_dtype bfloat16", becomes(dtypes(latents), {torch.bfloat16})),
    Row("--vae_tiling", differs(latents)),  # of 288 pixels, more than a tile has
    Row("--vae_chunk_size 8", both(stays(latents, within=1e-4), narrower)),
    Row("--vae_spatial_tile_sample_min_size 32", differs(latents)),
    Row("--device cpu", becomes(warns_of_the_cpu, False)),
    Row("--device cuda", refused("torch finds no CUDA device")),
    Row("--debug_mode image", both(writes("cache/debug/a_0288x0064_hv.png"), becomes(seen("encoded"), []))),
    Row("--preview_latents", writes("cache/debug/preview_latents.html"), beside="--debug_mode html"),
    Row("--text_encoder1 {model}/text_encoder", works, beside="--debug_mode html --text_encoder2 {model}/text_encoder_2"),
    Row("--text_encoder2 {model}/text_encoder_2", works, beside="--debug_mode html --text_encoder1 {model}/text_encoder"),
    Row("--tokenizer1 {data}/tokenizer1", counts_other_tokens(1), beside=COUNTS),
    Row("--tokenizer2 {data}/tokenizer2", counts_other_tokens(2), beside=COUNTS),
    Row("--console_width 40", becomes(columns, {40}), beside=CONSOLE),
    Row("--console_back RED", prints("\x1b[41m"), beside=CONSOLE),
    Row("--console_num_images 1", becomes(lambda run: run.done.output.count("-> 288x64"), 1), beside=CONSOLE),
)

TEXTS = (
    Row("--config_file {data}/batch_size.toml", becomes(seen("captions"), [1, 1])),
    Row("--dataset_config {out}/other.toml", writes("other/a_hv_te.safetensors")),
    Row("--batch_size 1", becomes(seen("captions"), [1, 1])),
    Row("--num_workers 3", both(becomes(seen("threads"), [3]), stays(states), stays(pooled))),
    Row("--skip_existing", becomes(seen("captions"), [])),
    Row("--missing_caption empty", writes("cache/c_hv_te.safetensors"), beside=UNCAPTIONED),
    Row("--remove_orphans", removes("cache/gone_hv_te.safetensors")),
    Row("--text_encoder1 {data}/other_text_encoder", both(differs(states), stays(pooled))),
    Row("--text_encoder2 {data}/other_text_encoder_2", both(stays(states), differs(pooled))),
    Row("--tokenizer1 {data}/tokenizer1", both(differs(states), stays(pooled))),
    Row("--tokenizer2 {data}/tokenizer2", both(stays(states), differs(pooled))),
    Row(
        "--text_encoder_dtype bfloat16", both(becomes(dtypes(states), {torch.bfloat16}), becomes(dtypes(pooled), {torch.bfloat16}))
    ),
    Row("--fp8_llm", both(keeps_float8("text encoder 1"), differs(states, by_at_most=0.2), stays(pooled))),
    Row("--device cpu", becomes(warns_of_the_cpu, False)),
    Row("--device cuda", refused("torch finds no CUDA device")),
)

ENCODERS = "--text_encoder1 {model}/text_encoder --text_encoder2 {model}/text_encoder_2"
other_latent, other_frame = differs(latent), differs(frame)
LORA = "--lora_weight {data}/rank3.safetensors"
IMAGES = "--output_type images"
COMPARISON = "--xy embedded_cfg_scale=1,6 steps=1,2"
PROMPTLESS = (
    "--dit {model}/dit.safetensors --vae {model}/vae --save_path {out} --output_type latent --seed 5 --video_size 32 64 "
    "--video_length 1 --infer_steps 2 " + ENCODERS
)
GUIDED = "--guidance_scale 4"

GENERATION = (
    # Models
    Row("--config_file {data}/flow_shift.toml", becomes(setting("flow_shift"), "1")),
    Row("--dit {data}/other.safetensors", other_latent),
    Row("--dit_dtype bfloat16", both(computes_in(torch.bfloat16, "transformer"), differs(latent, by_at_most=0.2))),
    Row("--fp8", both(keeps_float8("transformer"), differs(latent, by_at_most=0.2))),
    Row("--fp8_scaled", both(keeps_scaled_float8("transformer"), differs(latent, by_at_most=0.2)), beside="--fp8"),
    Row("--int8", both(keeps_int8("transformer"), differs(latent, by_at_most=0.2))),
    Row("--fp8_fast", refused("--fp8_fast multiplies in float8"), beside="--fp8"),
    Row("--blocks_to_swap 1", both(stays(latent), swaps("single_blocks.0", "single_blocks.1", "single_blocks.3"))),  # 1 + two slots
    Row("--split_blocks 2,4", refused("--split_blocks 2,4 spreads the blocks over several GPUs, but this runs on cpu")),
    Row("--img_in_txt_in_offloading", both(stays(latent), swaps("img_in", "txt_in"))),
    Row("--no_pinned_swap_memory", both(stays(latent), becomes(seen("pinned"), {False})), beside="--blocks_to_swap 1"),
    Row("--vae {data}/other_vae", other_frame, beside=IMAGES),
    Row("--vae_dtype bfloat16", both(computes_in(torch.bfloat16, "vae"), other_frame), beside=IMAGES),
    Row("--vae_chunk_size 8", both(stays(frame, within=1), narrower), beside=IMAGES),
    Row("--vae_spatial_tile_sample_min_size 32", other_frame, beside=IMAGES),
    Row("--text_encoder1 {data}/other_text_encoder", other_latent),
    Row("--text_encoder2 {data}/other_text_encoder_2", other_latent),
    Row("--tokenizer1 {data}/tokenizer1", other_latent),
    Row("--tokenizer2 {data}/tokenizer2", other_latent),
    Row("--text_encoder_dtype bfloat16", both(computes_in(torch.bfloat16, "text encoder 1", "text encoder 2"), other_latent)),
    Row("--fp8_llm", both(keeps_float8("text encoder 1"), differs(latent, by_at_most=0.2))),
    Row("--text_cache {out}/texts", both(writes("texts/*.safetensors"), stays(latent))),
    Row("--device cpu", both(becomes(warns_of_the_cpu, False), stays(latent))),
    Row("--device cuda", refused("torch finds no CUDA device")),
    Row("--attn_mode sdpa", works, beside="--attn_mode flash"),  # of two, the last one counts
    Row("--attn_mode flash", refused("attention mode flash needs a CUDA device")),
    Row("--split_attn", both(becomes(splits, True), stays(latent))),  # of one sample there is nothing to split
    # Speed
    Row("--compile", both(becomes(seen("compiled"), {"default"}), stays(latent, within=1e-4))),
    Row(
        "--compile_mode max-autotune-no-cudagraphs",
        becomes(seen("compiled"), {"max-autotune-no-cudagraphs"}),
        beside="--compile",
    ),
    Row("--tf32", both(logs("--tf32: no effect on cpu"), stays(latent))),
    Row("--cudnn_benchmark", both(logs("--cudnn_benchmark: no effect on cpu"), stays(latent))),
    Row("--gpu_memory_fraction 0.5", both(logs("--gpu_memory_fraction: no effect on cpu"), stays(latent))),
    Row("--no_fused_kernels", both(logs("--no_fused_kernels: no effect on cpu"), stays(latent))),
    # LoRA
    Row(LORA, both(becomes(setting("lora"), "rank3.safetensors (1)"), other_latent)),
    Row("--lora_multiplier 0", as_without_any(latent), beside=LORA),
    Row("--lora_mode inject", both(becomes(seen("injected"), True), stays(latent, within=1e-4)), beside=LORA),
    Row("--lora_partial", both(works, logs("is used in part")), beside="--lora_weight {data}/partly.safetensors"),
    Row("--lora_block_multiplier double=0.5 single.0-1=2", other_latent, beside=LORA),
    Row("--exclude_single_blocks", other_latent, beside=LORA),
    Row("--save_merged_model {out}/merged.safetensors", both(writes("merged.safetensors"), removes("*_latent.*")), beside=LORA),
    # What to draw
    Row("--prompt another", becomes(setting("prompt"), "another"), base=PROMPTLESS),
    Row("--from_file {data}/prompts.txt", both(works, becomes(setting("prompt"), "a red ball")), base=PROMPTLESS),
    Row(COMPARISON, both(writes("xy_2_1_5/00000.png"), writes("xy_*.png")), beside=IMAGES),
    Row("--interactive", both(works, becomes(setting("prompt"), "a red ball")), base=PROMPTLESS),
    Row("--video_size 48 32", becomes(shape, (16, 1, 6, 4))),
    Row("--video_length 5", becomes(shape, (16, 2, 4, 8))),
    Row("--fps 12", becomes(frames_per_second, 12), beside="--output_type video"),
    Row("--infer_steps 3", both(becomes(computed_steps, 3), other_latent)),
    Row("--seed 6", both(becomes(setting("seed"), "6"), other_latent)),
    Row("--embedded_cfg_scale 1", both(becomes(seen("guidance"), {1000.0}), other_latent)),
    Row("--guidance_scale 4", both(becomes(seen("samples"), {2}), other_latent)),
    Row("--negative_prompt cubes", both(becomes(setting("negative_prompt"), "cubes"), other_latent), beside=GUIDED),
    Row("--guidance_range 0 0.5", both(becomes(computed_steps, 3), other_latent), beside=GUIDED),  # two of one step, one of another
    Row("--split_uncond", both(becomes(seen("samples"), {1}), stays(latent, within=1e-5)), beside=GUIDED),
    Row("--flow_shift 1", both(becomes(seen("timesteps"), [1000.0, 500.0]), other_latent)),
    Row("--step_cache 1000", both(becomes(computed_steps, 3), other_latent), beside="--infer_steps 5"),
    Row("--step_cache_check", both(becomes(computed_steps, 3 + 5), stays(latent)), beside="--infer_steps 5 --step_cache 1000"),
    # What to start from
    Row("--image_path {data}/media/a.png", other_latent, beside="--strength 0.5"),
    Row("--video_path {data}/media", other_latent, beside="--strength 0.5"),
    Row("--latent_path {data}/x_latent.safetensors", other_latent, beside="--strength 0.5"),
    Row("--strength 0", becomes(seen("timesteps"), []), beside="--latent_path {data}/x_latent.safetensors"),
    # Output
    Row("--save_path {out}/elsewhere", writes("elsewhere/*_latent.safetensors")),
    Row("--sheet {out}/all.png", both(writes("all.png"), removes("xy_*.png")), beside=f"{IMAGES} {COMPARISON}"),
    Row("--output_type images", both(writes("*/00000.png"), removes("*_latent.safetensors"))),
    Row("--preview_every 1", both(logs("preview, until the result is there"), stays(latent))),
    Row("--no_metadata", becomes(holds_prompt, False), beside=IMAGES),
    Row("--decode_on_cpu", both(becomes(seen("threads"), [1]), stays(frame)), beside=IMAGES),
    Row("--show {data}/x_latent.safetensors", both(prints("made with"), removes("*_latent.safetensors"))),
    Row("--repeat {data}/x_latent.safetensors", works, base="--save_path {out}"),
    Row("--skip_existing", samples_nothing_more, beside="--save_path {data}/made"),
)

CHECK = "--check {data}/rank3.safetensors"
CONVERSION = (
    Row("--input {data}/one_module.safetensors", becomes(lambda run: len(run.tensors("converted.safetensors")), 2)),
    Row("--output {out}/other.safetensors", both(writes("other.safetensors"), removes("converted.safetensors"))),
    Row(
        "--target default",  # refused without it: the file has the other layout already
        becomes(lambda run: {name[:10] for name in run.tensors("converted.safetensors")}, {"lora_unet_"}),
        beside="--input {data}/converted.safetensors",
    ),
    Row("--lora_partial", works, beside="--input {data}/in_part.safetensors"),
    Row("--check {data}/rank3.safetensors", prints("rank"), base=""),
    Row("--dit {model}/dit.safetensors", prints("all modules match"), base=CHECK),
    Row("--norms", prints("norm, double blocks"), base=CHECK),
    Row("--json", prints('"ranks": ['), base=CHECK),
)


@dataclass(frozen=True)
class Table:
    """The rows of a script, and the flags of all its runs."""

    base: str
    rows: tuple[Row, ...]


TABLES = {
    "hv_train_network": Table(
        "--dataset_config {data}/dataset.toml --dit {model}/dit.safetensors --output_dir {out} --output_name lora --seed 3 "
        "--max_data_loader_n_workers 0 --max_train_steps 2 --learning_rate 1e-2 --loss_log {out}/loss.csv",
        TRAINING,
    ),
    "cache_latents": Table("--dataset_config {out}/dataset.toml --num_workers 2 --vae {model}/vae", LATENTS),
    "cache_text_encoder_outputs": Table("--dataset_config {out}/dataset.toml --num_workers 2 " + ENCODERS, TEXTS),
    "hv_generate_video": Table(
        f"--prompt ball {PROMPTLESS}",
        GENERATION,
    ),
    "convert_lora": Table("--input {data}/rank3.safetensors --output {out}/converted.safetensors --target other", CONVERSION),
}
